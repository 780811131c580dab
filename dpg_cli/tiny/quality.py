"""How good the embedded model is: sampling at temperature 1 on held-out prompts, and losses on held-out sentences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from dpg_cli.tiny import world
from dpg_cli.tiny.vocabulary import EOS
from dpg_cli.tiny.world import LANGUAGES, Meaning


@dataclass(frozen=True)
class Quality:
    """How well a generator answers held-out prompts when sampled at temperature 1. Shares are of all completions."""

    completions: int
    well_formed: float  # a sentence of some language, or an identifier
    shares: dict[str, float]  # of well-formed completions of each language, and of the kind "identifier"
    finished: float  # ended by end-of-text within the limit
    slots_kept: float  # mean share of the six slots that a well-formed English sentence keeps
    meaning_kept: float  # share of well-formed English sentences that keep all six
    tokens: float  # mean length of a completion, end-of-text included
    loss: dict[str, float]  # nats a token on held-out plain sentences, by language
    sentence_tokens: dict[str, float]  # mean length of those sentences, by language


def pad_rows(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a rectangle of token rows.

    Args:
        rows: N lists of token ids, the longest of length S.

    Returns:
        Ids (N, S), int64, filled up on the right, and the labels of their next tokens (N, S - 1), -100 where there is
        none. A causal model never looks at the filling from the left: any id serves, and no attention mask is needed.
    """
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = torch.tensor([row[1:] + [-100] * (length - len(row)) for row in rows])
    return ids, labels


@torch.no_grad()
def sample(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int, max_tokens: int = 40
) -> list[list[int]]:
    """Sample a completion for each prompt at temperature 1.

    Args:
        model: a causal language model.
        tokenizer: its tokeniser.
        prompts: what to complete.
        seed: seed of the sampling.
        max_tokens: longest completion.

    Returns:
        Token ids of each completion, up to and with end-of-text.
    """
    torch.manual_seed(seed)
    encoded = tokenizer([EOS + prompt for prompt in prompts], padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=max_tokens,
    )
    rows = out[:, encoded["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def measure(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> Quality:
    """Measure a model on held-out prompts and sentences.

    Args:
        model: a causal language model.
        tokenizer: its tokeniser.
        n: prompts, one completion each, and sentences of each language.
        seed: seed of prompts, sampling and sentences.

    Returns:
        The figures.
    """
    prompts = world.prompts("eval", n, seed)
    rows = sample(model, tokenizer, prompts, seed)
    kinds: Counter[str] = Counter()
    kept: list[float] = []
    for prompt, text in zip(prompts, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True):
        if language := world.language_of(text):
            kinds[language] += 1
        kinds["identifier"] += world.is_identifier(text)
        if told := world.meaning_of(text, "en"):
            asked = world.meaning_of(prompt.removeprefix(world.PROMPT_PREFIX), "en")
            kept.append(sum(getattr(asked, slot.name) == getattr(told, slot.name) for slot in fields(Meaning)) / 6)
    held_out = {language: world.sentences("eval", language, n, seed) for language in LANGUAGES}
    losses = {language: _loss(model, tokenizer, texts) for language, texts in held_out.items()}
    return Quality(
        completions=n,
        well_formed=kinds.total() / n,
        shares={kind: kinds[kind] / n for kind in (*LANGUAGES, "identifier")},
        finished=sum(row[-1] == tokenizer.eos_token_id for row in rows) / n,
        slots_kept=sum(kept) / max(len(kept), 1),
        meaning_kept=sum(share == 1 for share in kept) / max(len(kept), 1),
        tokens=sum(map(len, rows)) / n,
        loss={language: loss for language, (loss, _) in losses.items()},
        sentence_tokens={language: length for language, (_, length) in losses.items()},
    )


@torch.no_grad()
def _loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[float, float]:
    """Mean loss a predicted token, end-of-text included, and mean tokens a text without the ends."""
    rows = tokenizer([EOS + text + EOS for text in texts])["input_ids"]
    ids, labels = pad_rows(rows)
    loss = cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), labels.flatten())
    return loss.item(), sum(map(len, rows)) / len(rows) - 2
