"""The metagradient as a reward function of TRL's GRPOTrainer.

A reward of one completion depends on all the others that the target is fine-tuned on. So every call gathers the
completions of all processes, makes one inner run that they share (rows sharded as everywhere, `engine/ranks.py`), and
returns each process the rewards of its own. TRL calls it once for each generation batch, which is an outer step.

TRL divides a group's rewards by their standard deviation plus 1e-4, an absolute number, and metagradients may be 1e-9: left as
they are, all advantages would vanish. They are centred and divided by their spread over the whole batch, which leaves
the advantages of a group as they would be without that number, but for one part in ten thousand at an ordinary spread.

TRL's own loss knows one reward for each completion, `sequence` credit. For the others the reward also keeps the credit of tokens, which
`integrations/trl_credit.py` has a loss for.

This module imports nothing of TRL: the protocol is a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dpg_cli.engine.attribution import AttributionSpec, InnerSettings, attribute_examples
from dpg_cli.engine.detect import refuse_dead_reward
from dpg_cli.engine.generator.align import read_completions
from dpg_cli.engine.generator.credit import MODES, assign, form_of_labels, statistics
from dpg_cli.engine.ranks import Ranks
from dpg_cli.engine.records import Credit, Metagradient, Rollout
from dpg_cli.errors import BadValueError
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.models.loading import LanguageModel, same_tokenizer

METHODS = ("metagradient", "sgd")  # those whose rewards may be compared within a group


@dataclass(frozen=True)
class RewardedBatch:
    """What a call of the reward found, on every rank.

    Attributes:
        rollout: the completions of all ranks, without their prompts.
        result: Φ and τ.
        numbers: figures for a log.
        rows: of this rank.
        credit: of all completions' tokens, where it is not `sequence`.
    """

    rollout: Rollout
    result: Metagradient
    numbers: dict[str, float]
    rows: slice
    credit: Credit | None = None


class MetagradientReward:
    """∂Φ/∂w of each completion, as a reward function `GRPOTrainer(reward_funcs=...)` takes.

    Args:
        generator: whose tokens the completions are; only its tokeniser and vocabulary are looked at.
        target: the target θ_0, on the device where it is to be fine-tuned; left unchanged.
        metric: Φ.
        inner: optimiser and batches of the inner run.
        group_size: G, TRL's `num_generations`.
        attribution: metagradient through the inner run, or through SGD.
        max_length: see `read_completions`.
        credit: "sequence"; or "token" or "expected" for a trainer with `trl_credit.TokenCredit`.
        discount: γ of these two.
        on_batch: told of every batch, on every rank.

    Attributes:
        batch: the last one; None before the first.

    Raises:
        ValueError: for an attribution without a reward for each completion, and for `expected` credit between two tokenisers.

    Example:
        >>> generator, target = load("my/generator", device=gpu), load("my/target", device=gpu)
        >>> reward = MetagradientReward(generator, target, metric, InnerSettings(OptimizerSpec(lr=1e-5), 256), group_size=8)
        >>> GRPOTrainer(generator.model, reward, args=GRPOConfig(num_generations=8, ...), train_dataset=prompts)
    """

    __name__ = "metagradient"  # TRL's name for it in logs

    def __init__(
        self,
        generator: LanguageModel,
        target: LanguageModel,
        metric: TargetMetric,
        inner: InnerSettings,
        *,
        group_size: int,
        attribution: AttributionSpec | None = None,
        max_length: int = 0,
        credit: str = "sequence",
        discount: float = 1.0,
        on_batch: Callable[[RewardedBatch], None] = lambda batch: None,
    ) -> None:
        self.generator, self.target, self.metric, self.inner = generator, target, metric, inner
        self.group_size, self.max_length, self.on_batch = group_size, max_length, on_batch
        self.attribution = attribution or AttributionSpec()
        if self.attribution.method not in METHODS:
            raise ValueError(f"attribution {self.attribution.method!r} has no reward to compare within a group")
        self.credit, self.discount = credit, discount
        self.batch: RewardedBatch | None = None
        if credit not in MODES:
            raise BadValueError(f"There is no credit {credit!r}.", f"Give one of {', '.join(MODES)}.")
        if credit == "expected" and not same_tokenizer(generator, target):
            raise BadValueError(
                f"The generator {generator.name!r} and the target {target.name!r} have different tokenisers, "
                "and 'expected' credit needs one.",
                "Give credit='token', or take two models of one family.",
            )

    def __call__(
        self,
        prompts: Sequence[Any] = (),
        completions: Sequence[Any] = (),
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """The rewards of this process's completions, of mean 0 and spread 1 over those of all processes.

        Args:
            prompts: not looked at: the target reads completions alone.
            completions: texts or messages; looked at only where there are no ids.
            completion_ids: token ids of each, an end token included where it ended by one.
            log_metric, log_extra: TRL's hooks for figures and for columns of its table of completions.
            columns: whatever else TRL passes; not looked at.

        Raises:
            DegenerateError: if anything becomes non-finite, or all rewards are zero.
        """
        device = self.target.head.device
        ranks = Ranks.joined(device)
        own = completion_ids if completion_ids is not None else self._encoded(completions)
        rollout, rows = self._gathered(own, ranks)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            batch = self.batch = self._rewarded(rollout, rows, ranks)
        reward_N = batch.result.example_N
        if log_metric is not None:
            for name, value in batch.numbers.items():
                log_metric(name, value)
        if log_extra is not None:
            log_extra("metagradient", reward_N[rows].tolist())
        self.on_batch(batch)
        return unit_spread(reward_N)[rows].tolist()

    def _rewarded(self, rollout: Rollout, rows: slice, ranks: Ranks) -> RewardedBatch:
        """The inner run on all completions."""
        reading = read_completions(rollout, self.generator, self.target, self.max_length)
        labels: bool | Literal["factors"] = False
        if self.credit == "expected":
            vocabulary, width = self.target.head.shape
            steps = len(self.inner.recipe.plan(reading.examples))
            labels = form_of_labels(reading.examples.ids_N_S.numel(), vocabulary, width, steps)
        result = attribute_examples(
            self.target.model,
            reading.examples,
            self.metric,
            self.attribution,
            replace(self.inner, ranks=ranks),
            group_size=self.group_size,
            labels=labels,
        )
        refuse_dead_reward(result)
        credit = None
        if self.credit != "sequence":
            token_N_K, label_N_K_V = reading.to_completions(result)
            mask_N_K, groups = rollout.mask_N_K, self.group_size
            credit = assign(self.credit, token_N_K, label_N_K_V, mask_N_K, groups, discount=self.discount)
        numbers = {
            "phi": result.value,
            **result.measures,
            **result.stats,
            **statistics(result.example_N, self.group_size),
            "same_completions": rollout.same_completions,
            "gradient_median": result.gradient_median,
        }
        if silent := self.generator.silent_ids:  # which a sampler of somebody else's may draw
            drawn = rollout.ids_N_K[rollout.mask_N_K]
            numbers["silent_tokens"] = float(torch.isin(drawn, torch.tensor(silent, device=drawn.device)).sum())
        return RewardedBatch(rollout, result, ranks.agreed(numbers), rows, credit)

    def _encoded(self, completions: Sequence[Any]) -> list[list[int]]:
        """Token ids of texts, or of the text of messages, by the generator's tokeniser."""
        texts = [
            text if isinstance(text, str) else "".join(str(message["content"]) for message in text)
            for text in completions
        ]
        return self.generator.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _gathered(self, own: Sequence[Sequence[int]], ranks: Ranks) -> tuple[Rollout, slice]:
        """The completions of all ranks in their order, as TRL gathers rewards, and which rows are this rank's."""
        longest = max((len(row) for row in own), default=1) or 1
        ids = torch.full((len(own), longest), self.generator.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(own), longest, dtype=torch.bool)
        for number, row in enumerate(own):
            ids[number, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
            mask[number, : len(row)] = True
        counts = ranks.gather(torch.tensor([len(own)])).tolist()
        begin = sum(counts[: ranks.rank])
        device = self.target.head.device
        ids, mask = ranks.gather(ids, self.generator.pad_id).to(device), ranks.gather(mask).to(device)
        rollout = Rollout(
            prompts=[""] * len(ids),
            prompt_ids_N_Q=ids[:, :0],
            prompt_mask_N_Q=mask[:, :0],
            ids_N_K=ids,
            mask_N_K=mask,
            logprobs_N_K=torch.zeros_like(ids, dtype=self.target.head.dtype),
            group_size=self.group_size,
            entropy=0.0,
        )
        return rollout, slice(begin, begin + len(own))


def unit_spread(reward_N: Tensor) -> Tensor:
    """Rewards of any size with their mean taken away and divided by their standard deviation, float64; zeros without spread."""
    centred = reward_N.double() - reward_N.double().mean()
    peak = centred.abs().max()
    if not peak > 0:
        return torch.zeros_like(centred)
    centred = centred / peak  # squares of 1e-170 would vanish
    return centred / centred.square().mean().sqrt()
