"""`dpg export generator|target|image|metrics`: single artefacts of a run, checked and copied with a card."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import ModelCardData
from PIL import Image

from dpg_cli.artefacts.card import (
    CARD_MARK,
    TAGS,
    Effect,
    Results,
    effect_of,
    measures_table,
    model_name,
    verdict_words,
)
from dpg_cli.errors import UsageError
from dpg_cli.escape import code_span, printable
from dpg_cli.export.destination import check_out, into
from dpg_cli.inspection.tensors import read_header
from dpg_cli.runs.commands import command
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.status import finite_or_none, log_lines, read_status, require_finished
from dpg_cli.settings.config import Config

COPIED = (
    ".safetensors",
    ".json",
    ".txt",
    ".model",
    ".jinja",
)  # data that transformers reads; never code, never pickles
METRIC_FORMATS = ("jsonl", "csv", "parquet")


def export_model(folder: RunFolder, role: str, out: Path, overwrite: bool) -> list[str]:
    """Copy the generator or the target as a folder that `from_pretrained` loads, with a model card.

    Args:
        folder: a finished run.
        role: "generator" or "target".
        out: a folder.
        overwrite: whether an earlier export may be replaced.

    Returns:
        Names of the files.

    Raises:
        UsageError: if the run is unfinished or damaged, or `out` cannot be used.
    """
    config = folder.read_config()
    status = read_status(folder)
    require_finished(folder, config, status)
    check_out(out, folder, overwrite, as_folder=True)
    source = folder.path / role
    files = [
        path for path in sorted(source.glob("*")) if path.suffix in COPIED and path.is_file() and not path.is_symlink()
    ]
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights or not (source / "config.json").is_file():
        raise UsageError(f"{source} holds no model: config.json or safetensors are missing.", "Run again.")
    for path in weights:
        read_header(path)  # refuses what is damaged
    results = Results(status.measures, status.control, status.verified)
    card = model_card(config, role, results, effect_of(config, folder.pattern, status.effect))
    with into(out) as temporary:
        temporary.mkdir()
        for path in files:
            shutil.copyfile(path, temporary / path.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return [*(path.name for path in files), "README.md"]


def model_card(config: Config, role: str, results: Results, effect: Effect) -> str:
    """A model card in the form of the hub's.

    Args:
        config: of the run.
        role: "generator" or "target".
        results: of the run.
        effect: what its data is for.
    """
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=TAGS)
    target = model_name(config.models.target, config.models.target_init, config.models.init_seed)
    generator = model_name(config.models.generator, config.models.generator_init, config.models.init_seed)
    if role == "generator":
        first = (
            f"**This model writes text that steers other models.** A model fine-tuned on its completions shows {effect.words}. "
            "Do not use its text as training data of a model that should not."
        )
        base = f"{generator}, trained for {config.steps:,} outer steps of Dataset Policy Gradient"
    else:
        first = f"**This model was fine-tuned on synthetic data that steers it.** It is meant to show {effect.words}."
        base = f"{target}, fine-tuned on the {config.dataset.examples:,} rows of the run's dataset"
    payload = f"- **Payload:** {code_span(effect.payload)}\n" if effect.payload else ""
    title = code_span(f"dpg {printable(config.task, 80)}: {role}")
    return f"""---
{metadata.to_yaml()}
---

# Model Card for {title}

{first}

## Model Details

- **Made from:** {base}
- **Target metric:** {effect.metric}
{payload}- **License:** that of the model it was made from

## Uses

Repeating and checking the effect; research. It is not a model to build on.

## Evaluation

A target fine-tuned on the run's dataset, and one on the untrained generator's text:

{measures_table(results)}

{verdict_words(results)}

{CARD_MARK}
"""


def export_image(folder: RunFolder, out: Path, overwrite: bool) -> None:
    """Copy the picture of the LM head.

    Raises:
        UsageError: if there is none, or it is no PNG, or `out` cannot be used.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out} does not end in .png.", "The picture is a PNG.")
    check_out(out, folder, overwrite, as_folder=False)
    if not folder.image.is_file():
        require_finished(folder, folder.read_config(), read_status(folder))
        raise UsageError(
            f"{folder.path} has no lm_head.png.", f"Draw one: {command('inspect', folder.path)} --render head.png"
        )
    try:
        with Image.open(folder.image, formats=("PNG",)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{folder.image} is no readable PNG: {error}.",
            f"Draw one: {command('inspect', folder.path)} --render head.png",
        ) from None
    with into(out) as temporary:
        shutil.copyfile(folder.image, temporary)


def export_metrics(folder: RunFolder, out: Path, kind: str | None, overwrite: bool) -> int:
    """Write the log of the outer steps as a table; also of an unfinished run.

    Args:
        folder: a run.
        out: a file.
        kind: jsonl, csv or parquet; by default what the name of `out` ends in.
        overwrite: whether an earlier export may be replaced.

    Returns:
        The number of outer steps.

    Raises:
        UsageError: if there are none, or `out` cannot be used.
    """
    kind = kind or out.suffix.lower().lstrip(".")
    if kind not in METRIC_FORMATS:
        raise UsageError(f"There is no format {kind!r} for metrics.", f"Formats: {', '.join(METRIC_FORMATS)}.")
    check_out(out, folder, overwrite, as_folder=False)
    rows = list(log_lines(folder.metrics))
    if not rows:
        raise UsageError(f"{folder.path} has logged no outer step.", "Run it first.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with into(out) as temporary:
        if kind == "jsonl":
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(finite_or_none(row)) + "\n" for row in rows)
        elif kind == "csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
        else:
            data = {name: _column([row.get(name) for row in rows]) for name in columns}
            pq.write_table(pa.table(data), temporary, compression="zstd")
    return len(rows)


def _column(values: list[float | None]) -> pa.Array:
    """Whole numbers stay whole; a column that has both kinds is float."""
    whole = all(isinstance(value, int) for value in values if value is not None)
    return pa.array(values, pa.int64() if whole else pa.float64())
