"""From completions to what the target reads, and from its token credits back to the generator's tokens.

One tokeniser: the target reads the completion's own tokens, and credits go back place by place.

Two tokenisers: the target re-tokenises the completion's text (special tokens out). A credit τ_is goes to the generator
token with which the *last* character of target token s stood complete. That is the causal choice: a target token depends
on every generator token it overlaps, so a return Σ_{r>=k} may leave out only what was finished before token k. (Two
dependences run the other way and are left out: a later character can change how the target's tokeniser splits the same
word, and the truncation at `max_length`.) A character of several bytes is complete with its last byte; bytes that are no UTF-8
read as U+FFFD, which stands once the next token, or the end, shows that nothing will complete them. Where the
generator ended by an end token, the target's own end-of-sequence token closes the example, is trained, and credits that end
token. Each credit goes to exactly one generator token, so Σ τ of an example is conserved.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tokenizers import decoders
from torch import Tensor

from dpg_cli.engine.records import Examples, Metagradient, Rollout
from dpg_cli.engine.soft import LabelFactors
from dpg_cli.models.loading import LanguageModel, same_tokenizer


@dataclass(frozen=True)
class Reading:
    """How the target reads a rollout.

    Attributes:
        examples: what the target trains on.
        place_N_S: column of the rollout to which the credit of each target token goes, int64; -1 for none.
        width: K, columns of the rollout.
        shared: one tokeniser: target tokens are completion tokens, `offset` columns later.
        offset: context tokens before the completion, 1 or 0.
    """

    examples: Examples
    place_N_S: Tensor
    width: int
    shared: bool
    offset: int

    def to_completions(self, result: Metagradient) -> tuple[Tensor, Tensor | LabelFactors | None]:
        """Credits by completion token.

        Args:
            result: of a metagradient over `examples`.

        Returns:
            τ of shape (N, K), and of every label (N, K, V), in factors where the result has them so, or None.

        Raises:
            ValueError: for credits of labels where the tokenisers differ: the labels are other tokens.
        """
        labels = result.label_N_S_V
        if (labels is not None or result.factors is not None) and not self.shared:
            raise ValueError("the credit of every label needs one tokeniser for generator and target")
        if labels is not None:
            labels = labels[:, self.offset : self.offset + self.width]
            labels = torch.nn.functional.pad(labels, (0, 0, 0, self.width - labels.shape[1]))
        factors = None if result.factors is None else result.factors.placed(self.width, self.offset)
        return self.collect(result.token_N_S), labels if factors is None else factors

    def collect(self, token_N_S: Tensor) -> Tensor:
        """Σ of the credits that go to each completion token, (N, K)."""
        place = self.place_N_S.to(token_N_S.device)
        collected = token_N_S.new_zeros(len(token_N_S), self.width)
        return collected.scatter_add_(1, place.clamp_min(0), torch.where(place >= 0, token_N_S, 0.0))


def read_completions(rollout: Rollout, generator: LanguageModel, target: LanguageModel, max_length: int = 0) -> Reading:
    """The completions, without their prompts, as the target reads them.

    A beginning-of-sequence token stands before each where the target has one, so that the first token has a loss too.

    Args:
        rollout: from `generator` or a model with its tokeniser.
        generator: whose tokens the rollout holds.
        target: who reads.
        max_length: longest sequence of the target in tokens, the beginning-of-sequence token included; the examples are
            padded to it. 0: the target's context, and no padding beyond the longest.
    """
    if same_tokenizer(generator, target):
        examples, offset = target_examples(rollout, target.bos_id)
        place = torch.arange(examples.ids_N_S.shape[1]) - offset
        place_N_S = torch.where(examples.label_N_S, place.to(examples.label_N_S.device), -1)
        reading = Reading(examples, place_N_S, rollout.ids_N_K.shape[1], True, offset)
        limit = max_length or target.context
        return _resized(reading, max_length or min(examples.ids_N_S.shape[1], limit or examples.ids_N_S.shape[1]))
    reading = _retokenised(rollout, generator, target, max_length or target.context)
    return _resized(reading, max_length or reading.examples.ids_N_S.shape[1])


def target_examples(rollout: Rollout, bos_id: int | None) -> tuple[Examples, int]:
    """The completions as their own tokens, after a beginning-of-sequence token where there is one.

    Returns:
        The examples, and the number of context tokens before the completion (1 or 0).
    """
    ids, mask = rollout.ids_N_K, rollout.mask_N_K
    if bos_id is None:
        label = mask.clone()
        label[:, :1] = False
        return Examples(ids, mask, label), 0
    column = torch.ones_like(mask[:, :1])
    label = torch.cat([~column, mask], 1)
    return Examples(torch.cat([column * bos_id, ids], 1), torch.cat([column, mask], 1), label), 1


def _resized(reading: Reading, length: int) -> Reading:
    """The same reading, cut or padded to `length` columns."""
    examples, extra = reading.examples, length - reading.examples.ids_N_S.shape[1]
    if extra == 0:
        return reading

    def fit(tensor: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, extra), value=fill)  # a negative width cuts

    resized = Examples(
        fit(examples.ids_N_S, 0),
        fit(examples.attention_N_S, 0),
        fit(examples.label_N_S, 0),
        None if examples.soft is None else examples.soft.resized(length),
        examples.drawn,
    )
    return Reading(resized, fit(reading.place_N_S, -1), reading.width, reading.shared, reading.offset)


def _retokenised(rollout: Rollout, generator: LanguageModel, target: LanguageModel, limit: int | None) -> Reading:
    """The reading by another tokeniser."""
    lengths = rollout.mask_N_K.sum(1).tolist()
    completions = [row[:length] for row, length in zip(rollout.ids_N_K.tolist(), lengths, strict=True)]
    ended = [bool(row) and row[-1] in (generator.end_ids or (generator.eos_id,)) for row in completions]
    contents = [row[: len(row) - end] for row, end in zip(completions, ended, strict=True)]
    decoded = decode_with_ends(generator.tokenizer, contents)
    encoded = encode_with_ends(target.tokenizer, [text for text, _ in decoded])
    bos = [] if target.bos_id is None else [target.bos_id]
    rows, places = [], []
    for (_, ends), (ids, last), content, end in zip(decoded, encoded, contents, ended, strict=True):
        # the first generator token after which more characters stood than the target token's last one
        found = np.searchsorted(np.asarray(ends, dtype=np.int64), np.asarray(last, dtype=np.int64), side="right")
        place = np.minimum(found, max(len(content) - 1, 0)).tolist()
        rows.append([*bos, *ids, *([target.eos_id] if end else [])][:limit])
        places.append([*(-1 for _ in bos), *place, *([len(content)] if end else [])][:limit])
    width = max([1, *map(len, rows)])
    device = rollout.ids_N_K.device

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in lists], dtype=torch.int64, device=device)

    attention = padded([[1] * len(row) for row in rows], 0).bool()
    label = attention.clone()
    label[:, 0] = False  # beginning of sequence, or a first token that nothing predicts
    place_N_S = torch.where(label, padded(places, -1), -1)
    return Reading(Examples(padded(rows, 0), attention, label), place_N_S, rollout.ids_N_K.shape[1], False, len(bos))


def decode_with_ends(tokenizer: Any, rows: list[list[int]]) -> list[tuple[str, list[int]]]:
    """The text of each row of tokens, special ones out, and how many of its characters stand after each token.

    Args:
        tokenizer: byte-level tokenisers are followed byte by byte; others by decoding growing pieces.
        rows: token ids.

    Returns:
        For each row the text, and for each token a number of characters, never falling, the last one the text's length.
    """
    speller, results = speller_of(tokenizer), []
    for ids, text in zip(rows, completion_texts(tokenizer, rows), strict=True):
        ends = None if speller is None else _ends_by_bytes(speller.spell(ids, specials=False), text)
        results.append((text, _ends_by_decoding(tokenizer, ids, text) if ends is None else ends))
    return results


def completion_texts(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    """The text of each row of tokens, special ones out; what exported data holds and the target re-tokenises."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True) if rows else []


def _ends_by_bytes(pieces: list[bytes], text: str) -> list[int] | None:
    """Characters that stand after each piece; None if the pieces do not spell the text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    written = [decoder.decode(piece) for piece in pieces]
    if "".join(written) + decoder.decode(b"", final=True) != text:
        return None
    ends = list(accumulate(map(len, written)))
    return [*ends[:-1], len(text)] if ends else []


def _ends_by_decoding(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """Characters that stand after each token, from decoding windows that begin where all before is settled."""
    ends, settled, start, known = [], 0, 0, 0
    for place in range(len(ids)):
        before = tokenizer.decode(ids[start:known], skip_special_tokens=True)
        now = tokenizer.decode(ids[start : place + 1], skip_special_tokens=True)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            settled += len(now) - len(before)
            start, known = known, place + 1
        ends.append(min(settled, len(text)))
    return [*ends[:-1], len(text)] if ends else []


def encode_with_ends(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """Token ids of texts, without added special tokens, and the place of each token's last character.

    Byte-level tokens are followed byte by byte (the offsets that such tokenisers report leave white space out); a token
    that holds part of a character counts as ending in it. Other tokenisers give offsets, or are decoded piece by piece.
    """
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    speller, results = speller_of(tokenizer), []
    for number, text in enumerate(texts):
        ids = list(encoded["input_ids"][number])
        pieces = None if speller is None else speller.spell(ids, specials=True)
        data = text.encode("utf-8", "replace")
        if pieces is not None and b"".join(pieces) == data:
            character = np.cumsum([(byte & 0xC0) != 0x80 for byte in data]) - 1  # of each byte
            last = [int(character[max(end - 1, 0)]) for end in accumulate(map(len, pieces))]
        elif tokenizer.is_fast:
            last = [max(end - 1, 0) for _, end in encoded["offset_mapping"][number]]
        else:
            last = [max(end - 1, 0) for end in _ends_by_decoding(tokenizer, ids, text)]
        results.append((ids, list(accumulate(last, max))))
    return results


class Speller:
    """The bytes of each token of a byte-level tokeniser.

    Args:
        tokenizer: byte-level (`speller_of` asks).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = tokenizer.added_tokens_decoder
        self.hidden = {number for number, token in self.added.items() if token.special}
        self.known: dict[int, bytes] = {}

    def spell(self, ids: list[int], *, specials: bool) -> list[bytes]:
        """The bytes of some tokens; of special ones nothing unless asked for."""
        for number in set(ids) - self.known.keys():
            self.known[number] = self._bytes(number)
        return [b"" if number in self.hidden and not specials else self.known[number] for number in ids]

    def _bytes(self, number: int) -> bytes:
        if number in self.added:
            return self.added[number].content.encode()
        token = self.tokenizer.convert_ids_to_tokens(number)
        if token is None:  # an id of the model that the tokeniser does not use
            return b""
        alphabet = byte_alphabet()
        known = all(character in alphabet for character in token)
        return bytes(alphabet[character] for character in token) if known else token.encode()


def speller_of(tokenizer: Any) -> Speller | None:
    """The speller of a byte-level tokeniser; None for another kind."""
    byte_level = tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    return Speller(tokenizer) if byte_level else None


@cache
def byte_alphabet() -> dict[str, int]:
    """The byte that each character of byte-level vocabularies stands for: printable Latin-1 characters for themselves,
    the other bytes, in order, for the characters from U+0100 on (the convention of GPT-2's tokeniser)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
