"""The smallest piece of a run that goes through everything its models must be able to do: a few seconds before hours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from dpg_cli.driver.build import Built
from dpg_cli.engine.generator.policy import completion_logits, policy_loss
from dpg_cli.engine.generator.rollout import sample
from dpg_cli.engine.inner.recipe import Batches
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.records import Credit, Examples
from dpg_cli.errors import DpgError, UsageError
from dpg_cli.models.hub import first_line
from dpg_cli.models.loading import LanguageModel

TOKENS = 6  # of each of the two rows
Made = TypeVar("Made")
REMEDY = "Take another model; --debug shows where it stops, which is worth a report."


@dataclass(frozen=True)
class RandomDirection:
    """Φ(θ) = <d, θ> with a random d of unit length: a metric that every weight takes part in.

    Attributes:
        seed: of d.
    """

    seed: int = 0

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ, a scalar."""
        rng = torch.Generator().manual_seed(self.seed)
        total = next(iter(parameters.values())).new_zeros(())
        count = sum(parameter.numel() for parameter in parameters.values())
        for parameter in parameters.values():
            drawn = torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype).to(parameter.device)
            total = total + (drawn * parameter).sum()
        return total / count**0.5

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """None."""
        return {}

    def describe(self) -> str:
        """In words."""
        return "a random direction of the weights"


def try_out(built: Built) -> tuple[str, ...]:
    """Make one prompt's completions and a policy gradient, and a metagradient of two short rows with T = 2: sampling with a
    cache, both backward passes and the second-order one. Models, optimiser and random numbers stay as they are.

    Returns:
        What the engine chose for the target, a sentence each.

    Raises:
        UsageError: naming the model that cannot do it, and where it stopped.
    """
    players = built.players
    with torch.random.fork_rng():
        _guarded(players.generator, "cannot be trained by a policy gradient", lambda: _policy_gradient(built))
        return _guarded(players.target, "cannot be attributed", lambda: _metagradient(built))


def _guarded(model: LanguageModel, fails: str, work: Callable[[], Made]) -> Made:
    """Do some work, and say in one line what a model cannot do."""
    try:
        return work()
    except DpgError:
        raise
    except Exception as error:  # of a model's class: whatever it raises
        raise UsageError(f"The model {model.name!r} {fails}: {first_line(error)}.", REMEDY) from error


def _policy_gradient(built: Built) -> None:
    """Two tokens of one group, and their policy gradient, which is thrown away."""
    players, spec = built.players, built.spec
    generator = players.generator
    sampling = replace(spec.sampling, max_tokens=min(2, spec.sampling.max_tokens), min_tokens=1, group_size=2)
    rng = torch.Generator(built.device).manual_seed(0)
    rollout = sample(generator.model, generator.tokenizer, built.prompts.at(0)[:1], sampling, rng)
    credit = Credit(torch.ones_like(rollout.logprobs_N_K), None, {})
    loss, _ = policy_loss(completion_logits(generator.model, rollout), rollout, credit, spec.policy)
    trained = [parameter for parameter in generator.model.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)


def _metagradient(built: Built) -> tuple[str, ...]:
    """The credits of two short rows, an inner step each; what the engine chose for them."""
    target, spec = built.players.target, built.spec
    length, rows = min(TOKENS, target.context or TOKENS), target.head.shape[0]
    texts = [[(7 * place + row) % rows for place in range(length)] for row in range(2)]
    examples = Examples.from_sequences(texts, pad_id=target.pad_id)
    result = metagradient(
        target.model,
        examples.to(built.device),
        replace(spec.recipe, batches=Batches(1)),
        RandomDirection(),
        labels=spec.credit == "expected",
        second_order=spec.second_order,
    )
    if not bool(torch.isfinite(result.token_N_S).all()):
        raise UsageError(f"The credits of {target.name!r} are not finite.", REMEDY)
    return result.notes
