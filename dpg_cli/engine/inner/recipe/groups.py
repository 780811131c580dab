"""Parameter groups: which parameters decay, which have a rate of their own, and which stay as they are.

Names are those of `model.named_parameters()`; a tied weight has one. Globs are those of a shell, and a star also stands for
dots. A glob that matches nothing is an error: it is a typing mistake, never a wish. Source: DESIGN §7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from dpg_cli.errors import UsageError, suggestion

NORM_NAMES = re.compile(
    r"layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"
)  # what the transformers Trainer goes by
KINDS = ("biases", "norms", "embeddings")
TRAINER = ("biases", "norms")  # what the transformers Trainer leaves out of the decay


@dataclass(frozen=True)
class Group:
    """Parameters that differ from the rest.

    Attributes:
        names: globs of their names.
        lr: their peak learning rate; None takes the optimiser's. The schedule's factors apply to it.
        weight_decay: their λ; None takes what they would have.
        frozen: they are not trained.
    """

    names: tuple[str, ...]
    lr: float | None = None
    weight_decay: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("a group needs at least one glob of parameter names")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"a group's lr must be positive, got {self.lr}; frozen = true leaves its parameters out")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(f"a group's weight_decay must not be negative, got {self.weight_decay}")
        if self.frozen and (self.lr is not None or self.weight_decay is not None):
            raise ValueError("a frozen group has neither lr nor weight_decay")


@dataclass(frozen=True)
class Groups:
    """The groups of a run. Of those that match a parameter, the first decides.

    Attributes:
        own: groups with a rate or decay of their own, or frozen.
        no_decay: what has no weight decay: words of `KINDS`, and globs.
    """

    own: tuple[Group, ...] = ()
    no_decay: tuple[str, ...] = ()

    def group_of(self, name: str) -> Group | None:
        """The group that decides about a parameter, or None."""
        return next((group for group in self.own if any(fnmatchcase(name, glob) for glob in group.names)), None)

    def check(self, model: nn.Module) -> None:
        """See that every glob matches a parameter that it can act on.

        Raises:
            UsageError: naming the first one that does not.
        """
        every = [name for name, _ in model.named_parameters()]
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for globs, names in [(self.no_decay, trained), *((g.names, every if g.frozen else trained) for g in self.own)]:
            for glob in globs:
                if glob not in KINDS and not any(fnmatchcase(name, glob) for name in names):
                    raise UsageError(
                        f"No parameter of the target matches {glob!r}.",
                        suggestion(glob.replace("*", ""), names, "It has"),
                    )

    @contextmanager
    def freezing(self, model: nn.Module) -> Iterator[None]:
        """Within this context the frozen parameters of the model do not ask for gradients.

        Raises:
            UsageError: for a glob that matches nothing, or where nothing is left to train.
        """
        self.check(model)
        closed = []
        for name, parameter in model.named_parameters():
            group = self.group_of(name) if parameter.requires_grad else None
            if group is not None and group.frozen:
                closed.append(parameter)
        try:
            for parameter in closed:
                parameter.requires_grad_(False)
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise UsageError("Every parameter of the target is frozen.", "Leave some to train.")
            yield
        finally:
            for parameter in closed:
                parameter.requires_grad_(True)

    def settings(self, model: nn.Module, lr: float, weight_decay: float) -> dict[str, tuple[float, float]]:
        """Peak learning rate and λ of each trainable parameter, by name.

        Args:
            model: its trainable parameters are looked at.
            lr, weight_decay: the optimiser's.
        """
        bare = undecayed(model, self.no_decay) if self.no_decay else set()
        found = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            group = self.group_of(name) or Group(("*",))
            decay = 0.0 if name in bare else weight_decay
            found[name] = (
                lr if group.lr is None else group.lr,
                decay if group.weight_decay is None else group.weight_decay,
            )
        return found


def undecayed(model: nn.Module, words: tuple[str, ...]) -> set[str]:
    """Names of the parameters that have no weight decay.

    Args:
        model: the target.
        words: of `KINDS`, and globs. "biases" and "norms" are what the transformers Trainer goes by: a name with `bias`
            in it; a parameter of `nn.LayerNorm`, or of a name that says norm. "embeddings" are those of `nn.Embedding`.
    """
    inside: dict[str, set[str]] = {"norms": set(), "embeddings": set()}
    for prefix, module in model.named_modules():
        kind = "norms" if isinstance(module, nn.LayerNorm) else "embeddings" if isinstance(module, nn.Embedding) else ""
        if kind:
            inside[kind] |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    globs = [word for word in words if word not in KINDS]
    return {
        name
        for name, _ in model.named_parameters()
        if ("biases" in words and "bias" in name.lower())
        or ("norms" in words and (name in inside["norms"] or NORM_NAMES.search(name.lower())))
        or ("embeddings" in words and name in inside["embeddings"])
        or any(fnmatchcase(name, glob) for glob in globs)
    }
