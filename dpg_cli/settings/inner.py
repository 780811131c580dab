"""The settings of the inner run: the recipe by which the target is fine-tuned, and how its states are kept. Free of torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dpg_cli.settings.faults import cut
from dpg_cli.settings.metric_options import Count, Decay, NonNegative, Positive, PositiveInt, Section
from dpg_cli.settings.optimizers import why_not


class GroupConfig(Section):
    """Parameters of the target that differ from the rest: `[[inner.groups]]`. Of several that match, the first decides."""

    names: tuple[str, ...] = Field((), description="globs of parameter names; each must match one", strict=False)
    lr: Positive | None = Field(None, description="their peak learning rate")
    weight_decay: NonNegative | None = Field(None, description="their weight decay")
    frozen: bool = Field(False, description="they are not trained")

    @model_validator(mode="after")
    def _means_something(self) -> GroupConfig:
        if not self.names:
            raise ValueError("names: a group needs at least one glob of parameter names")
        if self.frozen == (self.lr is not None or self.weight_decay is not None):
            raise ValueError("a group is frozen, or has an lr or a weight_decay of its own")
        return self


class LoraConfig(Section):
    """LoRA: the target's weights stay, adapters beside them are trained. Extra `peft`."""

    rank: Count = Field(0, description="r; 0: all weights are trained")
    alpha: Positive = Field(16.0, description="α: the adapters' change is scaled by α / r")
    modules: tuple[str, ...] = Field(
        ("all-linear",),
        description="linear maps that get adapters, by name or its end; `all-linear`: all but the LM head",
        strict=False,
    )
    rslora: bool = Field(False, description="scale by α / √r")
    save: tuple[str, ...] = Field((), description="modules that are trained whole, such as lm_head", strict=False)

    def in_words(self) -> str:
        """The adapters as anybody could make them."""
        scale = "alpha / sqrt(rank)" if self.rslora else "alpha / rank"
        whole = f", {', '.join(self.save)} trained whole" if self.save else ""
        return f"LoRA of rank {self.rank}, alpha {self.alpha:g} (scale {scale}) on {', '.join(self.modules)}{whole}"


class InnerConfig(Section):
    """The inner run: ordinary supervised fine-tuning of the target on the completions."""

    labels: Literal["drawn", "soft"] = Field(
        "drawn",
        description="soft: each position's loss is its expectation under the generator, contexts as drawn: the mean over "
        "drawn labels without their noise. The dataset and its verification are of drawn tokens always",
    )
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = Field(
        "adamw",
        description="as in torch.optim: adamw and muon decouple the weight decay, adam and sgd add it to the gradient; muon moves "
        "what is no hidden matrix by adamw",
    )
    lr: Positive = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    momentum: Decay = Field(0.0, description="SGD and Muon only")
    nesterov: bool = Field(False, description="SGD and Muon with momentum only: look ahead along it")
    adjust_lr: Literal["original", "match_rms_adamw"] = Field(
        "original", description="Muon only: how the rate of a matrix depends on its shape"
    )
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = Field(5, description="Muon only: Newton-Schulz steps")
    ns_bf16: bool = Field(
        False,
        description="Muon only: round within these steps as torch does, an error of about a hundredth of an update",
    )
    schedule: Literal["constant", "linear", "cosine", "restarts", "polynomial", "inverse-sqrt", "stable-decay"] = Field(
        "constant", description="of the learning rate over an inner run, as `transformers.get_scheduler` has it"
    )
    warmup: NonNegative = Field(
        0.0, description="steps over which the rate rises from 0, or below 1, their share of all steps"
    )
    cycles: NonNegative = Field(0.0, description="waves of `cosine` (0: half a one, down once), or restarts (0: one)")
    power: NonNegative = Field(1.0, description="polynomial only")
    lr_end: NonNegative = Field(1e-7, description="learning rate at the end, polynomial only")
    lr_floor: NonNegative = Field(0.0, description="lowest share of lr, cosine and stable-decay only")
    timescale: Count = Field(0, description="inverse-sqrt only; 0: the warm-up steps, or 10,000 without any")
    decay_steps: Count = Field(0, description="stable-decay only: steps of the final decay")
    decay: Literal["cosine", "linear", "1-sqrt"] = Field("cosine", description="stable-decay only: its form")
    max_grad_norm: NonNegative = Field(0.0, description="gradients are clipped to this global norm; 0: never")
    no_decay: tuple[str, ...] = Field(
        (),
        description="parameters without weight decay: `biases`, `norms` (both: what the transformers Trainer leaves out), "
        "`embeddings`, or globs of names",
        strict=False,
    )
    groups: tuple[GroupConfig, ...] = Field(
        (), description="`[[inner.groups]]` with names, and lr, weight_decay or frozen", strict=False
    )
    batch_size: PositiveInt = Field(256, description="B: examples of a batch")
    accumulation: PositiveInt = Field(
        1, description="batches of an inner step; its loss is normalised over all of them"
    )
    epochs: Positive = Field(1.0, description="passes over the examples")
    max_steps: Count = Field(0, description="inner steps, whatever epochs says; 0: by epochs")
    order: Literal["given", "shuffled"] = Field(
        "given", description="shuffled: anew in each epoch, by the run's seed, as the transformers Trainer does"
    )
    drop_last: bool = Field(False, description="leave out what does not fill a batch at the end of an epoch")
    packed_rows: Count = Field(
        0,
        description="a batch is batch_size rows of at most so many tokens, filled with whole examples as TRL's packing fills "
        "them; 0: it is batch_size examples",
    )
    replay: str = Field(
        "", description="a source of own rows, of which every step takes some besides: trained on, without credit"
    )
    replay_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="their share of each inner step's examples"
    )
    ema: Decay = Field(
        0.0,
        description="the metric reads a running average of the weights over the steps, with this decay; 0: the last ones",
    )
    normalization: Literal["token", "example"] = "token"
    max_length: Count = Field(
        0, description="examples are cut, and for `example` padded, to so many tokens of the target; 0: as they come"
    )
    micro_batch: PositiveInt = Field(256, description="examples in memory at once; changes nothing but memory")
    packing: bool = Field(
        False,
        description="ragged examples of a step share rows, which saves their padding; changes nothing beyond rounding",
    )
    share_prefixes: bool = Field(
        True,
        description="what examples of a step begin with in common, up to the first trained token, is computed once where that is "
        "cheaper; changes nothing beyond rounding. Not by differences, nor with soft labels",
    )
    states: Literal["keep", "sqrt", "offload"] = Field(
        "keep",
        description="the T states of the inner run: all in memory, recomputed from √T checkpoints, or on disk "
        "(from an accelerator: in host memory); changes memory and time, and rounding",
    )
    second_order: Literal["exact", "difference", "one-sided", "auto"] = Field(
        "exact",
        description="difference: second derivatives by differences of ordinary passes, with the target as it runs; an error is "
        "estimated, and more than 5 % refused. one-sided: with half the passes, and about ten times the error. auto: exact where "
        "the target and the memory allow it, else difference",
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="bf16 rounds the operands of the target's linear maps; states and sums stay float32. Refused where "
        "the credits of the first or the last inner step are a quarter off",
    )

    def steps_of_epoch(self, count: int, length: int = 0) -> int:
        """Inner steps of one epoch over `count` examples; in packed rows at most so many, if none is longer than `length`."""
        if self.packed_rows and length:
            count = -(-count // max(1, self.packed_rows // length))  # best fit leaves at most one row emptier than that
        batches = count // self.batch_size if self.drop_last else -(-count // self.batch_size)
        return -(-batches // self.accumulation)

    def steps(self, count: int, length: int = 0) -> int:
        """T: inner steps of a run on `count` examples; see `steps_of_epoch`."""
        return self.max_steps or math.ceil(self.epochs * self.steps_of_epoch(count, length))

    def replayed(self, own: int) -> int:
        """Own rows that join a step with so many completions."""
        share = self.replay_share
        return max(1, round(own * share / (1 - share))) if share else 0

    def in_words(self, steps: int) -> str:
        """The recipe as anybody could repeat it, without the steps' examples.

        Args:
            steps: T.
        """
        momentum = f"{'Nesterov ' if self.nesterov else ''}momentum {self.momentum:g}"
        adam = f"beta ({self.beta1:g}, {self.beta2:g}), eps {self.eps:g}, eps_root {self.eps_root:g}"
        rest = {
            "sgd": momentum,
            "muon": f"{momentum}, {self.ns_steps} Newton-Schulz steps, rate {self.adjust_lr} (else adamw: {adam})",
        }.get(self.optimizer, adam)
        shape = "" if self.schedule == "constant" else f", schedule {self.schedule}"
        if self.warmup:
            shape += (
                f" after {self.warmup:g} warm-up steps" if self.warmup >= 1 else f" after {self.warmup:.0%} warm-up"
            )
        words = [f"{self.optimizer}, learning rate {self.lr:g}{shape}", rest, f"weight decay {self.weight_decay:g}"]
        if self.no_decay:
            words.append(f"none on {', '.join(self.no_decay)}")
        words += [f"gradients clipped to norm {self.max_grad_norm:g}"] if self.max_grad_norm else []
        for group in self.groups:
            own = (
                "frozen"
                if group.frozen
                else ", ".join(
                    f"{name} {value:g}"
                    for name, value in (("lr", group.lr), ("decay", group.weight_decay))
                    if value is not None
                )
            )
            words.append(f"{' '.join(group.names)}: {own}")
        order = "in order" if self.order == "given" else "in a shuffled order"
        passes = "each used once" if self.epochs == 1 else f"{self.epochs:g} epochs"
        passes = "as often as that takes" if self.max_steps else passes
        counted = f"{steps} optimiser step{'s' if steps > 1 else ''}"
        besides = (
            f"; {self.replay_share:.0%} of each step's rows are of {Path(self.replay).name}" if self.replay else ""
        )
        besides += f"; read at the running average of the weights, decay {self.ema:g}" if self.ema else ""
        return f"{', '.join(words)}; {counted} over all rows {order}, {passes}{besides}"

    @field_validator("optimizer", mode="before")
    @classmethod
    def _has_a_derivative(cls, value: Any) -> Any:
        why = why_not(value) if isinstance(value, str) else ""
        if why:
            raise ValueError(f"{cut(value)} cannot be differentiated: {why}; take adamw, adam, sgd or muon")
        return value

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> InnerConfig:
        if self.nesterov and not (self.optimizer in ("sgd", "muon") and self.momentum > 0):
            raise ValueError(
                "nesterov looks ahead along a momentum; set optimizer = 'sgd' or 'muon', and a momentum above 0"
            )
        return self

    @model_validator(mode="after")
    def _replay_is_whole(self) -> InnerConfig:
        if bool(self.replay) != bool(self.replay_share):
            raise ValueError(
                "replay_share: replay needs a source and its share of each step; set both, inner.replay and inner.replay_share"
            )
        if self.replay and self.packed_rows:
            raise ValueError("packed_rows: a step of packed rows has no share for replay; set one of the two")
        return self

    @model_validator(mode="after")
    def _differences_are_float32(self) -> InnerConfig:
        if self.second_order in ("difference", "one-sided") and self.precision != "float32":
            raise ValueError(
                "second_order: differences need precision = 'float32'; bf16 rounds away what they are made of"
            )
        return self

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> InnerConfig:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup: {self.warmup:g} is neither a whole number of steps nor a share below 1")
        if self.schedule == "stable-decay" and not self.decay_steps:
            raise ValueError("decay_steps: schedule = 'stable-decay' needs the number of steps of its decay")
        if self.schedule == "polynomial" and not self.lr > self.lr_end:
            raise ValueError(f"lr_end: a polynomial schedule ends below lr ({self.lr:g}), not at {self.lr_end:g}")
        if self.lr_floor > 1:
            raise ValueError(f"lr_floor: {self.lr_floor:g} is more than the whole rate")
        return self
