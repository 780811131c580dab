"""How completions are laid out for a pass over the generator's backbone: each after its own prompt, or a group after one prompt.

    plain    prompt | completion                                one row a completion, prompts padded on the left
    shared   prompt | completion | completion | ...             the prompt once; no pads inside

In a shared row a completion's tokens have the positions that follow the prompt's, and see the prompt and their own completion
alone: a mask of four axes says so, which any attention takes that adds a mask to its scores. The prompt's part of a forward and
of a backward pass is then computed once. A completion's last token predicts nothing and is left out.

Sharing lengthens rows, and attention grows with their square; `members` finds how many completions a row should have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine.generator.step.spec import PolicySpec
from dpg_cli.engine.inner.head import Head
from dpg_cli.engine.inner.prefixes import Shape
from dpg_cli.engine.records import Rollout

WORTH = 0.9  # share of the operations of plain rows, above which rows stay plain


@dataclass(frozen=True)
class Rows:
    """Some completions of a rollout, as a causal model reads them; M of their tokens are predicted.

    Attributes:
        ids_R_L: token ids, int64.
        position_R_L: their positions, int64.
        attention: (R, L) int64, 1 on real tokens; (R, 1, L, L), what is added to attention scores; or None where all is real.
        before_M: places of the flat (R · L) axis whose hidden states predict the tokens.
        place_M: where these tokens stand on the flat (N · K) axis of the rollout.
    """

    ids_R_L: Tensor
    position_R_L: Tensor
    attention: Tensor | None
    before_M: Tensor
    place_M: Tensor

    def hidden(self, base: nn.Module) -> Tensor:
        """The hidden states that predict the tokens, (M, D), in one pass over the backbone."""
        output: Any = base(
            input_ids=self.ids_R_L, attention_mask=self.attention, position_ids=self.position_R_L, use_cache=False
        )
        return output.last_hidden_state.flatten(0, 1).index_select(0, self.before_M)


def members(shape: Shape, prompt: int, completion: int, group: int) -> int:
    """Completions of a group that should share a row; 1 where plain rows are about as cheap.

    Args:
        shape: of the backbone.
        prompt, completion: tokens of each.
        group: completions of a prompt that are at hand.
    """
    length = prompt + completion - 1
    plain = shape.cost(group * length, group * length * length / 2)  # a causal kernel skips what it does not see
    best, fewest = 1, WORTH * plain
    for count in range(2, group + 1):
        rows, long = -(-group // count), prompt + count * (completion - 1)
        tokens = rows * prompt + group * (completion - 1)
        cost = shape.cost(tokens, rows * long * long)
        if cost < fewest:
            best, fewest = count, cost
    return best


def layouts(rollout: Rollout, own: Tensor, spec: PolicySpec, head: Head, window: int = 0) -> Iterator[Rows]:
    """Some rows of a rollout in micro-batches.

    Args:
        rollout: of N rows.
        own: their numbers, int64; at least one.
        spec: sharing, and what may be in memory at once.
        head: of the model that will read them.
        window: the longest row that attention sees whole, where it has such a limit; 0 for none.
    """
    count = 1
    longest = int(rollout.mask_N_K.sum(1).max()), int(rollout.prompt_mask_N_Q.sum(1).max())
    if spec.share and rollout.group_size > 1:
        together = int(torch.bincount(torch.div(own, rollout.group_size, rounding_mode="floor")).max())
        most = min(together, spec.micro_batch or together)
        if window:
            most = min(most, (window - longest[1]) // max(1, longest[0] - 1))
        count = members(Shape.of(head), longest[1], longest[0], most) if most > 1 else 1
    if count == 1 and not spec.micro_batch_tokens:
        for piece in own.split(spec.micro_batch or len(own)):
            yield plain(rollout, piece)
        return
    if count == 1:
        lengths = (rollout.prompt_mask_N_Q.sum(1) + rollout.mask_N_K.sum(1) - 1)[own].tolist()
        numbers = own.tolist()
        single = [[number] for number in numbers]
        for part in by_length(lengths, spec.micro_batch, spec.micro_batch_tokens):
            yield plain(rollout, torch.tensor([single[place][0] for place in part], device=own.device))
        return
    rows = together_in_rows(own.tolist(), rollout.group_size, count)
    prompt, completion = rollout.prompt_mask_N_Q.sum(1).tolist(), rollout.mask_N_K.sum(1).tolist()
    lengths = [prompt[row[0]] + sum(completion[number] - 1 for number in row) for row in rows]
    dtype = head.layer.weight.dtype
    for part in by_length(
        lengths, max(1, spec.micro_batch // count) if spec.micro_batch else 0, spec.micro_batch_tokens
    ):
        yield shared(rollout, [rows[place] for place in part], dtype)


def by_length(lengths: list[int], most: int, tokens: int) -> list[list[int]]:
    """Which rows are in memory together: sorted by length where tokens are limited, at most `most` of them (0: any number).

    Args:
        lengths: of the rows.
        most: rows.
        tokens: of a piece, each row counted with the longest one's; 0 for any number.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row]) if tokens else list(range(len(lengths)))
    found: list[list[int]] = [[]]
    for row in order:
        piece = found[-1]
        full = bool(most) and len(piece) == most
        full |= bool(tokens) and (len(piece) + 1) * lengths[row] > tokens  # they come with growing length
        if piece and full:
            found.append([])
        found[-1].append(row)
    return found


def together_in_rows(own: list[int], group_size: int, count: int) -> list[list[int]]:
    """Completions of the same prompt, at most `count` a row and about as many in each."""
    groups: dict[int, list[int]] = {}
    for number in own:
        groups.setdefault(number // group_size, []).append(number)
    found = []
    for numbers in groups.values():
        rows = -(-len(numbers) // count)
        size = -(-len(numbers) // rows)
        found += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return found


def plain(rollout: Rollout, own: Tensor) -> Rows:
    """A row for each completion, prompts padded on the left; columns without a real token are left out."""
    mask = rollout.mask_N_K[own]
    width, first = int(mask.sum(1).max()), int(rollout.prompt_mask_N_Q[own].long().argmax(1).min())
    prompt_mask = rollout.prompt_mask_N_Q[own, first:]
    ids = torch.cat([rollout.prompt_ids_N_Q[own, first:], rollout.ids_N_K[own, : width - 1]], 1)
    real = torch.cat([prompt_mask, torch.ones_like(mask[:, : width - 1])], 1)
    row, column = mask.nonzero(as_tuple=True)
    return Rows(
        ids_R_L=ids,
        position_R_L=(real.long().cumsum(1) - 1).clamp_min(0),
        attention=None if bool(prompt_mask.all()) else real.long(),
        before_M=row * ids.shape[1] + prompt_mask.shape[1] - 1 + column,
        place_M=own[row] * rollout.ids_N_K.shape[1] + column,
    )


def shared(rollout: Rollout, rows: list[list[int]], dtype: torch.dtype) -> Rows:
    """A row for each list of completions of one prompt.

    Args:
        rollout: of N rows.
        rows: their numbers, row by row; no completion is empty.
        dtype: of the mask.
    """
    device = rollout.ids_N_K.device
    own = torch.tensor([number for row in rows for number in row], device=device)
    firsts = torch.tensor([row[0] for row in rows], device=device)
    counts = torch.tensor([len(row) for row in rows], device=device)
    row_C = torch.repeat_interleave(torch.arange(len(rows), device=device), counts)
    mask_C_K = rollout.mask_N_K[own]
    prompts_R, embedded_C = rollout.prompt_mask_N_Q[firsts].sum(1), mask_C_K.sum(1) - 1
    ahead = embedded_C.cumsum(0) - embedded_C  # of each completion, over all rows
    begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    start_C = prompts_R[row_C] + ahead - ahead[begin][row_C]
    length = int((prompts_R + torch.zeros_like(prompts_R).index_add_(0, row_C, embedded_C)).max())

    ids = torch.zeros(len(rows), length, dtype=torch.int64, device=device)
    position, segment = torch.zeros_like(ids), torch.full_like(ids, -1)
    row, source = rollout.prompt_mask_N_Q[firsts].nonzero(as_tuple=True)
    place = (rollout.prompt_mask_N_Q[firsts].long().cumsum(1) - 1)[row, source]
    ids[row, place] = rollout.prompt_ids_N_Q[firsts[row], source]
    position[row, place], segment[row, place] = place, 0

    column = torch.arange(mask_C_K.shape[1], device=device)
    read = column < embedded_C[:, None]
    which, source = read.nonzero(as_tuple=True)
    row, place = row_C[which], start_C[which] + source
    ids[row, place] = rollout.ids_N_K[own[which], source]
    position[row, place], segment[row, place] = prompts_R[row] + source, which + 1

    which, source = mask_C_K.nonzero(as_tuple=True)
    row = row_C[which]
    before = torch.where(source == 0, prompts_R[row] - 1, start_C[which] + source - 1)
    return Rows(
        ids_R_L=ids,
        position_R_L=position,
        attention=block_mask(segment, dtype),
        before_M=row * length + before,
        place_M=own[which] * rollout.ids_N_K.shape[1] + source,
    )


def block_mask(segment_R_L: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, (R, 1, L, L): 0 where a token sees another, the least number where it does not.

    Args:
        segment_R_L: 0 for the prompt, which all that follows it sees; other numbers for completions; -1 for padding, which only
            sees itself.
    """
    keys, queries = segment_R_L[:, None, :], segment_R_L[:, :, None]
    column = torch.arange(segment_R_L.shape[1], device=segment_R_L.device)
    seen = ((keys == 0) | (keys == queries)) & (column[None, None] <= column[None, :, None])
    seen &= (queries >= 0) | (column[None, None] == column[None, :, None])
    unseen = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return unseen.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
