"""Sampling completions from the generator: batched, with a key-value cache, log-probabilities recorded.

A group shares its prompt, so the prompt is read once and its cache repeated G times.

One process draws from its device's own stream of random numbers. Processes that share a run take prompts each, and all
draw one table of uniforms, (N, K), which they invert the distribution with: a completion is then the same whatever the
number of processes and the batch that it is sampled in (but where rounding decides). `Sampling.portable` does so alone, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dpg_cli.data.chat import PromptFormat
from dpg_cli.engine.generator.step.spec import Compute, computing
from dpg_cli.engine.inner.head import Head, chunks, find_head
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Rollout
from dpg_cli.errors import DegenerateError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Attributes:
        group_size: G, completions a prompt.
        max_tokens: longest completion, end-of-sequence included.
        min_tokens: the end-of-sequence token cannot be drawn before this many tokens.
        temperature: divides the logits.
        eos_id, pad_id: of the generator's tokeniser.
        batch_size: completions sampled at once; a whole group at the least.
        end_ids: further tokens that end a completion, such as an instruct model's end of turn.
        prompts: how a prompt becomes token ids; None tokenises its text as it is.
        portable: draw by the table of uniforms also where one process samples alone.
        silent_ids: ids without a token in the tokeniser (padding of the vocabulary), which are never drawn.
        precision: "bf16": the generator's passes compute in bf16; probabilities do not.
    """

    group_size: int
    max_tokens: int
    min_tokens: int
    temperature: float
    eos_id: int
    pad_id: int
    batch_size: int = 1024
    end_ids: tuple[int, ...] = ()
    prompts: PromptFormat | None = None
    portable: bool = False
    silent_ids: tuple[int, ...] = ()
    precision: Compute = "float32"

    def ends(self) -> list[int]:
        """Every token that ends a completion."""
        return list(dict.fromkeys((self.eos_id, *self.end_ids)))


def encode_prompts(
    tokenizer: Any, prompts: list[str], pad_id: int, form: PromptFormat | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids of the prompts, left-padded; `form` says how a prompt becomes ids, None takes its text as it is.

    Returns:
        Ids (P, Q), int64, and their mask, bool.
    """
    rows = (form or PromptFormat(tokenizer)).encode(prompts)
    longest = max(len(row) for row in rows)
    if min(len(row) for row in rows) == 0:
        raise UsageError(
            "A prompt is empty, and the generator's tokeniser has no beginning-of-sequence token.",
            "Take other prompts.",
        )
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], dtype=torch.int64)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[str],
    sampling: Sampling,
    rng: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    table_rng: torch.Generator | None = None,
) -> Rollout:
    """Sample G completions for each prompt.

    Args:
        model: the generator.
        tokenizer: its tokeniser.
        prompts: P texts.
        sampling: settings.
        rng: source of randomness, on the model's device; the same on every rank.
        progress: called as progress(completions done, of how many) after each batch.
        ranks: the processes that share the prompts; all get the whole rollout.
        table_rng: of `table_source`, for one table of uniforms over several calls; None draws a table of its own. Not used
            where no table is.

    Returns:
        The rollout of N = P · G rows, group by group.

    Raises:
        DegenerateError: if the generator gives no finite probabilities.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    groups, share = sampling.group_size, ranks.shard(len(prompts))
    own = prompts[share]
    table = None
    if sampling.portable or ranks.world > 1:
        table = uniforms(table_rng or table_source(rng), len(prompts) * groups, sampling.max_tokens)
        table = table[share.start * groups : share.stop * groups]
    per_batch, head = max(1, sampling.batch_size // groups), find_head(model)
    parts = [_nothing(model)] if not own else []
    for start in range(0, len(own), per_batch):
        ids, mask = encode_prompts(tokenizer, own[start : start + per_batch], sampling.pad_id, sampling.prompts)
        rows = slice(start * groups, (start + per_batch) * groups)
        draw = partial(from_stream, rng) if table is None else partial(from_uniforms, table[rows].to(device))
        parts.append((ids, mask, *_sample_batch(model, ids.to(device), mask.to(device), sampling, draw, head)))
        if progress is not None:
            progress(min(start + per_batch, len(own)) * groups, len(own) * groups)
    model.train(training)

    longest_prompt = max(ids.shape[1] for ids, *_ in parts)
    longest = max(tokens.shape[1] for _, _, tokens, *_ in parts)

    def right(tensor: Tensor, fill: float) -> Tensor:
        return nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=fill)

    def left(tensor: Tensor, fill: float) -> Tensor:
        padded = nn.functional.pad(tensor, (longest_prompt - tensor.shape[1], 0), value=fill)
        return padded.to(device).repeat_interleave(groups, 0)

    def gather_left(tensor: Tensor, fill: float) -> Tensor:
        return ranks.gather(tensor.flip(1), fill).flip(1) if ranks.world > 1 else tensor

    mask_N_K = ranks.gather(torch.cat([right(mask, False) for *_, mask, _, _ in parts]))
    entropy = ranks.total(sum(float(total) for *_, total in parts)) / max(1, int(mask_N_K.sum()))
    return Rollout(
        prompts=[prompt for prompt in prompts for _ in range(groups)],
        prompt_ids_N_Q=gather_left(torch.cat([left(ids, sampling.pad_id) for ids, *_ in parts]), sampling.pad_id),
        prompt_mask_N_Q=gather_left(torch.cat([left(mask, False) for _, mask, *_ in parts]), False),
        ids_N_K=ranks.gather(
            torch.cat([right(tokens, sampling.pad_id) for _, _, tokens, *_ in parts]), sampling.pad_id
        ),
        mask_N_K=mask_N_K,
        logprobs_N_K=ranks.gather(torch.cat([right(logprobs, 0.0) for *_, logprobs, _ in parts])),
        group_size=groups,
        entropy=entropy,
    )


def _nothing(model: nn.Module) -> tuple[Tensor, ...]:
    """The parts of a batch without prompts: what a rank has that got none."""
    parameter = next(model.parameters())
    ids = torch.zeros(0, 1, dtype=torch.int64)
    tokens = ids.to(parameter.device)
    return ids, ids.bool(), tokens, tokens.bool(), tokens.to(parameter.dtype), parameter.new_zeros(())


def table_source(rng: torch.Generator) -> torch.Generator:
    """What a table of uniforms is drawn from, on the CPU: one number of `rng` is its seed."""
    seed = int(torch.randint(2**62, (1,), generator=rng, device=rng.device))
    return torch.Generator().manual_seed(seed)


def uniforms(source: torch.Generator, rows: int, columns: int) -> Tensor:
    """A table of uniforms in [0, 1), (rows, columns), float64: the next rows of what `source` gives."""
    return torch.rand(rows, columns, dtype=torch.float64, generator=source)


def from_stream(rng: torch.Generator, step: int, rows: slice, pi: Tensor) -> Tensor:
    """A token of each row of probabilities, (n, 1), by the device's own stream."""
    return torch.multinomial(pi, 1, generator=rng)


def from_uniforms(table_N_K: Tensor, step: int, rows: slice, pi: Tensor) -> Tensor:
    """A token of each row of probabilities, (n, 1): where the distribution function passes the uniform of this step."""
    cumulated = pi.cumsum(1, dtype=torch.float64)
    total = cumulated[:, -1:]
    place = torch.minimum(table_N_K[rows, step : step + 1] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, place, right=True)  # the first that passes it has a probability above 0


def _sample_batch(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    draw: Callable[[int, slice, Tensor], Tensor],
    head: Head | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, mask and log-probabilities of one batch, each (P·G, K), and the summed entropy of its real tokens.

    With a standard LM head only the logits of some rows exist at a time.
    """
    groups = sampling.group_size
    cache = DynamicCache(config=model.config)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    padded = not bool(mask.all())

    def read(tokens: Tensor, attention: Tensor | None, places: Tensor) -> Tensor:
        """The last hidden state of each row, or its logits."""
        called = model if head is None else head.base
        last = {"logits_to_keep": 1} if head is None else {}
        with computing(tokens.device.type, sampling.precision):
            output = called(
                input_ids=tokens,
                attention_mask=attention,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                **last,
            )
        return (output.logits if head is None else output.last_hidden_state)[:, -1]

    states = read(ids, mask.long() if padded else None, positions).repeat_interleave(groups, 0)
    cache.batch_repeat_interleave(groups)
    full_mask = mask.long().repeat_interleave(groups, 0)
    position = positions[:, -1:].repeat_interleave(groups, 0)
    alive = torch.ones(len(states), dtype=torch.bool, device=ids.device)
    ends = torch.tensor(sampling.ends(), device=ids.device)
    tokens, masks, logprobs = [], [], []
    kind = next(model.parameters()).dtype
    entropy = torch.zeros((), dtype=kind, device=ids.device)
    for step in range(sampling.max_tokens):
        token, chosen = torch.empty_like(position), states.new_empty(len(states), dtype=kind)
        size = states.shape[1] if head is None else head.layer.out_features
        for rows in chunks(len(states), size):
            logs = log_pi(states[rows], sampling, step, head)
            if bool(logs[:, 0].isnan().any()):  # one bad logit makes its whole row nan
                raise DegenerateError(
                    "The generator's probabilities are not finite: its training diverged.", "Lower policy.lr."
                )
            pi = logs.exp()
            token[rows] = draw(step, rows, pi)
            chosen[rows] = logs.gather(1, token[rows])[:, 0]
            entropy -= (pi * logs.clamp_min_(-1e4)).sum(1)[alive[rows]].sum()
        tokens.append(torch.where(alive, token[:, 0], sampling.pad_id))
        masks.append(alive)
        logprobs.append(torch.where(alive, chosen, 0.0))
        alive = alive & ~torch.isin(token[:, 0], ends)
        if step + 1 == sampling.max_tokens or not alive.any():
            break
        full_mask = nn.functional.pad(full_mask, (0, 1), value=1)
        position = position + 1
        states = read(token, full_mask if padded else None, position)
    return torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logprobs, 1), entropy


def log_pi(states: Tensor, sampling: Sampling, step: int | Tensor, head: Head | None) -> Tensor:
    """Log-probabilities of what some rows may draw next, (n, V).

    Args:
        states: their last hidden states, (n, D); their logits where there is no head.
        step: column of the completion; one for all rows, or int64 of (n,).
    """
    if head is not None:
        with computing(states.device.type, sampling.precision):
            states = nn.functional.linear(states, head.layer.weight, head.layer.bias)
    logits = (states.float() if sampling.precision == "bf16" else states) / sampling.temperature
    if isinstance(step, Tensor):
        early = (step + 1 < sampling.min_tokens).nonzero()
        logits[early, torch.tensor(sampling.ends(), device=logits.device)] = -torch.inf
    elif step + 1 < sampling.min_tokens:
        logits[:, sampling.ends()] = -torch.inf
    if sampling.silent_ids:
        logits[:, list(sampling.silent_ids)] = -torch.inf
    return torch.log_softmax(logits, -1)
