"""What the generator could have written: the hidden states that completion tokens were drawn from, and its head.

From these the distribution of any token is made anew in chunks, so that the N × K × V table of them never exists. They are
computed once a rollout, without a graph; with a policy that moves the head alone they stay what they are. `drawn` tells of tokens that
somebody else's sampler drew what our own tells of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpg_cli.engine.generator.policy import completion_logits
from dpg_cli.engine.generator.rollout import Sampling, log_pi
from dpg_cli.engine.generator.step.rows import layouts
from dpg_cli.engine.generator.step.sharing import window_of
from dpg_cli.engine.generator.step.spec import PolicySpec, computing
from dpg_cli.engine.inner.head import Head, chunks, find_head
from dpg_cli.engine.inner.target import CPU_TOKENS, fused_activations
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Rollout
from dpg_cli.engine.soft import HeadLabels
from dpg_cli.errors import UsageError


def standard_head(model: nn.Module, name: str = "") -> Head:
    """The generator's LM head.

    Raises:
        UsageError: if its logits are not one linear map of the last hidden state.
    """
    head = find_head(model)
    if head is None:
        raise UsageError(
            f"The generator{f' {name!r}' if name else ''} scales or caps its logits, or has no standard LM head; soft labels "
            "and natural steps need one.",
            "Set inner.labels = 'drawn' and policy.step = 'adamw', or take another generator.",
        )
    return head


def last_hidden(head: Head, rollout: Rollout) -> Tensor:
    """The hidden states that predict the completion tokens of a rollout, (N, K, D), in one pass over prompt and completion."""
    ids = torch.cat([rollout.prompt_ids_N_Q, rollout.ids_N_K], 1)
    mask = torch.cat([rollout.prompt_mask_N_Q, torch.ones_like(rollout.mask_N_K)], 1)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    output = head.base(
        input_ids=ids[:, :-1],
        attention_mask=None if bool(rollout.prompt_mask_N_Q.all()) else mask[:, :-1].long(),
        position_ids=positions[:, :-1],
        use_cache=False,
    )
    return output.last_hidden_state[:, rollout.prompt_ids_N_Q.shape[1] - 1 :]


@torch.no_grad()
def contexts(
    model: nn.Module,
    head: Head,
    rollout: Rollout,
    sampling: Sampling,
    micro_batch: int = 0,
    ranks: Ranks = ALONE,
    share: bool = False,
) -> HeadLabels:
    """The distributions that a rollout's tokens were drawn from.

    Args:
        model: the generator that drew it, unchanged since.
        head: its head.
        rollout: its completions.
        sampling: how they were drawn: temperature, and where a completion cannot end yet.
        micro_batch: completions in memory at once; 0 takes about 4,096 tokens.
        ranks: the processes that share the completions; all get the whole.
        share: a group's prompt may be read once, see `step/rows.py`.
    """
    device, weight = rollout.ids_N_K.device, head.layer.weight.detach()
    width, columns = rollout.ids_N_K.shape[1], rollout.prompt_ids_N_Q.shape[1] + rollout.ids_N_K.shape[1]
    own = torch.arange(len(rollout), device=device)[ranks.shard(len(rollout))]
    training = model.training
    model.eval()
    with fused_activations(model):
        at_once = micro_batch or max(1, CPU_TOKENS // columns)
        if share and len(own):
            hidden = weight.new_zeros(len(own) * width, weight.shape[1])
            spec = PolicySpec(share=True, micro_batch=max(at_once, rollout.group_size))
            for rows in layouts(rollout, own, spec, head, window_of(head)):
                hidden[rows.place_M - own[0] * width] = rows.hidden(head.base)
            hidden = hidden.unflatten(0, (len(own), width))
        else:
            parts = [last_hidden(head, rollout.rows(piece)) for piece in own.split(at_once)]
            hidden = torch.cat(parts) if len(own) else weight.new_zeros(0, width, weight.shape[1])
    model.train(training)
    return HeadLabels(
        hidden_N_K_D=ranks.gather(hidden),
        number_N=torch.arange(len(rollout), device=device),
        weight=weight,
        bias=None if head.layer.bias is None else head.layer.bias.detach(),
        temperature=sampling.temperature,
        width=width,
        ends=torch.tensor(sampling.ends(), device=device),
        barred=sampling.min_tokens - 1,
    )


@torch.no_grad()
def drawn(
    model: nn.Module, head: Head | None, rollout: Rollout, sampling: Sampling, micro_batch: int = 0
) -> tuple[Tensor, Tensor]:
    """What `rollout.sample` tells of the tokens that it draws, of tokens that another sampler drew by the same settings.

    Args:
        model: the generator that drew them, unchanged since.
        head: its head; None where it has no standard one.
        rollout: the completions; its log-probabilities are not looked at.
        sampling: how they were drawn: temperature, ids that never are, where a completion cannot end yet, precision.
        micro_batch: completions in memory at once; 0 for all.

    Returns:
        log π of each token under the distribution that it was drawn from, and that distribution's entropy in nats; (N, K), 0 where
        there is no token.
    """
    kind, training = next(model.parameters()).dtype, model.training
    logprobs = torch.zeros(rollout.ids_N_K.shape, dtype=kind, device=rollout.ids_N_K.device)
    entropy = torch.zeros_like(logprobs)
    model.eval()
    for piece in torch.arange(len(rollout), device=rollout.ids_N_K.device).split(micro_batch or len(rollout)):
        rows = rollout.rows(piece)
        with computing(rollout.ids_N_K.device.type, sampling.precision):
            states = completion_logits(model, rows) if head is None else last_hidden(head, rows)
        row, column = rows.mask_N_K.nonzero(as_tuple=True)
        for part in chunks(len(row), states.shape[-1] if head is None else head.layer.out_features):
            logs = log_pi(states[row[part], column[part]], sampling, column[part], head)
            place = piece[row[part]], column[part]
            logprobs[place] = logs.gather(1, rollout.ids_N_K[place][:, None])[:, 0].to(kind)
            entropy[place] = -torch.linalg.vecdot(logs.exp(), logs.clamp_min(-1e4)).to(kind)
    model.train(training)
    return logprobs, entropy
