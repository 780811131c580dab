"""`dpg attribute` without its display: the metagradients of a user's own fine-tuning data, and no generator anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dpg_cli.data.conversations import read_conversations, write_conversations
from dpg_cli.data.sources import open_texts
from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models.loading import LanguageModel, load_target, pick_device, quiet_transformers
from dpg_cli.planning.memory import Need, check_memory
from dpg_cli.runs.files import replacing
from dpg_cli.runs.sessions import peak_memory_mb
from dpg_cli.settings.config import Config

KEYS = ("text", "completion", "response")  # columns to look for where DATA names none
CONTEXT_KEYS = ("prompt", "instruction", "question")
TOKENS = 4096  # of an automatic micro-batch

DEFAULTS: dict[str, Any] = {  # of `dpg attribute`, where they differ from a run's
    "task": "attribute",
    "models": {"target": "tiny", "untie_target": False},
    "inner": {"lr": 1e-4, "beta2": 0.95, "eps": 1e-3, "batch_size": 32},
}

SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("text", pa.string()),
        ("score", pa.float64()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("token_scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Ranked:
    """One example with its metagradients: ∂Φ/∂w of the example, and of each token's loss (0 for context)."""

    example_id: int
    score: float
    tokens: list[str]
    token_scores: list[float]


@dataclass(frozen=True)
class Attribution:
    """What attributing left.

    Attributes:
        metric: what Φ is, in words.
        value, value_before: Φ after and before the fine-tuning.
        measures: readable measures after it.
        examples, inner_steps: N and T.
        cut: examples that were cut to the longest length.
        precision_error: relative error of the first step's token scores in bf16, None in float32.
        gradient_median: median |g_0|; ε far below it makes the optimiser a sign function.
        helpful, harmful: the examples with the highest and the lowest scores.
        seconds, peak_memory_mb: of the process.
    """

    metric: str
    value: float
    value_before: float
    measures: dict[str, float]
    examples: int
    inner_steps: int
    cut: int
    gradient_median: float
    precision_error: float | None
    seconds: float
    peak_memory_mb: float | None
    helpful: list[Ranked] = field(repr=False)
    harmful: list[Ranked] = field(repr=False)


def encode(
    texts: Sequence[str], contexts: Sequence[str] | None, target: LanguageModel, limit: int, *, framed: bool = False
) -> tuple[Examples, int]:
    """Texts as fine-tuning reads them: beginning-of-sequence token, context, text, end of sequence.

    Args:
        texts: what is trained on.
        contexts: what stands before each and is not trained on; None for nothing.
        target: gives the tokeniser.
        limit: longest sequence in tokens; longer ones lose their end. 0: the target's context.
        framed: the texts have their beginning and end already, from a chat template.

    Returns:
        The examples, and how many were cut.

    Raises:
        UsageError: if no example has a token to train on.
    """
    longest = target.context or max(limit, 1 << 20)
    longest = min(limit or longest, longest)
    bos = [] if target.bos_id is None or framed else [target.bos_id]
    eos = [] if framed else [target.eos_id]
    rows, starts, cut = [], [], 0
    for number, text in enumerate(texts):
        before = [] if contexts is None else target.tokenizer(contexts[number], add_special_tokens=False)["input_ids"]
        row = [*bos, *before, *target.tokenizer(text, add_special_tokens=False)["input_ids"], *eos]
        cut += len(row) > longest
        rows.append(row[:longest])
        starts.append(max(1, len(bos) + len(before)))
    padded = Examples.from_sequences(rows, pad_id=target.pad_id)
    label = padded.attention_N_S & (torch.arange(padded.ids_N_S.shape[1]) >= torch.tensor(starts)[:, None])
    if not label.any():
        raise UsageError("No example has a token to train on.", "Raise --max-length, or look at the data.")
    return Examples(padded.ids_N_S, padded.attention_N_S, label).to(target.head.device), cut


def attribute(
    config: Config,
    data: str,
    out: Path,
    *,
    prompts: str = "",
    limit: int = 0,
    micro_batch: int = 0,
    top: int = 5,
    on_stage: Callable[[str], None] = lambda name: None,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Attribution:
    """Fine-tune the target once on the data, in a shuffled order, and write the metagradients of all examples.

    Args:
        config: models.target, metric, inner and seed are used.
        data: a source of texts, see `sources`.
        out: the parquet file.
        prompts: a source of what stands before each text; empty for nothing.
        limit: only the first so many examples; 0 takes all.
        micro_batch: rows in memory at once; 0 takes about 4,096 tokens.
        top: how many helpful and harmful examples are returned.

    Raises:
        UsageError: for whatever cannot be read or will not fit in memory.
        DegenerateError: if the inner run diverges or a metagradient is not finite.
    """
    started = time.perf_counter()
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"The scores cannot be written to {out}: no such file place.", "Name a file with --out.")
    on_stage("reading the data")
    contexts: list[str] | None = None
    conversations = None if prompts else read_conversations(data, KEYS, limit)
    texts: list[str] = []
    if conversations is None:
        texts = list(open_texts(data, KEYS, split="train", what="examples", flag="DATA", limit=limit))
    if prompts:
        contexts = list(open_texts(prompts, CONTEXT_KEYS, split="train", what="prompts", flag="--prompts", limit=limit))
        if len(contexts) != len(texts):
            raise UsageError(
                f"{data} has {len(texts):,} examples and {prompts} has {len(contexts):,} prompts.", "Give one for each."
            )
    on_stage("loading the target")
    target = load_target(config.models, pick_device(config.device))
    if conversations is not None:
        texts, contexts = write_conversations(conversations, target)
    metric = build_metric(config.metric, target)
    examples, cut = encode(texts, contexts, target, config.inner.max_length, framed=conversations is not None)
    rows = micro_batch or max(1, TOKENS // examples.ids_N_S.shape[1])
    inner = config.inner
    steps = -(-len(examples) // inner.batch_size)
    length, read = examples.ids_N_S.shape[1], getattr(metric, "tokens_read", 0)
    need = Need.of(target, steps, min(rows, inner.batch_size), length, inner.states, inner.batch_size, read)
    check_memory(
        need,
        target.head.device,
        states_flag="--memory ",
        rows_flag="--micro-batch ",
    )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed))
    place = order.to(examples.ids_N_S.device)
    shuffled = Examples(examples.ids_N_S[place], examples.attention_N_S[place], examples.label_N_S[place])
    on_stage("fine-tuning and attributing")
    with quiet_transformers():  # it would warn of pads without a mask; a causal model needs none
        with torch.no_grad():
            before = float(metric(dict(target.model.named_parameters()), target.model))
        result = metagradient(
            target.model,
            shuffled,
            OptimizerSpec.of(inner),
            metric,
            batch_size=inner.batch_size,
            normalization=inner.normalization,
            micro_batch=rows,
            memory=inner.states,
            precision=inner.precision,
            progress=on_progress,
        )
    back = torch.argsort(order)
    token_N_S = result.token_N_S.cpu()[back]
    example_N = result.example_N.cpu()[back]
    on_stage("writing the scores")
    write_scores(out, texts, examples, target, example_N, token_N_S)
    ranking = example_N.argsort(descending=True).tolist()

    def ranked(places: list[int]) -> list[Ranked]:
        found = []
        for number in places:
            ids = examples.ids_N_S[number][examples.attention_N_S[number]].tolist()
            scores = token_N_S[number][: len(ids)].tolist()
            found.append(Ranked(number, float(example_N[number]), pieces(target, ids), scores))
        return found

    top = min(top, len(ranking))
    return Attribution(
        metric=metric.describe(),
        value=result.value,
        value_before=before,
        measures=result.measures,
        examples=len(examples),
        inner_steps=steps,
        cut=cut,
        gradient_median=result.gradient_median,
        precision_error=result.stats.get("precision_error"),
        seconds=time.perf_counter() - started,
        peak_memory_mb=peak_memory_mb(),
        helpful=ranked(ranking[:top]),
        harmful=ranked(ranking[::-1][:top]),
    )


def pieces(target: LanguageModel, ids: list[int]) -> list[str]:
    """The text of each token by itself."""
    return [target.tokenizer.decode([token]) for token in ids]


def write_scores(
    path: Path,
    texts: Sequence[str],
    examples: Examples,
    target: LanguageModel,
    example_N: torch.Tensor,
    token_N_S: torch.Tensor,
) -> None:
    """One row an example, in the order of the data, a thousand rows at a time."""
    lengths = examples.attention_N_S.sum(1).tolist()
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(texts), 1000):
            rows = range(start, min(start + 1000, len(texts)))
            ids = [examples.ids_N_S[row, : lengths[row]].tolist() for row in rows]
            columns = {
                "example_id": list(rows),
                "text": [texts[row] for row in rows],
                "score": example_N[start : rows.stop].double().tolist(),
                "token_ids": ids,
                "tokens": [pieces(target, row) for row in ids],
                "token_scores": [token_N_S[row, : lengths[row]].tolist() for row in rows],
            }
            writer.write_table(pa.table(columns, schema=SCHEMA))
