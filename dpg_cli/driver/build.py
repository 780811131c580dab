"""From settings to live models, metric and loop: everything a run needs, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dpg_cli.data.chat import PromptFormat, prompt_format
from dpg_cli.data.prompts import PromptSampler, load_prompts
from dpg_cli.driver.prospect import Prospect, located, look, looks, prospect
from dpg_cli.driver.recipe import inner_recipe, replay_of, trained_target
from dpg_cli.driver.trl.needs import require_trl
from dpg_cli.engine.attribution import AttributionSpec
from dpg_cli.engine.generator.agreement import Agreement, agreement
from dpg_cli.engine.generator.alphabet import restricted
from dpg_cli.engine.generator.contexts import standard_head
from dpg_cli.engine.generator.optimizer import policy_optimizer
from dpg_cli.engine.generator.policy import PolicySpec
from dpg_cli.engine.generator.rollout import Sampling
from dpg_cli.engine.generator.step.sharing import obstacle
from dpg_cli.engine.inner.head import find_head
from dpg_cli.engine.loop import LoopSpec, Players
from dpg_cli.engine.natural.head_policy import HeadChange
from dpg_cli.engine.natural.scalar import ScalarProspect
from dpg_cli.engine.natural.step import NaturalPolicy, NaturalSpec
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.whole.policy import WholePolicy
from dpg_cli.errors import UsageError
from dpg_cli.models.fingerprint import Fingerprint, fingerprint
from dpg_cli.models.hub import first_line, require
from dpg_cli.models.loading import (
    LanguageModel,
    load_generator,
    load_target,
    module_names,
    pick_device,
    redraw_target,
    same_tokenizer,
)
from dpg_cli.models.lora import Lora, adapt, require_modules
from dpg_cli.models.template import DATE
from dpg_cli.rewards import build_text_reward
from dpg_cli.settings.config import Config, ModelsConfig
from dpg_cli.tiny import world

COMPARED = 64  # texts on which tokenisers are compared


@dataclass
class Built:
    """A run made ready.

    Attributes:
        players: models, metric, policy optimiser, RNGs.
        spec: the loop's settings.
        prompts: the sampler of training prompts.
        device: where it runs.
        tokenizers: how far those of generator and target agree.
        config: the settings, with what they leave to the models found.
        prospect: what the metric's pattern will cost, or the budget can do, where natural steps or a margin ask for it.
        target_made_of: the fingerprint of the target before it got adapters; None where it has none.
        replayed: how the rows of `inner.replay` were understood.
        hinders: why completions of a group do not share their prompt, though they were to; empty where they can.
    """

    players: Players
    spec: LoopSpec
    prompts: PromptSampler
    device: torch.device
    tokenizers: Agreement
    config: Config
    prospect: Prospect | ScalarProspect | None = None
    target_made_of: Fingerprint | None = None
    replayed: tuple[str, ...] = ()
    hinders: str = ""

    @property
    def notes(self) -> list[str]:
        """How the user's own prompts and held-out texts were understood, a line each."""
        form = self.spec.sampling.prompts
        prompts = getattr(self.prompts.prompts, "about", "")
        dated = form is not None and form.dated
        return [
            *([prompts] if prompts else []),
            *getattr(self.players.metric, "notes", ()),
            *self.replayed,
            *([f"prompts are read once for each completion, not once a group: {self.hinders}"] if self.hinders else []),
            *([f"the chat template asks for today's date and is given {DATE}"] if dated else []),
        ]


def build(config: Config, named_metric: str | None = None, ranks: Ranks = ALONE) -> Built:
    """Load models and prompts, make the metric, the policy optimiser and the RNGs.

    Args:
        config: the settings.
        named_metric: what the user gave as --metric; without it no file of a custom metric is run.
        ranks: the processes that share the run; each builds its own.

    Raises:
        UsageError: for anything that the settings name and that is not there or does not fit.
    """
    if config.policy.parameters == "lora":
        require_modules(module_names(config.models.generator), config.policy.lora_modules, "generator")
    if config.policy.optimizer_states == "8bit":
        require("bitsandbytes", "8bit", "policy.optimizer_states = '8bit'")
    if config.trainer == "trl":
        require_trl(config, ranks)
    device = pick_device(config.device) if ranks.world == 1 else ranks.device
    prompts = load_prompts(config.prompts.source, limit=config.prompts.limit, holdout=config.prompts.holdout)
    target = load_target(config.models, device)
    generator = restricted(load_generator(generator_models(config), device), config.rollout.alphabet)
    generator = with_adapters(config, generator)
    asked = config.prompts
    form = prompt_format(generator.tokenizer, generator.name, asked.chat, asked.instruction, asked.max_tokens)
    check_tokenizers(config, generator, target)
    check_lengths(config, generator, target, prompts, form)
    if config.inner.labels == "soft":
        standard_head(generator.model, generator.name)
    seen = None
    if looks(config):
        seen = look(generator, target, loop_spec(config, generator, form).sampling, prompts, config.seed + 3)
        config = located(config, target, seen, ranks)
    replay, replayed = replay_of(config, target)
    made_of = fingerprint(target) if config.lora.rank else None
    target, metric = trained_target(target, config, named_metric)
    cost = None if seen is None else prospect(config, metric, target, seen, loop_spec(config, generator, form))
    optimizer, natural = policy_of(config, generator)
    reference: torch.nn.Module | None = None
    if config.policy.kl > 0 and natural is None:  # of adapters the base, without a copy
        adapted = config.policy.parameters == "lora"
        reference = generator.model if adapted else load_generator(config.models, device).model.requires_grad_(False)
    if config.checkpoints_generator and natural is None and config.trainer == "dpg":
        checkpoint_activations(generator)
    ours = config.policy.share_prompts and config.trainer == "dpg"
    hinders = obstacle(generator.model, find_head(generator.model)) if ours else ""
    players = Players(
        generator=generator,
        target=target,
        metric=metric,
        policy_optimizer=optimizer,
        rng=torch.Generator(device).manual_seed(config.seed),
        order_rng=torch.Generator().manual_seed(config.seed + 1),
        reference=reference,
        text_reward=build_text_reward(config, device),
        redraw=partial(redraw_target, target, config.models) if config.models.redraw_target else None,
        ranks=ranks,
        natural=natural,
    )
    sampler = PromptSampler(prompts, config.prompts.per_step, config.seed)
    compared = agreement(generator, target, sample_texts(prompts))
    spec = replace(loop_spec(config, generator, form), replay=replay)
    spec = replace(spec, policy=replace(spec.policy, share=ours and not hinders))
    return Built(players, spec, sampler, device, compared, config, cost, made_of, replayed, hinders)


def generator_models(config: Config) -> ModelsConfig:
    """The models' settings, with the generator's head its own where it alone is trained."""
    alone = config.policy.parameters == "head"
    return config.models.model_copy(update={"untie_generator": config.models.untie_generator or alone})


def with_adapters(config: Config, generator: LanguageModel) -> LanguageModel:
    """The generator with the adapters that its policy is to move, if any."""
    policy = config.policy
    if policy.parameters != "lora":
        return generator
    lora = Lora(policy.lora_rank, policy.lora_alpha, policy.lora_modules)
    model: Any = adapt(generator.model, lora, config.seed, "generator")
    return replace(generator, model=model.eval())


def checkpoint_activations(generator: LanguageModel) -> None:
    """Let the generator compute its layers' activations again as it goes backwards.

    Raises:
        UsageError: if it cannot.
    """
    model: Any = generator.model
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        raise UsageError(
            f"The generator {generator.name!r} cannot compute its activations again: {first_line(error)}.",
            "Set policy.gradient_checkpointing = false, and policy.micro_batch for less memory.",
        ) from None


def policy_of(
    config: Config, generator: LanguageModel
) -> tuple[torch.optim.Optimizer | None, NaturalPolicy | WholePolicy | None]:
    """The optimiser of the generator's parameters, or its natural steps; parameters that stay as they are get no gradient.

    Raises:
        UsageError: if a natural step is asked for and the generator has no standard LM head, or none of its backbone is right.
    """
    policy = config.policy
    if policy.parameters == "head":
        layer = generator.model.get_output_embeddings()
        generator.model.requires_grad_(False)
        layer.requires_grad_(True)
    if policy.step == "natural":
        spec = NaturalSpec(
            trust=policy.trust,
            kl_budget=policy.kl_budget,
            kl=policy.kl,
            damping=policy.damping,
            iterations=policy.cg_iterations,
            tokens=policy.fisher_tokens,
        )
        head = standard_head(generator.model, generator.name)
        if policy.parameters == "head":
            return None, NaturalPolicy(spec, HeadChange(head))
        whole = WholePolicy(spec, generator.model, policy.micro_batch)
        whole.require_products(generator.name)
        return None, whole
    optimizer = policy_optimizer(
        [parameter for parameter in generator.model.parameters() if parameter.requires_grad],
        policy.optimizer_states,
        lr=policy.lr,
        betas=(policy.beta1, policy.beta2),
        eps=policy.eps,
        weight_decay=policy.weight_decay,
    )
    return optimizer, None


def check_tokenizers(config: Config, generator: LanguageModel, target: LanguageModel) -> None:
    """Refuse credit and labels that need one tokeniser where there are two.

    Raises:
        UsageError: naming both models.
    """
    if config.inner.labels == "soft" and not same_tokenizer(generator, target):
        raise UsageError(
            f"The generator {generator.name!r} and the target {target.name!r} have different tokenisers, "
            "and soft labels need one: the target cannot be trained on the generator's distributions.",
            "--set inner.labels=drawn, or take two models of one family.",
        )
    if config.credit.mode == "expected" and not same_tokenizer(generator, target):
        raise UsageError(
            f"The generator {generator.name!r} and the target {target.name!r} have different tokenisers, "
            "and the credit mode 'expected' needs one.",
            "--set credit.mode=token, or take two models of one family.",
        )


def check_lengths(
    config: Config, generator: LanguageModel, target: LanguageModel, prompts: Sequence[str], form: PromptFormat
) -> None:
    """Refuse prompts and completions longer than the models' context, and prompts without a token.

    Raises:
        UsageError: naming the model and its limit.
    """
    completion, length = config.rollout.max_tokens, config.inner.max_length
    longest = longest_prompt(form, prompts, (generator.context or 2**31) - completion)
    remedy = "Shorten the prompts (--set prompts.max_tokens=N cuts them), or --set rollout.max_tokens=N."
    if generator.context is not None and longest + completion > generator.context:
        raise UsageError(
            f"Prompt and completion take up to {longest:,} + {completion:,} tokens; "
            f"the context of {generator.name!r} is {generator.context:,}.",
            remedy,
        )
    bos = int(target.bos_id is not None)
    if target.context is not None and length > target.context:
        raise UsageError(
            f"inner.max_length = {length:,} is more than the context of {target.name!r}, {target.context:,}.",
            "Lower it.",
        )
    # Another tokeniser's sequences have lengths that nobody knows yet: they are cut to the context.
    cut = bool(length) or not same_tokenizer(generator, target)
    if target.context is not None and not cut and completion + bos > target.context:
        raise UsageError(
            f"Completions take up to {bos} + {completion:,} tokens; the context of {target.name!r} is {target.context:,}.",
            "--set rollout.max_tokens=N, or cut examples with --set inner.max_length=N.",
        )


def longest_prompt(form: PromptFormat, prompts: Sequence[str], room: int) -> int:
    """Tokens of the longest prompt as the generator reads it, or a bound at most `room` where all surely fit.

    A token of text takes at least a byte in nearly every tokeniser, so only texts of more bytes than there is room for
    are tokenised. Prompts that are cut need no look at all.

    Raises:
        UsageError: for an empty prompt that leaves the generator nothing to begin with.
    """
    around = len(form.encode([""])[0])
    if form.max_tokens:
        return around + form.max_tokens + 8  # a few tokens more where the pieces meet
    longest = around
    for prompt in prompts:
        size = len(prompt.encode())
        if size + around > room:
            longest = max(longest, len(form.encode([prompt])[0]))
        elif not size and not around:
            raise UsageError(
                "A prompt is empty, and the generator's tokeniser has no beginning-of-sequence token.",
                "Take other --prompts, or a generator with such a token.",
            )
        else:
            longest = max(longest, min(size + around, room))
    return longest


def sample_texts(prompts: Sequence[str]) -> list[str]:
    """Some texts to compare tokenisers on: the first prompts, or sentences of the embedded world where they are empty."""
    texts = [text for text in prompts[:COMPARED] if text.strip()]
    return texts or world.sentences("eval", "en", COMPARED, seed=0)


def loop_spec(config: Config, generator: LanguageModel, form: PromptFormat) -> LoopSpec:
    """The loop's settings, as the engine takes them."""
    rollout, inner, policy = config.rollout, config.inner, config.policy
    return LoopSpec(
        steps=config.steps,
        sampling=Sampling(
            group_size=rollout.group_size,
            max_tokens=rollout.max_tokens,
            min_tokens=rollout.min_tokens,
            temperature=rollout.temperature,
            eos_id=generator.eos_id,
            pad_id=generator.pad_id,
            batch_size=rollout.batch_size,
            end_ids=generator.end_ids,
            prompts=form,
            portable=rollout.portable,
            silent_ids=generator.silent_ids,
            precision=policy.precision,
        ),
        recipe=inner_recipe(inner, config.seed),
        micro_batch=inner.micro_batch,
        credit=config.credit.mode,
        discount=config.credit.discount,
        policy=PolicySpec(
            temperature=rollout.temperature,
            clip=policy.clip,
            kl=policy.kl,
            epochs=policy.epochs,
            minibatch=policy.minibatch,
            micro_batch=policy.micro_batch,
            micro_batch_tokens=policy.micro_batch_tokens,
            precision=policy.precision,
            max_grad_norm=policy.max_grad_norm,
            silent_ids=generator.silent_ids,
        ),
        lr=policy.lr,
        lr_warmup=policy.warmup,
        lr_decay=policy.decay,
        kl_decay=policy.kl_decay,
        states=inner.states,
        packing=inner.packing,
        share_prefixes=inner.share_prefixes,
        second_order=inner.second_order,
        max_length=inner.max_length,
        attribution=attribution_spec(config),
        labels=inner.labels,
        dataset=config.dataset.examples,
        predicted=config.stop.predicted,
    )


def attribution_spec(config: Config) -> AttributionSpec:
    """How completions are attributed, as the engine takes it."""
    attribution = config.attribution
    method = attribution.method if attribution.method in ("metagradient", "sgd", "naive") else "text"
    return AttributionSpec(method, config.attribution_runs, attribution.cross_group, attribution.sgd_lr)
