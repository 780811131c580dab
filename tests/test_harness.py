"""Held-out documents of lm-eval tasks: with a stand-in for the library, and with the library where it is installed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from dpg_cli.data.harness import document_text, task_documents
from dpg_cli.errors import UsageError
from dpg_cli.metrics.registry import held_out
from dpg_cli.settings.config import TextLossOptions


class FakeTask:
    """A task with a test split, as lm-eval hands it out."""

    OUTPUT_TYPE = "loglikelihood"

    def __init__(self, rows: list[tuple[str, object]]) -> None:
        self.rows = rows

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[tuple[str, object]]:
        return self.rows

    def doc_to_text(self, row: tuple[str, object]) -> str:
        return row[0]

    def doc_to_target(self, row: tuple[str, object]) -> object:
        return row[1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"some_es": FakeTask([("uno dos", " tres"), (" ", ""), ("a", "b")]), "empty": FakeTask([])}

    class TaskManager:
        all_tasks = (*tasks, "remote")

        def load(self, names: list[str]) -> dict[str, dict[str, FakeTask]]:
            if names == ["remote"]:
                raise ConnectionError("Couldn't reach 'x' on the Hub")
            return {"tasks": {name: tasks[name] for name in names}}

    module = ModuleType("lm_eval.tasks")
    module.TaskManager = TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", module)


def test_documents_of_a_task(fake: None) -> None:
    assert task_documents("some_es", 10) == ["uno dos tres", "a b"]
    assert task_documents("some_es", 1) == ["uno dos tres"]
    options = TextLossOptions(name="text-loss", language="es", file="lm-eval:some_{language}")
    assert held_out(options) == (["uno dos tres", "a b"], "2 documents of lm-eval:some_es")


def test_joining_text_and_target() -> None:
    task = FakeTask([])
    assert document_text(task, ("a", "b")) == "a b"
    assert document_text(task, ("a\n", "b")) == "a\nb"
    assert document_text(task, ("", "b")) == "b"
    assert document_text(task, ("a", ["b", "c"])) == "a b"
    choice = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        doc_to_text=lambda row: "q",
        doc_to_target=lambda row: 1,
        doc_to_choice=lambda row: ["x", "y"],
    )
    assert document_text(choice, None) == "q y"


def test_what_cannot_be_had_gives_one_line(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in {
        "nope": "knows no task 'nope'",
        "empty": "has no documents",
        "remote": "hub cannot be reached",
    }.items():
        with pytest.raises(UsageError, match=words) as caught:
            task_documents(name, 3)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"lm-eval:some_es needs .* pip install 'dpg-cli\[lm-eval\]'"):
        task_documents("some_es", 3)


def test_a_local_task_with_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="the extra `lm-eval` is not installed")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for text in ("el gato pinta un barco", "la luna mira el mar"):
            file.write(json.dumps({"text": text}) + "\n")
    (tmp_path / "local.yaml").write_text(
        f"""task: local_es
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "rows.jsonl"}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - metric: acc
"""
    )
    local = functools.partial(tasks.TaskManager, include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", local)
    assert task_documents("local_es", 5) == ["el gato pinta un barco", "la luna mira el mar"]
    assert task_documents("local_es", 1) == ["el gato pinta un barco"]
