"""From settings to live models, metric and loop: everything a run needs, in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpg_cli.config import Config
from dpg_cli.engine.loop import LoopSpec, Players
from dpg_cli.engine.optim import OptimizerSpec
from dpg_cli.engine.policy import PolicySpec
from dpg_cli.engine.rollout import Sampling
from dpg_cli.errors import UsageError
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models import LanguageModel, load_generator, load_target, pick_device, same_tokenizer
from dpg_cli.prompts import PromptSampler, load_prompts


@dataclass
class Built:
    """A run made ready.

    Attributes:
        players: models, metric, policy optimiser, RNGs.
        spec: the loop's settings.
        prompts: the sampler of training prompts.
        device: where it runs.
    """

    players: Players
    spec: LoopSpec
    prompts: PromptSampler
    device: torch.device


def build(config: Config) -> Built:
    """Load models and prompts, make the metric, the policy optimiser and the RNGs.

    Raises:
        UsageError: for anything that the settings name and that is not there or does not fit.
    """
    device = pick_device(config.device)
    prompts = load_prompts(config.prompts.source)
    target = load_target(config.models, device)
    generator = load_generator(config.models, device)
    metric = build_metric(config.metric, target)
    check_lengths(config, generator, target, prompts)
    if not same_tokenizer(generator, target):
        raise UsageError(
            f"The generator {generator.name!r} and the target {target.name!r} have different tokenisers.",
            "Take two models of one family.",
        )
    optimizer = torch.optim.AdamW(
        generator.model.parameters(),
        lr=config.policy.lr,
        betas=(config.policy.beta1, config.policy.beta2),
        eps=config.policy.eps,
        weight_decay=config.policy.weight_decay,
    )
    reference = load_generator(config.models, device).model.requires_grad_(False) if config.policy.kl > 0 else None
    players = Players(
        generator=generator,
        target=target,
        metric=metric,
        policy_optimizer=optimizer,
        rng=torch.Generator(device).manual_seed(config.seed),
        order_rng=torch.Generator().manual_seed(config.seed + 1),
        reference=reference,
    )
    sampler = PromptSampler(prompts, config.prompts.per_step, config.seed)
    return Built(players, loop_spec(config, generator), sampler, device)


def check_lengths(config: Config, generator: LanguageModel, target: LanguageModel, prompts: list[str]) -> None:
    """Refuse prompts and completions longer than the models' context.

    Raises:
        UsageError: naming the model and its limit.
    """
    longest = max(len(row) for row in generator.tokenizer(prompts)["input_ids"])
    for model, extra in ((generator, longest + 1), (target, 1)):
        limit = getattr(model.model.config, "max_position_embeddings", None)
        if limit is not None and config.rollout.max_tokens + extra > limit:
            raise UsageError(
                f"Prompt and completion take up to {extra} + {config.rollout.max_tokens} tokens; "
                f"the context of {model.name!r} is {limit}.",
                "Lower rollout.max_tokens, or shorten the prompts.",
            )


def loop_spec(config: Config, generator: LanguageModel) -> LoopSpec:
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
        ),
        optimizer=OptimizerSpec(
            name=inner.optimizer,
            lr=inner.lr,
            beta1=inner.beta1,
            beta2=inner.beta2,
            eps=inner.eps,
            eps_root=inner.eps_root,
            weight_decay=inner.weight_decay,
            momentum=inner.momentum,
        ),
        inner_batch=inner.batch_size,
        normalization=inner.normalization,
        micro_batch=inner.micro_batch,
        credit=config.credit.mode,
        discount=config.credit.discount,
        policy=PolicySpec(
            temperature=rollout.temperature,
            clip=policy.clip,
            kl=policy.kl,
            epochs=policy.epochs,
            minibatch=policy.minibatch,
            max_grad_norm=policy.max_grad_norm,
        ),
        lr=policy.lr,
        lr_warmup=policy.warmup,
        lr_decay=policy.decay,
        states=inner.states,
    )
