"""`dpg run TASK --trainer trl`: TRL's GRPOTrainer trains the generator, with the metagradient as its reward.

Rollouts, DDP, optimiser steps and checkpoints are TRL's and transformers' own; ours are the reward, the prompts and their order, the
learning rate of each outer step, and the log. An outer step is a generation batch: N completions, N / minibatch optimiser
steps for each of the epochs. With `sequence` credit, one reward for each completion, the advantages and the clipped policy
gradient are TRL's too; with `token` and `expected` the loss is that of our own loop (`integrations/trl_credit.py`).
"""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpg_cli.data.chat import PromptFormat
from dpg_cli.data.conversations import dated
from dpg_cli.data.prompts import PromptSampler
from dpg_cli.driver.build import Built
from dpg_cli.engine.detect import Watch, metric_before, refuse_nonfinite, weights_changed
from dpg_cli.engine.loop import StepReport
from dpg_cli.engine.ranks import Ranks
from dpg_cli.errors import UsageError
from dpg_cli.integrations.trl import MetagradientReward, RewardedBatch
from dpg_cli.integrations.trl_credit import TokenCredit
from dpg_cli.models.folder import ModelError, examine
from dpg_cli.models.loading import quiet_transformers
from dpg_cli.models.strict import load_strictly
from dpg_cli.models.template import DATE
from dpg_cli.settings.config import Config

FROM_TRL = {  # our names of the figures that TRL logs after an optimiser step
    "entropy": "entropy",
    "grad_norm": "policy_grad_norm",
    "clip_ratio/region_mean": "policy_clipped",
    "kl": "policy_kl",
    "learning_rate": "lr",
}
_CHECKPOINT = re.compile(r"checkpoint-([1-9]\d{0,9})")


def steps_per_outer(config: Config) -> int:
    """Optimiser steps of TRL an outer step."""
    return config.examples_per_step // config.policy.minibatch * config.policy.epochs


def newest_step(folder: Path, config: Config) -> tuple[int, Path | None]:
    """Outer steps that the newest of TRL's checkpoints holds, and its folder; 0 where there is none."""
    found = [(int(match[1]), path) for path in _entries(folder) if (match := _CHECKPOINT.fullmatch(path.name))]
    whole = [(step, path) for step, path in sorted(found) if (path / "trainer_state.json").is_file()]
    return (whole[-1][0] // steps_per_outer(config), whole[-1][1]) if whole else (0, None)


def require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint of TRL's whose weights are not all there: its trainer would go on with what it finds.

    Raises:
        UsageError: with the cause.
    """
    try:
        load_strictly(examine(str(checkpoint), checkpoint), torch.float32)
    except ModelError as error:
        raise UsageError(error.cause, "Remove that checkpoint to go on from the one before it.") from error


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def arguments(config: Config, folder: Path, ranks: Ranks, device: torch.device, silent_ids: Sequence[int] = ()) -> Any:
    """The settings as TRL's `GRPOConfig`; `silent_ids` are never drawn.

    `generation_kwargs` are transformers' or vLLM's own: vLLM has no list of suppressed tokens, but a bias of -100 on a logit.
    """
    from trl import GRPOConfig

    rollout, policy = config.rollout, config.policy
    own = policy.minibatch // ranks.world
    pieces = -(-own // policy.micro_batch) if policy.micro_batch else 1
    while own % pieces:  # TRL takes even ones
        pieces += 1
    vllm: dict[str, Any] = {}
    if config.trl.vllm != "off":
        vllm = {"use_vllm": True, "vllm_mode": config.trl.vllm}
    generation: dict[str, Any] = {}
    if rollout.min_tokens > 1:
        generation["min_tokens" if vllm else "min_new_tokens"] = rollout.min_tokens
    if silent_ids:
        generation |= (
            {"logit_bias": dict.fromkeys(silent_ids, -100.0)} if vllm else {"suppress_tokens": list(silent_ids)}
        )
    return GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=own // pieces,
        steps_per_generation=config.examples_per_step // policy.minibatch * pieces,
        gradient_accumulation_steps=pieces,
        num_generations=rollout.group_size,
        num_iterations=policy.epochs,
        max_steps=config.steps * steps_per_outer(config),
        max_completion_length=rollout.max_tokens,
        temperature=rollout.temperature,
        top_k=0,
        generation_kwargs=generation or None,
        chat_template_kwargs={"date_string": DATE},
        beta=policy.kl if config.credit.mode == "sequence" else 0.0,  # else it is in our own loss
        epsilon=policy.clip,
        loss_type="dr_grpo",  # summed over tokens, divided by the number of completions and a constant
        scale_rewards="group",
        max_grad_norm=policy.max_grad_norm or 1e30,
        shuffle_dataset=False,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        bf16=policy.precision == "bf16",
        gradient_checkpointing=config.checkpoints_generator,
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_strategy="no",  # the callback says when
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        **vllm,
    )


def prompt_rows(config: Config, prompts: PromptSampler, form: PromptFormat) -> Any:
    """The prompts of all outer steps, in their order, as the rows that TRL reads: text, or a message to its chat template."""
    from datasets import Dataset

    texts = [text for step in range(config.steps) for text in prompts.at(step)]
    plain = PromptFormat(form.tokenizer, False, form.instruction, form.max_tokens)
    written = plain.write(texts)
    if form.chat:
        return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in written])
    ahead = ("", form.tokenizer.bos_token or "")
    for begin in ahead:  # TRL adds only what the tokeniser adds by itself
        if form.tokenizer([begin + written[0]])["input_ids"] == form.encode(texts[:1]):
            return Dataset.from_dict({"prompt": [begin + text for text in written]})
    raise UsageError("The generator's tokeniser does not read its own beginning-of-sequence token.", "")


class Follower:
    """Between TRL and the run: collects what an outer step did, and reports it once its last optimiser step is logged.

    Args:
        config: the settings.
        built: the run.
        report: called with each outer step, on every rank.
    """

    def __init__(self, config: Config, built: Built, report: Callable[[StepReport], None]) -> None:
        self.config, self.built, self.report = config, built, report
        self.per = steps_per_outer(config)
        self.batch: RewardedBatch | None = None
        self.logs: list[Mapping[str, float]] = []
        self.begin = self.rewarding = time.perf_counter()
        self.metagradient = 0.0
        players = built.players
        self.watch = Watch(
            start=metric_before(players.metric, players.target.model),
            dtype=players.target.head.dtype,
            optimizer=built.spec.recipe.optimizer,
            labels=config.credit.mode == "expected",
        )

    def reward(self) -> MetagradientReward:
        """The reward function, which tells this object of every batch."""
        players, spec = self.built.players, self.built.spec
        outer = self

        class Timed(MetagradientReward):
            def __call__(self, *args: Any, **kwargs: Any) -> list[float]:
                outer.rewarding = time.perf_counter()
                rewards = super().__call__(*args, **kwargs)
                outer.metagradient = time.perf_counter() - outer.rewarding
                return rewards

        return Timed(
            players.generator,
            players.target,
            players.metric,
            spec.inner,
            group_size=spec.sampling.group_size,
            attribution=spec.attribution,
            max_length=spec.max_length,
            credit=spec.credit,
            discount=spec.discount,
            on_batch=self._rewarded,
        )

    def _rewarded(self, batch: RewardedBatch) -> None:
        self.batch = batch

    def logged(self, step: int, logs: Mapping[str, Any]) -> bool:
        """Take in what TRL logged after optimiser step `step`, counted from 1; whether that ended an outer step."""
        if self.batch is None or "loss" not in logs:
            return False
        self.logs.append({ours: float(logs[theirs]) for theirs, ours in FROM_TRL.items() if theirs in logs})
        if step % self.per:
            return False
        now, outer, batch = time.perf_counter(), step // self.per - 1, self.batch
        mean = {name: sum(log[name] for log in self.logs) / len(self.logs) for name in self.logs[-1]}
        tokens = int(batch.rollout.mask_N_K.sum())
        numbers = {
            "step": outer,
            **batch.numbers,
            **mean,
            "examples": len(batch.rollout),
            "tokens": tokens,
            "completion_tokens": tokens / len(batch.rollout),
            "seconds": now - self.begin,
            "seconds_rollout": self.rewarding - self.begin,
            "seconds_metagradient": self.metagradient,
            "seconds_policy": now - self.rewarding - self.metagradient,
        }
        numbers = self.built.players.ranks.agreed(numbers)
        self.begin, self.batch, self.logs = now, None, []
        refuse_nonfinite(numbers)
        changed = partial(weights_changed, batch.result.final, self.built.players.target.model)
        warning, fault = self.watch.see(numbers, changed)
        if silent := int(numbers.get("silent_tokens", 0)):
            said = f"{silent:,} of {tokens:,} drawn tokens have no text: their ids only pad the vocabulary."
            warning = f"{warning} {said}".lstrip()
        self.report(StepReport(outer, numbers, batch.result, batch.rollout, warning))
        if fault is not None:
            raise fault
        return True


@contextlib.contextmanager
def fixed_date(tokenizer: Any) -> Iterator[None]:
    """While TRL writes the prompts, the chat template takes the day that ours takes for today."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, str):
        tokenizer.chat_template = dated(own)
    try:
        yield
    finally:
        if isinstance(own, str):
            tokenizer.chat_template = own


def train(
    config: Config,
    built: Built,
    folder: Path,
    report: Callable[[StepReport], None],
    due: Callable[[int], bool],
    over: Callable[[], bool | int],
    earlier: Sequence[Mapping[str, float]] = (),
) -> None:
    """The outer steps that are left, by TRL; the generator of `built` is trained in place, on every rank.

    Args:
        config: the settings.
        built: the run.
        folder: where TRL keeps its checkpoints, for rank 0 to write and all to read.
        report: called after each outer step; what it raises ends the run.
        due: whether a checkpoint is due after so many outer steps; the same on every rank.
        over: whether to stop after the outer step that `due` was last asked of.
        earlier: figures of the outer steps that are done.

    Raises:
        DegenerateError: if the reward or the metric is dead.
    """
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    class CreditTrainer(TokenCredit, GRPOTrainer):
        """TRL's trainer with the loss of our own loop."""

    players, spec = built.players, built.spec
    follower = Follower(config, built, report)
    follower.watch.replay(earlier)
    per = follower.per

    class Told(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            follower.begin = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if follower.logged(state.global_step, logs or {}):  # transformers saves and stops after it has logged
                control.should_save = due(state.global_step // per)
                control.should_training_stop = control.should_training_stop or bool(over())

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            follower.begin = time.perf_counter()

    optimizer = players.policy
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: spec.lr_at(step // per) / spec.lr)
    _, checkpoint = newest_step(folder, config)
    form = spec.sampling.prompts or PromptFormat(players.generator.tokenizer)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between TRL and transformers, nothing of the user's
        kind: Any = GRPOTrainer
        if spec.credit != "sequence":
            kind = partial(
                CreditTrainer,
                sampling=spec.sampling,
                policy_at=lambda step: spec.policy_at(step // per),
                reference=players.reference,
            )
        trainer = kind(
            model=players.generator.model,
            reward_funcs=follower.reward(),
            args=arguments(config, folder, players.ranks, built.device, spec.sampling.silent_ids),
            train_dataset=prompt_rows(config, built.prompts, form),
            processing_class=players.generator.tokenizer,
            optimizers=(optimizer, schedule),
            callbacks=[Told()],
        )
        trainer.remove_callback(PrinterCallback)
        with fixed_date(players.generator.tokenizer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    players.generator.model.eval()
