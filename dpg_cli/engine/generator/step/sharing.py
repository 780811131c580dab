"""Whether a model reads completions that share a row with their prompt as it reads each after its own: tried, not believed.

What cannot: state that runs along a row (recurrent layers, convolutions), attention that takes no mask of four axes (flash), and
biases by column rather than by position. Windows of attention are no hindrance while a row is within them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpg_cli.engine.generator.step.rows import plain, shared
from dpg_cli.engine.inner.cuts import trying
from dpg_cli.engine.inner.head import Head
from dpg_cli.engine.records import Rollout

MASKED = ("eager", "sdpa")  # attention that adds a mask to its scores
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
PROMPTS, COMPLETIONS = (5, 3), (4, 2, 3, 1, 4, 3)  # tokens of what is tried: two groups of three
CLOSE = 1e-3  # of the largest hidden state; what a model that sees too much or too little differs by is far more


def window_of(head: Head) -> int:
    """Tokens that attention looks back, where some layer has such a limit or a table of that many columns; 0 for none."""
    config: Any = getattr(head.base, "config", None)
    found = [getattr(config, name, None) for name in WINDOWS]
    context = getattr(config, "max_position_embeddings", None)
    if any(buffer.ndim > 1 and buffer.shape[-1] == buffer.shape[-2] == context for buffer in head.base.buffers()):
        found.append(context)
    return min((number for number in found if isinstance(number, int) and number > 0), default=0)


@torch.no_grad()
def obstacle(model: nn.Module, head: Head | None) -> str:
    """Why this model cannot read shared rows, in a few words; nothing where it can.

    Args:
        model: the generator.
        head: its head.
    """
    if head is None:
        return "its logits are not one linear map of its last hidden state"
    kind = getattr(getattr(head.base, "config", None), "_attn_implementation", "eager")
    if kind not in MASKED:
        return f"its attention ({kind}) takes no mask of its own"
    made = _tried(head)
    training = model.training
    model.eval()
    try:
        with trying():
            apart = plain(made, torch.arange(len(made), device=made.ids_N_K.device))
            together = shared(made, [[0, 1, 2], [3, 4, 5]], head.layer.weight.dtype)
            first, second = apart.hidden(head.base), together.hidden(head.base)
    except Exception as error:  # of a model's class: whatever it raises
        return f"it does not take such a row ({type(error).__name__})"
    finally:
        model.train(training)
    order = apart.place_M.argsort(), together.place_M.argsort()
    off = float((first[order[0]] - second[order[1]]).abs().max() / first.abs().max())
    return "" if off < max(CLOSE, 8 * torch.finfo(first.dtype).eps) else f"its hidden states then differ by {off:.0e}"


def _tried(head: Head) -> Rollout:
    """Two groups of three completions with arbitrary tokens."""
    size, device = head.layer.out_features, head.layer.weight.device
    groups = len(COMPLETIONS) // len(PROMPTS)
    long, wide = max(PROMPTS), max(COMPLETIONS)
    prompt = torch.tensor([n for n in PROMPTS for _ in range(groups)], device=device)[:, None]
    completion = torch.tensor(COMPLETIONS, device=device)[:, None]
    column = torch.arange(long, device=device)
    row = torch.arange(len(COMPLETIONS), device=device)[:, None]
    return Rollout(
        prompts=[""] * len(COMPLETIONS),
        prompt_ids_N_Q=(3 * column + 11 * (row // groups) + 1) % size,
        prompt_mask_N_Q=column >= long - prompt,
        ids_N_K=(5 * column[:wide] + 7 * row + 2) % size,
        mask_N_K=column[:wide] < completion,
        logprobs_N_K=torch.zeros(len(COMPLETIONS), wide, device=device),
        group_size=groups,
        entropy=0.0,
    )
