"""A short real run, made once, and the command line called within the test's process."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpg_cli.cli import main
from dpg_cli.driver.execute import execute
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.presets import find, resolve

EXAMPLES = 48
SETTINGS = [
    "steps=2",
    f"dataset.examples={EXAMPLES}",
    "prompts.per_step=8",
    "rollout.max_tokens=12",
    "rollout.min_tokens=4",
    "inner.batch_size=16",
    'metric.text="HI"',
]


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str


def make_run(path: Path, *settings: str, preset: str = "qr-embed.tiny") -> Path:
    """A finished run of two outer steps."""
    config = resolve(find(preset).data(), [*(SETTINGS if preset.startswith("qr") else []), *settings])
    execute(config, RunFolder(path))
    return path


def copy_of(run: Path, path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(run, path)
    return path


def rewrite_rows(run: Path, **columns: list[Any]) -> pa.Table:
    """Put other values into columns of the run's dataset."""
    place = run / "dataset" / "train.parquet"
    table = pq.read_table(place)
    for name, values in columns.items():
        column = pa.array(values, table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, place)
    return table


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> Answer:
    """Run `dpg` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["dpg", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    said = capsys.readouterr()
    return Answer(code, said.out, said.err)
