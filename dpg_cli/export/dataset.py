"""`dpg export dataset`: the rows of a finished run, or new ones from its generator, in a form that others read.

Rows stream from the run's parquet file (or from the generator) through a writer into a temporary place, which becomes the
export when all is written.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpg_cli.artefacts.card import Results, Rows, columns_text, dataset_card, effect_of
from dpg_cli.artefacts.rows import PROVENANCE, SCHEMA, SOURCES, Source, batches, outline, plain_columns
from dpg_cli.errors import UsageError
from dpg_cli.escape import code_span, pasted
from dpg_cli.export.destination import check_out, into
from dpg_cli.export.selection import Selection, check_options, select, split_rows
from dpg_cli.export.unspoken import Unspoken
from dpg_cli.export.writers import FORMATS, SUFFIXES, WRITERS, exported_schema, require_datasets, save_datasets
from dpg_cli.inspection.weights import weights_of
from dpg_cli.runs.folder import RunFolder, write_text
from dpg_cli.runs.status import Status, read_status, require_finished
from dpg_cli.settings.config import Config

STREAMS = "streams"  # a folder that is gone when the export stands
Progress = Callable[[int, int], None]
_TRL = """TRL takes `input_ids` as they are, which repeats the recipe; leave the column out to tokenise `text` anew. `provenance` is the
mark."""
_CHAT_COLUMNS = """Each row is a conversation: `messages` of a user (the prompt; empty where the generator wrote unprompted) and an
assistant (the text). TRL's `SFTTrainer` and `apply_chat_template` of `transformers` read it as it is; the tokeniser needs a chat template.
Besides: `example_id`; `reward`, see below; `provenance`, the mark."""


@dataclass(frozen=True)
class DatasetRequest:
    """What is to be exported.

    Attributes:
        format: jsonl, parquet, datasets or chat.
        out: a file with the format's suffix, or else a folder.
        source: "train", the generator's text, or "control", the untrained generator's.
        n: sample so many new examples instead of taking the run's own.
        split: share of the rows to hold out as `test`.
        min_reward: least reward of a row.
        seed: of the sampling of new examples and of the split.
        overwrite: whether an earlier export may be replaced.
        device: for new examples.
    """

    format: str
    out: Path
    source: str = "train"
    n: int | None = None
    split: float | None = None
    min_reward: float | None = None
    seed: int = 0
    overwrite: bool = False
    device: str = "auto"

    @property
    def as_file(self) -> bool:
        """Whether `out` names a file; else it becomes a folder with a file a split."""
        return self.out.suffix.lower() in (".jsonl", ".json", ".parquet", ".csv", ".arrow")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: where.
        card: the data card.
        rows: number of rows by split.
        note: what to say of tokens that have no text; empty where all have one.
    """

    out: Path
    card: Path
    rows: dict[str, int]
    note: str = ""


def export_dataset(
    folder: RunFolder, request: DatasetRequest, progress: Progress = lambda done, total: None
) -> Exported:
    """Write a dataset.

    Args:
        folder: a finished run.
        request: what and where.
        progress: called as progress(rows done, of how many).

    Raises:
        UsageError: for a bad request, an unfinished or damaged run, or a place that cannot be written to.
    """
    source = check_request(request)
    config = folder.read_config()
    status = read_status(folder)
    require_finished(folder, config, status)
    card = card_path(request)
    check_out(request.out, folder, request.overwrite, as_folder=not request.as_file)
    if request.as_file:
        check_out(card, folder, request.overwrite, as_folder=False)
    if request.format == "datasets":
        require_datasets()
    path = folder.dataset / f"{source}.parquet"
    progress(0, request.n or outline(path)[0])
    if request.n is None:
        selection = select(path, request.min_reward, request.split, request.seed)
        _, schema = outline(path)
        columns = plain_columns(schema)
        total, stream = len(selection.keep), batches(path, columns)
    else:
        words = f"{request.n:,} new examples, sampled for this export with seed {request.seed}; the run itself did not see them."
        selection = split_rows(np.ones(request.n, dtype=bool), request.split, request.seed, words)
        schema, columns, total = SCHEMA, SCHEMA.names, request.n
        stream = new_examples(folder, config, source, request)
    unspoken = Unspoken(folder.generator)
    with into(request.out) as temporary:
        files = _files(request, temporary, selection)
        if not request.as_file:
            next(iter(files.values())).parent.mkdir(parents=True)
        _write(
            _seen(stream, selection, unspoken),
            files,
            selection,
            exported_schema(schema, columns),
            request,
            source,
            lambda n: progress(n, total),
        )
        if request.format == "datasets":
            save_datasets(files, temporary, f"{PROVENANCE[source]} ({config.task}); see README.md")
            shutil.rmtree(temporary / STREAMS)
        text = _card(folder, config, status, request, source, selection, unspoken.words)
        if not request.as_file:
            (temporary / "README.md").write_text(text, encoding="utf-8")
        else:
            write_text(card, text)
    return Exported(request.out, card, selection.counts, unspoken.words)


def check_request(request: DatasetRequest) -> Source:
    """Refuse what no run could give.

    Raises:
        UsageError: naming the option.
    """
    if request.format not in FORMATS:
        raise UsageError(f"There is no format {request.format!r}.", f"Formats: {', '.join(FORMATS)}.")
    if request.source not in SOURCES:
        raise UsageError(f"There is no source {request.source!r}.", "Sources: train, control.")
    check_options(request.n, request.split, request.min_reward, request.source, request.seed)
    suffixes = SUFFIXES[request.format]
    if request.as_file and request.out.suffix.lower() not in suffixes:
        wanted = f"a name that ends in {suffixes[0]}, or a folder" if suffixes else "a folder"
        raise UsageError(f"--out {request.out} does not fit --format {request.format}.", f"Give {wanted}.")
    if request.as_file and request.split is not None:
        raise UsageError("--split makes two files, and --out names one.", "Give a folder: --out NAME without a suffix.")
    return request.source


def card_path(request: DatasetRequest) -> Path:
    """Where the card goes: inside a folder, beside a file."""
    out = request.out
    return out.with_name(f"{out.name}.card.md") if request.as_file else out / "README.md"


def new_examples(
    folder: RunFolder, config: Config, source: Source, request: DatasetRequest
) -> Iterator[pa.RecordBatch]:
    """Sample from the trained generator, or for the control from the untrained one.

    Raises:
        UsageError: if a model cannot be loaded.
    """
    from dpg_cli.artefacts.dataset import new_rollouts, table_of, without
    from dpg_cli.data.chat import prompt_format
    from dpg_cli.data.prompts import PromptSampler, load_prompts
    from dpg_cli.driver.build import loop_spec
    from dpg_cli.engine.generator.align import read_completions
    from dpg_cli.engine.generator.alphabet import restricted
    from dpg_cli.models.fingerprint import require_unchanged
    from dpg_cli.models.loading import load, load_generator, pick_device
    from dpg_cli.runs.sessions import read_info

    device, asked = pick_device(request.device), config.prompts
    for path in (folder.generator, folder.target):
        weights_of(path)  # says in one line what is damaged
    if source == "train":
        generator = load(str(folder.generator), device=device, dtype=config.models.dtype)
    else:
        require_unchanged(config.models, ["generator"], read_info(folder)[0].fingerprints, pasted(folder.path), device)
        generator = load_generator(config.models, device)
    target = load(str(folder.target), device=device, dtype=config.models.dtype)
    form = prompt_format(generator.tokenizer, config.models.generator, asked.chat, asked.instruction, asked.max_tokens)
    generator = restricted(generator, config.rollout.alphabet)
    spec = loop_spec(config, generator, form)
    prompts = PromptSampler(
        load_prompts(asked.source, limit=asked.limit, holdout=asked.holdout), asked.per_step, config.seed
    )

    def sampled() -> Iterator[pa.RecordBatch]:
        done = 0
        drawn = new_rollouts(generator, spec, prompts, request.n or 0, request.seed)
        for rollout in without(drawn, generator, config.dataset.forbidden):
            reading = read_completions(rollout, generator, target, spec.max_length)
            yield from table_of(rollout, reading, generator, done).to_batches()
            done += len(rollout)

    return sampled()


def _files(request: DatasetRequest, place: Path, selection: Selection) -> dict[str, Path]:
    """The file of each split."""
    if request.as_file:
        return {"train": place}
    if request.format == "datasets":  # which refuses to write where it reads
        return {split: place / STREAMS / split for split in selection.counts}
    return {split: place / f"{split}{SUFFIXES[request.format][0]}" for split in selection.counts}


def _seen(stream: Iterator[pa.RecordBatch], selection: Selection, unspoken: Unspoken) -> Iterator[pa.RecordBatch]:
    """The same batches; tokens without a text are counted in the rows that are kept."""
    done = 0
    for batch in stream:
        unspoken.see(batch.filter(pa.array(selection.keep[done : done + batch.num_rows])))
        done += batch.num_rows
        yield batch


def _write(
    stream: Iterator[pa.RecordBatch],
    files: dict[str, Path],
    selection: Selection,
    schema: pa.Schema,
    request: DatasetRequest,
    source: Source,
    progress: Callable[[int], None],
) -> None:
    """Send each row to the writer of its split, with its mark."""
    done = 0
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(WRITERS[request.format](path, schema)) for split, path in files.items()}
        for batch in stream:
            marks = pa.array([PROVENANCE[source]] * batch.num_rows, pa.string())
            marked = pa.RecordBatch.from_arrays([*batch.columns, marks], schema=schema)
            for split, mask in selection.masks(done, done + batch.num_rows).items():
                writers[split].write(marked if mask.all() else marked.filter(pa.array(mask)))
            done += batch.num_rows
            progress(done)
    if done != len(selection.keep):
        raise UsageError(f"The dataset ended after {done:,} of {len(selection.keep):,} rows.", "Run again.")


def _card(
    folder: RunFolder,
    config: Config,
    status: Status,
    request: DatasetRequest,
    source: Source,
    selection: Selection,
    note: str,
) -> str:
    """The data card of the export."""
    configs: list[dict[str, Any]] = []
    if request.format != "datasets":
        suffix = SUFFIXES[request.format][0]
        names = {split: request.out.name if request.as_file else f"{split}{suffix}" for split in selection.counts}
        configs = [
            {"config_name": "default", "data_files": [{"split": split, "path": name} for split, name in names.items()]}
        ]
    columns = _CHAT_COLUMNS if request.format == "chat" else f"{columns_text(config)} {_TRL}"
    if request.format == "datasets":
        columns += " `datasets.load_from_disk` loads the folder."
    mark = f"each row says {code_span(PROVENANCE[source])} in its column `provenance`"
    if request.format == "parquet":
        mark += "; so does the metadata of the schema (key `dpg`)"
    elif request.format == "datasets":
        mark += "; so does the `description` of the dataset"
    rows = Rows(selection.counts, configs, source, columns, f"{selection.words} {note}".strip(), mark)
    results = Results(status.measures, status.control, status.verified)
    return dataset_card(config, effect_of(config, folder.pattern, status.effect), results, rows)
