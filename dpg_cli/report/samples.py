"""The sample of the dataset that the page shows: the best, the worst and some of the others, token by token.

A token's text is what it adds to the decoded completion, so that the pieces in order are the completion itself. Where
several tokens together make one character, they are one piece, and its reward is their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpg_cli.errors import UsageError
from dpg_cli.runs.folder import RunFolder

HIGHEST, LOWEST, OTHERS, CONTROL = 100, 100, 100, 60  # examples shown
SHADES = 5  # of each sign
MOST_TOKENS, MOST_CHARACTERS = 512, 4000  # shown of one example
Decode = Callable[[list[int]], str]
_EXTREME = 0.98  # quantile of |token reward| at which the colours end


@dataclass(frozen=True)
class Piece:
    """A stretch of a completion with its reward.

    Attributes:
        text: what it says.
        reward: ∂Φ/∂w of the loss of its tokens; None where there is none.
        shade: -SHADES … SHADES, the colour of the reward.
    """

    text: str
    reward: float | None
    shade: int = 0


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        number: its `example_id`.
        prompt: what the generator was asked.
        pieces: the completion.
        reward: ∂Φ/∂w of the example; None for the control.
        rank: 1 for the highest reward; None for the control.
    """

    number: int
    prompt: str
    pieces: tuple[Piece, ...]
    reward: float | None
    rank: int | None


@dataclass(frozen=True)
class Sample:
    """A sample of the dataset.

    Attributes:
        rows: of the trained generator, highest reward first.
        control: of the untrained generator; may be empty.
        examples: in the whole dataset.
        scale: size of a token's reward at which the darkest shade begins; 0 where no token has one.
    """

    rows: tuple[Row, ...]
    control: tuple[Row, ...]
    examples: int
    scale: float


def read_sample(folder: RunFolder) -> Sample | None:
    """The sample of a run's dataset, or None where it has none yet.

    Raises:
        UsageError: if the dataset is damaged.
    """
    path = folder.dataset / "train.parquet"
    if not path.is_file():
        return None
    try:
        rewards = pq.read_table(path, columns=["reward"])["reward"].to_pylist()
        ranked = sorted(range(len(rewards)), key=lambda place: (-_finite(rewards[place]), place))
        chosen = choose(ranked)
        records = take(path, chosen)
        control_path = folder.dataset / "control.parquet"
        control = []
        if control_path.is_file():
            count = pq.ParquetFile(control_path).metadata.num_rows
            control = list(take(control_path, list(range(min(count, CONTROL)))).values())
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UsageError(
            f"{path.parent} holds no readable dataset: {str(error)[:200]}.", "Run `dpg run` again."
        ) from None
    decode = _decoder(folder)
    rank = {place: number for number, place in enumerate(ranked, 1)}
    plain = [(records[place], rank[place], pieces(records[place], decode)) for place in chosen]
    scale = extreme([piece.reward for _, _, row in plain for piece in row if piece.reward is not None])
    rows = tuple(
        Row(
            number=_whole(record.get("example_id")),
            prompt=_text(record.get("prompt")),
            pieces=tuple(Piece(piece.text, piece.reward, shade(piece.reward, scale)) for piece in row),
            reward=_number(record.get("reward")),
            rank=number,
        )
        for record, number, row in plain
    )
    untrained = tuple(
        Row(
            _whole(record.get("example_id")),
            _text(record.get("prompt")),
            (Piece(_text(record.get("text")), None),),
            None,
            None,
        )
        for record in control
    )
    return Sample(rows, untrained, len(rewards), scale)


def choose(ranked: Sequence[int]) -> list[int]:
    """Places of the examples to show: the first, the last, and evenly spaced ones in between, in the order given."""
    if len(ranked) <= HIGHEST + OTHERS + LOWEST:
        return list(ranked)
    middle = ranked[HIGHEST:-LOWEST]
    step = len(middle) / OTHERS
    return [
        *ranked[:HIGHEST],
        *(middle[int((place + 0.5) * step)] for place in range(OTHERS)),
        *ranked[-LOWEST:],
    ]


def take(path: Path, places: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Some rows of a parquet file by their places, in the order given; memory stays at one batch."""
    wanted = sorted(places)
    file = pq.ParquetFile(path)
    columns = [
        name
        for name in ("example_id", "prompt", "text", "token_ids", "token_rewards", "reward")
        if name in file.schema_arrow.names
    ]
    found: dict[int, dict[str, Any]] = {}
    start = position = 0
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        here = []
        while position < len(wanted) and wanted[position] < start + batch.num_rows:
            here.append(wanted[position])
            position += 1
        if here:
            rows = batch.take(pa.array([place - start for place in here])).to_pylist()
            found |= dict(zip(here, rows, strict=True))
        start += batch.num_rows
        if position == len(wanted):
            break
    return {place: found[place] for place in places}


def pieces(record: dict[str, Any], decode: Decode | None) -> list[Piece]:
    """A completion in pieces with their rewards; one piece without reward where tokens and rewards do not match.

    Args:
        record: a row of the dataset.
        decode: from a list of token ids to text, or None where there is no tokeniser.
    """
    ids, rewards = record.get("token_ids"), record.get("token_rewards")
    if decode is None or not ids or not rewards or len(ids) != len(rewards):
        return [Piece(_text(record.get("text")), None)]
    cut = len(ids) > MOST_TOKENS
    ids = ids[:MOST_TOKENS]
    spans = split(ids, decode, lone=True)
    if "".join(text for text, _, _ in spans) != decode(ids):  # a decoder whose output is no sum of such parts
        spans = split(ids, decode, lone=False)
    found = []
    size = 0
    for text, start, end in spans:
        if size > MOST_CHARACTERS:
            cut = True
            break
        found.append(Piece(text, math.fsum(_finite(value) for value in rewards[start:end])))
        size += len(text)
    return [*found, Piece(" … (cut here)", None)] if cut else found


def split(ids: list[int], decode: Decode, *, lone: bool) -> list[tuple[str, int, int]]:
    """Stretches of tokens that each add whole characters to the text.

    Args:
        ids: of a completion.
        decode: from ids to text; bytes that are no character become U+FFFD.
        lone: let bytes that no following token completes stand as a stretch of their own, instead of joining the next.

    Returns:
        (text that the stretch adds, first token, token after the last), in order, without gaps.
    """
    found: list[tuple[str, int, int]] = []
    # Decoding starts one stretch before the open one, at `begin`: what a token says may depend on the one before it.
    begin = start = 0
    before = held = ""  # text of ids[begin:start]; what the open stretch adds so far
    for end in range(1, len(ids) + 1):
        added = decode(ids[begin:end])[len(before) :]
        if lone and held and len(added) > len(held) and added.startswith(held):
            found.append((held, start, end - 1))
            begin, start = start, end - 1
            before = decode(ids[begin:start])
            added = decode(ids[begin:end])[len(before) :]
        if added.endswith("\ufffd") and end < len(ids):
            held = added  # the next token may complete a character
            continue
        found.append((added, start, end))
        begin, start, held = start, end, ""
        before = decode(ids[begin:start])
    return found


def _decoder(folder: RunFolder) -> Decode | None:
    """The generator's tokeniser as a function from ids to text, special tokens shown; None where it cannot be read."""
    path = folder.generator / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # tokenizers raises bare Exception; the page then shows texts without tokens
        return None

    def decode(ids: list[int]) -> str:
        known = [number for number in ids if isinstance(number, int) and number >= 0]
        return tokenizer.decode(known, skip_special_tokens=False) if known else ""

    return decode


def extreme(rewards: Sequence[float]) -> float:
    """Size of a reward that is larger than nearly all of them: where the colour scale ends. 0 where all are 0."""
    sizes = sorted(abs(reward) for reward in rewards)
    if not sizes:
        return 0.0
    return sizes[min(len(sizes) - 1, int(_EXTREME * len(sizes)))] or sizes[-1]


def shade(reward: float | None, scale: float) -> int:
    """The colour of a reward: 0 within a tenth of the scale, ±SHADES from nine tenths on."""
    if reward is None or scale <= 0:
        return 0
    return max(-SHADES, min(SHADES, round(reward / scale * SHADES)))


def _finite(value: Any) -> float:
    """A number; 0 for anything else."""
    return _number(value) or 0.0


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " … (cut here)"
