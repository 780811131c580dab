"""Credit of tokens and of labels in TRL's GRPOTrainer: our policy objective as the loss of the micro-batches that it is given.

TRL samples, shuffles, cuts into micro-batches, accumulates, repeats and steps; its own loss has one advantage for each completion. Here
a generation batch also carries the number of each row among the completions of all processes, from which the advantages of its
tokens and the credits of its labels (in factors where they are large) are found in the reward's last batch; and the loss of a micro-batch is

    -1/B Σ_i Σ_s [ w_is min(ρ A, clip(ρ) A)  +  w_i Σ_y π(y | prefix) τ_is(y)  -  β KL(π ‖ π_start) ]

as in `engine/generator/policy.py`, B the completions of an optimiser step. w are TRL's importance weights where vLLM samples, else 1: one
of a token corrects the drawn token alone, one of a completion its prefixes as well. π is the distribution that is drawn from,
without ids that never are, and so are the log-probabilities that TRL compares with.

The loss is made within the pass of the model that TRL trains, so that DDP sums its gradients. This module imports nothing of TRL.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine.generator.contexts import drawn
from dpg_cli.engine.generator.loss import loss_of
from dpg_cli.engine.generator.rollout import Sampling
from dpg_cli.engine.generator.step.spec import PolicySpec
from dpg_cli.engine.inner.head import find_head
from dpg_cli.engine.records import Credit, Rollout
from dpg_cli.errors import BadValueError
from dpg_cli.integrations.trl import MetagradientReward, RewardedBatch

# settings of TRL's loss that this one has no part of, and their values that ask for nothing
NEUTRAL: dict[str, Any] = {
    "beta": 0.0,
    "delta": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "importance_sampling_level": "token",
    "mask_truncated_completions": False,
}
ABSENT = ("eval_dataset", "tools", "environment_factory")  # what a credit of drawn completions has no meaning for


class TokenCredit:
    """`class Trainer(TokenCredit, GRPOTrainer)`: a GRPOTrainer with `token` or `expected` credit.

    Args:
        reward_funcs: one `MetagradientReward` with such credit.
        sampling: temperature, ids that are never drawn, where a completion cannot end yet: as TRL is told to draw.
        policy_at: settings of the policy step by the number of TRL's optimiser steps before it; clipping range and KL are those, not TRL's.
        reference: the starting generator, where there is a KL; on the same device.
        options: TRL's own; `beta` is 0.

    Raises:
        ValueError: for another reward, or a setting of TRL's loss that this one has no part of.

    Example:
        >>> class Trainer(TokenCredit, GRPOTrainer): ...
        >>> reward = MetagradientReward(generator, target, metric, inner, group_size=8, credit="expected")
        >>> policy, sampling = PolicySpec(clip=0.2), Sampling(8, 64, 1, 1.0, generator.eos_id, generator.pad_id)
        >>> Trainer(
        ...     model=generator.model, reward_funcs=reward, args=arguments, train_dataset=prompts,
        ...     sampling=sampling, policy_at=lambda step: policy,
        ... )  # fmt: skip
    """

    accelerator: Any
    args: Any
    model: Any
    state: Any
    current_gradient_accumulation_steps: int
    _metrics: dict[str, dict[str, list[float]]]
    _credit: Credit | None = None  # of the last generation batch
    _entropy: Tensor

    def __init__(
        self,
        *,
        reward_funcs: MetagradientReward,
        sampling: Sampling,
        policy_at: Callable[[int], PolicySpec],
        reference: nn.Module | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(reward_funcs, MetagradientReward) or reward_funcs.credit == "sequence":
            raise BadValueError("Credit of tokens comes from one MetagradientReward with credit 'token' or 'expected'.")
        for name in [name for name in ABSENT if options.get(name) is not None]:
            raise BadValueError(f"{reward_funcs.credit!r} credit in TRL's trainer has no {name}.", "Leave it out.")
        super().__init__(reward_funcs=reward_funcs, **options)  # type: ignore[call-arg]  # TRL's
        for name, neutral in NEUTRAL.items():
            if getattr(self.args, name, neutral) != neutral:
                raise BadValueError(
                    f"TRL's {name} = {getattr(self.args, name)!r} is no part of the loss of {reward_funcs.credit!r} credit.",
                    f"Leave it at {neutral!r}; the KL is the policy settings' own.",
                )
        self._reward, self._sampling, self._policy_at = reward_funcs, sampling, policy_at
        self._head = find_head(self.model)
        self._start = None if reference is None else (reference, find_head(reference))
        # of the micro-batches of an optimiser step: clipped tokens, Σ KL, Σ entropy, tokens
        self._told: list[Tensor] = []
        take_losses(self.model)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Of the tokens that were drawn, (B, K) each, by the distribution that they were drawn from; without a graph.

        TRL asks for them once a generation batch, where its optimiser steps are several or vLLM samples.
        """
        width = input_ids.shape[1] - logits_to_keep
        rollout = rollout_of(
            input_ids[:, :width], attention_mask[:, :width], input_ids[:, width:], attention_mask[:, width:]
        )
        logprobs, self._entropy = drawn(model, self._head, rollout, self._sampling, batch_size or 0)
        return logprobs, self._entropy, None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's generation batch, with the advantages of tokens, each row's number, and the summed entropy of its tokens."""
        self._credit = self._reward.batch = None  # the last one's factors go before the next inner run
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        batch: RewardedBatch | None = self._reward.batch
        if batch is None:
            raise ValueError("TRL did not ask for the reward of the completions it drew")
        ids, mask = output["completion_ids"], output["completion_mask"]
        if "old_per_token_logps" not in output:
            everything = torch.cat([output["prompt_ids"], ids], 1), torch.cat([output["prompt_mask"], mask], 1)
            size = self.args.per_device_train_batch_size
            output["old_per_token_logps"], *_ = self._get_per_token_logps_and_entropies(
                self.model, *everything, ids.shape[1], size
            )
        self._credit = batch.credit
        output["credit_rows"] = torch.arange(batch.rows.start, batch.rows.stop, device=ids.device)
        output["entropy"] = (self._entropy * mask).sum(1)
        return output

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch; the figures of an optimiser step go to TRL's log, means over the tokens of all processes."""
        ids, mask, old = inputs["completion_ids"], inputs["completion_mask"], inputs["old_per_token_logps"]
        old = old.masked_fill(
            old == -torch.inf, 0.0
        )  # drawn though π never does: its ratio is 0, not that of two zeros
        rollout = rollout_of(inputs["prompt_ids"], inputs["prompt_mask"], ids, mask, old)
        if self._credit is None:
            raise ValueError("there is no credit before a generation batch")
        credit = self._credit.rows(inputs["credit_rows"], ids.shape[1])
        if "importance_sampling_ratio" in inputs:
            credit = credit.weighted(inputs["importance_sampling_ratio"].to(credit.advantage_N_K))
        spec = self._policy_at(self.state.global_step)
        if spec.kl and self._start is None:
            raise ValueError("a KL coefficient needs the starting generator as reference")
        loss, told = model(
            policy_loss=partial(
                loss_of,
                head=self._head,
                rollout=rollout,
                credit=credit,
                spec=spec,
                examples=len(rollout) * self.current_gradient_accumulation_steps,  # DDP takes the mean over processes
                reference=self._start if spec.kl else None,
            )
        )
        self._told.append(torch.cat([told, torch.stack([inputs["entropy"].sum(), mask.sum()]).to(told)]))
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            sums = self.accelerator.reduce(torch.stack(self._told).sum(0), reduction="sum")
            clipped, kl, entropy, tokens = sums.tolist()
            figures = {"clip_ratio/region_mean": clipped, "entropy": entropy} | ({"kl": kl} if spec.kl else {})
            for name, value in figures.items():
                self._metrics["train"][name].append(value / max(1.0, tokens))
            self._told.clear()
        return loss


def rollout_of(
    prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor, logprobs: Tensor | None = None
) -> Rollout:
    """TRL's tensors of B completions as a rollout; the masks are 1 on real tokens."""
    return Rollout(
        prompts=[""] * len(ids),
        prompt_ids_N_Q=prompt_ids,
        prompt_mask_N_Q=prompt_mask.bool(),
        ids_N_K=ids,
        mask_N_K=mask.bool(),
        logprobs_N_K=torch.zeros_like(ids, dtype=torch.float32) if logprobs is None else logprobs,
        group_size=1,
        entropy=0.0,
    )


def take_losses(model: nn.Module) -> None:
    """Let `model(policy_loss=f)` return f(model); any other call stays as it is."""
    own = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self: nn.Module, *args: Any, policy_loss: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if policy_loss is None else policy_loss(self)

    model.forward = types.MethodType(forward, model)
