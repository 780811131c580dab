"""The policy step's objective as a loss of autograd's, for trainers that go backwards themselves (`policy.py` does for our own loop).

    L = -J / examples        ∂L/∂h, ∂L/∂W, ∂L/∂a from `step/objective.py`, made along with the value and kept until they are asked for

A trainer's accumulation, clipping and sums over processes then see an ordinary graph: the backbone's, with the head's part of the
gradient at its end. Only the hidden states have a graph; logits and credits of labels exist for a chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpg_cli.engine.generator.policy import completion_logits, policy_loss, reference_hidden, reference_log_pi
from dpg_cli.engine.generator.step.objective import objective
from dpg_cli.engine.generator.step.rows import plain
from dpg_cli.engine.generator.step.spec import PolicySpec, computing
from dpg_cli.engine.inner.head import Head
from dpg_cli.engine.records import Credit, Rollout

Into = tuple[Tensor | None, Tensor | None]
Objective = Callable[[Tensor, Into], tuple[Tensor, Tensor]]


class PolicyLoss(torch.autograd.Function):
    """(h (M, D), W, a, objective, examples) -> (-J / examples, (clipped tokens, Σ KL) as float64); only the loss has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden_M_D: Tensor, weight: Tensor, bias: Tensor | None, made: Objective, examples: int
    ) -> tuple[Tensor, Tensor]:
        into = (
            torch.zeros_like(weight) if ctx.needs_input_grad[1] else None,
            torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None,
        )
        found, bar = made(hidden_M_D.to(weight.dtype), into)
        ctx.save_for_backward(bar.to(hidden_M_D.dtype), *into)
        loss, told = (-found[0] / examples).to(weight.dtype), found[1:].clone()
        ctx.mark_non_differentiable(told)
        return loss, told

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bar: Tensor, told: Tensor) -> tuple[Tensor | None, ...]:
        # in place: nobody else holds them, and a second reverse, which would scale them twice, is refused by autograd
        return *(None if saved is None else saved.mul_(bar) for saved in ctx.saved_tensors), None, None


def loss_of(
    model: nn.Module,
    head: Head | None,
    rollout: Rollout,
    credit: Credit,
    spec: PolicySpec,
    examples: int,
    reference: tuple[nn.Module, Head | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of some completions.

    Args:
        model: the generator, within the pass that its trainer makes.
        head: its head; None where it has no standard one: then all logits of these completions exist at once.
        rollout: the completions, with the log-probabilities under which they were drawn.
        credit: of the same rows.
        spec: settings; mini-batches and epochs are the trainer's.
        examples: completions by which it is divided.
        reference: the starting generator and its head, where β > 0; the model itself stands for its base.

    Returns:
        The loss, and (tokens whose ratio was clipped, Σ KL(π ‖ π_start) in nats), float64.
    """
    device = rollout.ids_N_K.device.type
    if head is not None and (reference is None or reference[1] is not None):
        rows, start = plain(rollout, torch.arange(len(rollout), device=rollout.ids_N_K.device)), None
        if reference is not None and reference[1] is not None:
            start = reference[1], reference_hidden(model, reference[0], reference[1], rows, spec)
        with computing(device, spec.precision):
            hidden = rows.hidden(head.base)

        def made(hidden_M_D: Tensor, into: Into) -> tuple[Tensor, Tensor]:
            return objective(head, hidden_M_D, rows.place_M, rollout, credit, spec, examples, into, start)

        with torch.autocast(device, enabled=False):
            return PolicyLoss.apply(hidden, head.layer.weight, head.layer.bias, made, examples)
    logprobs = None if reference is None else reference_log_pi(model, reference[0], rollout, spec)
    with computing(device, spec.precision):
        logits = completion_logits(model, rollout).to(rollout.logprobs_N_K.dtype)
    tokens = int(rollout.mask_N_K.sum())
    with torch.autocast(device, enabled=False):
        loss, stats = policy_loss(logits, rollout, credit, spec, logprobs, None, (examples, tokens))
    told = [stats["clipped"] * tokens, stats.get("kl", 0.0) * tokens]
    return loss, torch.tensor(told, dtype=torch.float64, device=loss.device)
