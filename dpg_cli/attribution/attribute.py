"""`dpg attribute` without its display: the metagradients of a user's own fine-tuning data, and no generator anywhere.

rows of the source -> examples (`data`) -> fine-tuning by the recipe -> metagradient -> scores (`scores`)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from dpg_cli import __version__
from dpg_cli.attribution.scores import Scored, check_place, write_scores
from dpg_cli.data.examples import Encoding, Keep, RowEncoder, TrainOn
from dpg_cli.data.prepared import Prepared, gather, prepare
from dpg_cli.data.sources import files_of
from dpg_cli.driver.recipe import inner_recipe, trained_target
from dpg_cli.engine.inner.recipe import Plan
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.records import Examples, Metagradient
from dpg_cli.models.fingerprint import fingerprint
from dpg_cli.models.loading import LanguageModel, load_target, pick_device, quiet_transformers
from dpg_cli.planning.memory import Need, check_memory
from dpg_cli.runs.sessions import peak_memory_mb
from dpg_cli.settings.config import Config, CustomOptions, InnerConfig, TextLossOptions

TOKENS = 4096  # of an automatic micro-batch

DEFAULTS: dict[str, Any] = {  # of `dpg attribute`, where they differ from a run's
    "task": "attribute",
    "models": {"target": "tiny", "untie_target": False},
    "inner": {"lr": 1e-4, "beta2": 0.95, "eps": 1e-3, "batch_size": 32, "order": "shuffled"},
}


@dataclass(frozen=True)
class Request:
    """What is to be attributed, besides the settings.

    Attributes:
        data: a source of rows, see `data/sources.py`.
        out: where the scores go.
        prompts: a source of what stands before each completion; empty where the rows have it themselves.
        limit: only the first so many rows; 0 takes all.
        keep: which end of a row longer than `inner.max_length` stays.
        train_on: see `data.examples.Encoding`.
        overwrite: whether earlier scores may be replaced.
        micro_batch: rows in memory at once; 0 takes about 4,096 tokens.
        top: how many helpful and harmful examples are returned.
        metric: what the user gave as --metric; without it no file of a custom metric is run.
    """

    data: str
    out: Path
    prompts: str = ""
    limit: int = 0
    keep: Keep = "start"
    train_on: TrainOn = "auto"
    overwrite: bool = False
    micro_batch: int = 0
    top: int = 5
    metric: str | None = None


@dataclass(frozen=True)
class Attribution:
    """What attributing left.

    Attributes:
        metric: what Φ is, in words.
        value, value_before: Φ after and before the fine-tuning.
        measures: readable measures after it.
        examples, inner_steps: N (those with something to train on) and T.
        data: how the rows were understood, see `data.prepared.Understood`.
        gradient_median: median |g_0|; ε far below it makes the optimiser a sign function.
        epsilon: the same against ε, in words.
        notes: what the engine chose for the target, a sentence each.
        precision_error: relative error of the first step's token scores in bf16, None in float32.
        clipped_share: of the steps, on which the gradient was clipped; None where it never is.
        seconds, peak_memory_mb: of the process.
        helpful, harmful: the examples with the highest and the lowest scores.
    """

    metric: str
    value: float
    value_before: float
    measures: dict[str, float]
    examples: int
    inner_steps: int
    data: dict[str, Any]
    gradient_median: float
    epsilon: str
    notes: list[str]
    precision_error: float | None
    clipped_share: float | None
    seconds: float
    peak_memory_mb: float | None
    helpful: list[Scored] = field(repr=False)
    harmful: list[Scored] = field(repr=False)


def read_rows(
    config: Config, request: Request, on_stage: Callable[[str], None] = lambda name: None
) -> tuple[LanguageModel, Prepared, RowEncoder]:
    """The target, and the rows of a request as its tokens. The data is read first: what is wrong with it shows at once."""
    on_stage("reading the data")
    gathered = gather(request.data, contexts=request.prompts, limit=request.limit)
    on_stage("loading the target")
    target = load_target(config.models, pick_device(config.device))
    encoder = RowEncoder(target, Encoding(config.inner.max_length, request.keep, request.train_on))
    return target, prepare(gathered, encoder), encoder


def show(config: Config, request: Request, rows: int) -> tuple[Prepared, list[list[str]]]:
    """The rows of a request, and the text of each token of the first ones; nothing is trained."""
    target, found, _ = read_rows(config, request)
    return found, [pieces(target, row.ids) for row in found.rows[:rows]]


def attribute(
    config: Config,
    request: Request,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_note: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Attribution:
    """Fine-tune the target on the data by the recipe of the settings, and write the metagradients of all examples.

    Args:
        config: models.target, metric, inner, lora and seed are used.
        request: the data, and where the scores go.
        on_stage, on_note: called with the name of each stage, and with what the user should know of the data and of what
            the engine chose for the target.
        on_progress: called as progress(phase, steps done, of how many).

    Raises:
        UsageError: for whatever cannot be read or written, or will not fit in memory.
        DegenerateError: if the inner run diverges or a metagradient is not finite.
    """
    started, inner = time.perf_counter(), config.inner
    check_place(request.out, inputs(config, request), request.overwrite)
    target, found, encoder = read_rows(config, request, on_stage)
    examples = Examples(*found.tensors(encoder))
    made_of = fingerprint(target)
    target, metric = trained_target(target, config, request.metric)
    recipe = inner_recipe(inner, config.seed)
    plan = recipe.plan(examples)
    for line in (found.understood.line(), *found.understood.notes(), *getattr(metric, "notes", ())):
        on_note(line)
    micro_batch = request.micro_batch or max(1, TOKENS // examples.ids_N_S.shape[1])
    require_memory(target, inner, plan, examples, micro_batch, getattr(metric, "tokens_read", 0))
    on_stage("fine-tuning and attributing")
    with quiet_transformers():  # it would warn of pads without a mask; a causal model needs none
        with torch.no_grad():
            before = float(metric(dict(target.model.named_parameters()), target.model))
        result = metagradient(
            target.model,
            examples,
            recipe,
            metric,
            plan=plan,
            micro_batch=micro_batch,
            memory=inner.states,
            packing=inner.packing,
            progress=on_progress,
        )
    for note in result.notes:
        on_note(note)
    on_stage("writing the scores")
    scores = Scores(found, target, result.example_N.cpu(), result.token_N_S.cpu())
    record = {
        **how_made(config, found, made_of, before, result),
        "about": metric.describe(),
        "inner_steps": len(plan),
    }
    write_scores(request.out, scores.rows(), record)
    ranking = scores.example_N.argsort(descending=True).tolist()
    top = min(request.top, len(ranking))
    return Attribution(
        metric=metric.describe(),
        value=result.value,
        value_before=before,
        measures=result.measures,
        examples=len(examples),
        inner_steps=len(plan),
        data=found.understood.as_dict(),
        gradient_median=result.gradient_median,
        epsilon=against_gradient(inner, result.gradient_median),
        notes=list(result.notes),
        precision_error=result.stats.get("precision_error"),
        clipped_share=result.stats.get("clipped_share"),
        seconds=time.perf_counter() - started,
        peak_memory_mb=peak_memory_mb(),
        helpful=[scores.trained(number) for number in ranking[:top]],
        harmful=[scores.trained(number) for number in ranking[::-1][:top]],
    )


@dataclass(frozen=True)
class Scores:
    """Metagradients of the rows that were trained on, (N,) and (N, S), with all rows of the data."""

    found: Prepared
    target: LanguageModel
    example_N: torch.Tensor
    token_N_S: torch.Tensor

    def rows(self) -> Iterator[Scored]:
        """All rows that are not empty; one that had nothing to train on has scores of 0."""
        number = {place: n for n, place in enumerate(self.found.trained)}
        return (self._scored(place, number.get(place)) for place in range(len(self.found.rows)))

    def trained(self, number: int) -> Scored:
        """The n-th row that was trained on."""
        return self._scored(self.found.trained[number], number)

    def _scored(self, place: int, number: int | None) -> Scored:
        row = self.found.rows[place]
        scores = [0.0] * len(row.ids) if number is None else self.token_N_S[number][: len(row.ids)].tolist()
        score = 0.0 if number is None else float(self.example_N[number])
        return Scored(self.found.numbers[place], score, row, pieces(self.target, row.ids), scores)


def inputs(config: Config, request: Request) -> list[Path]:
    """Files and folders that are read, none of which scores may be written onto."""
    named = [request.data, request.prompts]
    if isinstance(config.metric, TextLossOptions):
        named.append(config.metric.file.replace("{language}", config.metric.language))
    if isinstance(config.metric, CustomOptions):
        named += [config.metric.path, *(value for value in config.metric.options.values() if isinstance(value, str))]
    return [path for name in named for path in files_of(name)]


def require_memory(
    target: LanguageModel, inner: InnerConfig, plan: Plan, examples: Examples, micro_batch: int, tokens_read: int
) -> None:
    """Refuse what will not fit.

    Raises:
        UsageError: naming the flag that would make it fit.
    """
    length = examples.ids_N_S.shape[1]
    batch = max(len(plan.index(number)) for number in range(len(plan)))
    need = Need.of(target, len(plan), min(micro_batch, batch), length, inner.states, batch, tokens_read)
    frozen = (target.parameter_count - target.trained_count) * float(target.head.element_size())
    check_memory(need, target.head.device, states_flag="--memory ", rows_flag="--micro-batch ", other=frozen)


def how_made(
    config: Config, found: Prepared, made_of: dict[str, Any], before: float, result: Metagradient
) -> dict[str, Any]:
    """How scores were made: everything that another attribution must have in common with it to be compared."""
    rows = hashlib.sha256()
    for row in found.rows:
        rows.update(json.dumps([row.ids, [int(bit) for bit in row.label]]).encode())
    return {
        "dpg": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": config.seed,
        "phi_before": before,
        "phi": result.value,
        "measures": result.measures,
        "gradient_median": result.gradient_median,
        "notes": list(result.notes),
        "recipe": config.inner.model_dump(mode="json"),
        "lora": config.lora.model_dump(mode="json"),
        "metric": config.metric.model_dump(mode="json"),
        "data": found.understood.as_dict(),
        "examples_sha256": rows.hexdigest(),
        "target": {**config.models.model_dump(mode="json", include={"target", "target_init", "init_seed"})},
        "fingerprint": made_of,
    }


def against_gradient(inner: InnerConfig, median: float) -> str:
    """ε against the gradients of the first step, on one line."""
    if inner.optimizer != "adamw":
        return f"median |g| of the first step {median:.1e}; {inner.optimizer} is linear in it."
    floor = inner.eps + inner.eps_root**0.5
    answers = floor / (floor + median) if floor + median else 1.0
    said = (
        f"median |g| of the first step {median:.1e}, ε {floor:.1e}: an update answers to its gradient by {answers:.0%}"
    )
    if answers >= 0.1:
        return f"{said}."
    return f"{said}; AdamW is nearly sign(g), and scores fade. Try --set inner.eps={median:.0e}"


def pieces(target: LanguageModel, ids: list[int]) -> list[str]:
    """The text of each token by itself."""
    return [target.tokenizer.decode([token]) for token in ids]


def as_json(result: Attribution) -> dict[str, Any]:
    """A result for JSON."""
    data = asdict(result)
    for side in ("helpful", "harmful"):
        data[side] = [row.as_row() for row in getattr(result, side)]
    return data
