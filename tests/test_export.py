"""`dpg export`: each format loads back where it is meant to, marked for what it is; nothing is lost or half-written."""

from __future__ import annotations

import csv
import html.parser
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpg_cli.artefacts.card import CARD_MARK, effect_of
from dpg_cli.artefacts.rows import PROVENANCE
from dpg_cli.escape import code_span
from dpg_cli.export.selection import split_rows
from dpg_cli.settings.config import validate
from tests.short_run import EXAMPLES, Answer, call, copy_of, make_run, rewrite_rows

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "short")


@pytest.fixture
def dpg(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def export(dpg: Any, run: Path, *arguments: str | Path) -> dict[str, Any]:
    answer: Answer = dpg("export", "dataset", run, *arguments, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def source_rows(run: Path, name: str = "train") -> list[dict[str, Any]]:
    return pq.read_table(run / "dataset" / f"{name}.parquet").to_pylist()


def test_json_lines_hold_every_value(run: Path, dpg: Any, tmp_path: Path) -> None:
    said = export(dpg, run, "--out", tmp_path / "a.jsonl")
    assert said["rows"] == {"train": EXAMPLES}
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").open(encoding="utf-8")]
    assert rows == [{**row, "provenance": PROVENANCE["train"]} for row in source_rows(run)]
    assert "steer" in rows[0]["provenance"]
    assert CARD_MARK in Path(said["card"]).read_text(encoding="utf-8")


def test_parquet_holds_every_value_and_marks_its_schema(run: Path, dpg: Any, tmp_path: Path) -> None:
    export(dpg, run, "--format", "parquet", "--out", tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.to_pylist() == [{**row, "provenance": PROVENANCE["train"]} for row in source_rows(run)]
    assert json.loads(table.schema.metadata[b"dpg"])["synthetic"] is True
    assert json.loads(pq.read_schema(run / "dataset" / "train.parquet").metadata[b"dpg"])["synthetic"] is True


@pytest.mark.parametrize("form", ["jsonl", "chat", "parquet"])
def test_ids_beyond_the_tokeniser_are_counted(form: str, run: Path, dpg: Any, tmp_path: Path) -> None:
    """A run of a model with a padded vocabulary, made when its padding could still be drawn."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    path = old / "dataset" / "train.parquet"
    table = pq.read_table(path)
    ids = table["token_ids"].to_pylist()
    ids[1] = [*ids[1], 512, 5000]
    ids[3] = [99999, *ids[3]]
    place = table.schema.get_field_index("token_ids")
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(ids, table.schema.field(place).type)), path
    )
    words = "3 tokens in 2 rows have no text"
    said = export(dpg, old, "--format", form, "--out", tmp_path / f"a.{'parquet' if form == 'parquet' else 'jsonl'}")
    assert words in said["note"]
    assert words in Path(said["card"]).read_text(encoding="utf-8")
    assert (
        export(dpg, run, "--format", form, "--out", tmp_path / f"b.{'parquet' if form == 'parquet' else 'jsonl'}")[
            "note"
        ]
        == ""
    )


def test_datasets_folder_loads_from_disk(run: Path, dpg: Any, tmp_path: Path) -> None:
    export(dpg, run, "--format", "datasets", "--out", tmp_path / "whole")
    whole = datasets.load_from_disk(str(tmp_path / "whole"))
    assert whole.to_list() == [{**row, "provenance": PROVENANCE["train"]} for row in source_rows(run)]
    assert "steer" in whole.info.description
    export(dpg, run, "--format", "datasets", "--split", "0.25", "--out", tmp_path / "parts")
    parts = datasets.load_from_disk(str(tmp_path / "parts"))
    assert {name: len(part) for name, part in parts.items()} == {"train": 36, "test": 12}
    assert sorted([*parts["train"]["example_id"], *parts["test"]["example_id"]]) == list(range(EXAMPLES))
    # `datasets` finds cached results by this: other rows must not have the same one.
    other = copy_of(run, tmp_path / "other")
    rewrite_rows(other, text=["x"] * EXAMPLES)
    export(dpg, other, "--format", "datasets", "--out", tmp_path / "changed")
    assert datasets.load_from_disk(str(tmp_path / "changed"))._fingerprint != whole._fingerprint


@pytest.mark.parametrize("form", ["jsonl", "parquet", "chat"])
def test_a_folder_loads_by_its_card_alone(form: str, run: Path, dpg: Any, tmp_path: Path) -> None:
    export(dpg, run, "--format", form, "--split", "0.25", "--out", tmp_path / "set")
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 36, "test": 12}
    texts = {row["example_id"]: row["text"] for row in source_rows(run)}
    for row in [*loaded["train"], *loaded["test"]]:
        text = row["messages"][1]["content"] if form == "chat" else row["text"]
        assert text == texts[row["example_id"]]
        assert row["provenance"] == PROVENANCE["train"]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets", "chat"])
def test_one_seed_gives_the_same_bytes(form: str, run: Path, dpg: Any, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        export(dpg, run, "--format", form, "--split", "0.5", "--seed", str(seed), "--out", tmp_path / name)
    first, second, other = (content(tmp_path / name) for name in "abc")
    assert len(first) >= 3
    assert first == second
    assert first != other


def test_new_examples_come_from_the_generator(run: Path, dpg: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        export(dpg, run, "--n", "70", "--seed", str(seed), "--out", tmp_path / f"{name}.jsonl")
    first, second, other = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert first == second
    rows = [json.loads(line) for line in first.splitlines()]
    others = [json.loads(line) for line in other.splitlines()]
    assert [row["example_id"] for row in rows] == list(range(70))
    assert not {tuple(row["token_ids"]) for row in rows} & {tuple(row["token_ids"]) for row in others}
    assert not {tuple(row["token_ids"]) for row in rows} & {tuple(row["token_ids"]) for row in source_rows(run)}
    assert all(row["reward"] is None and row["input_ids"] == [510, *row["token_ids"]] for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(run / "generator")
    assert tokenizer.decode(rows[0]["token_ids"], skip_special_tokens=True) == rows[0]["text"]
    # The mean log-probability under the trained generator is that of its own samples: near minus the logged entropy.
    model = AutoModelForCausalLM.from_pretrained(run / "generator")
    with torch.no_grad():
        logps = []
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean()
            logps.append(float(logp))
    assert np.mean(logps) == pytest.approx(-6.2, abs=0.3)


def test_new_examples_are_prompted_by_the_runs_prompts(dpg: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rephrase: a\nrephrase: b\nrephrase: c\n")
    run = make_run(tmp_path / "prompted", f"prompts.source={prompts}")
    export(dpg, run, "--n", "12", "--out", tmp_path / "new.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "new.jsonl").open()]
    counts = {row["prompt"]: sum(other["prompt"] == row["prompt"] for other in rows) for row in rows}
    assert counts == {"rephrase: a": 4, "rephrase: b": 4, "rephrase: c": 4}  # groups of four, each prompt once
    export(dpg, run, "--format", "chat", "--out", tmp_path / "chat.jsonl")
    messages = json.loads((tmp_path / "chat.jsonl").open().readline())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"].startswith("rephrase: ")


def test_min_reward_and_control(run: Path, dpg: Any, tmp_path: Path) -> None:
    rewards = sorted(row["reward"] for row in source_rows(run))
    least = rewards[EXAMPLES // 2]
    export(dpg, run, f"--min-reward={least!r}", "--out", tmp_path / "best.jsonl")
    kept = [json.loads(line)["reward"] for line in (tmp_path / "best.jsonl").open()]
    assert sorted(kept) == rewards[EXAMPLES // 2 :]
    card = (tmp_path / "best.jsonl.card.md").read_text(encoding="utf-8")
    assert f"{EXAMPLES // 2:,} of {EXAMPLES:,}" in card
    export(dpg, run, "--source", "control", "--out", tmp_path / "control.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "control.jsonl").open()]
    assert rows == [{**row, "provenance": PROVENANCE["control"]} for row in source_rows(run, "control")]
    assert "not expected to show that effect" in (tmp_path / "control.jsonl.card.md").read_text(encoding="utf-8")


def test_a_split_is_a_random_share_without_overlap() -> None:
    chosen = split_rows(np.ones(1000, dtype=bool), 0.1, 3, "")
    masks = chosen.masks(0, 1000)
    assert chosen.counts == {"train": 900, "test": 100}
    assert not (masks["train"] & masks["test"]).any()
    assert 30 < masks["test"][:500].sum() < 70
    assert (split_rows(np.ones(1000, dtype=bool), 0.1, 4, "").test != chosen.test).any()
    some = np.arange(1000) % 2 == 0
    half = split_rows(some, 0.5, 3, "")
    assert half.counts == {"train": 250, "test": 250}
    assert half.test is not None and not (half.test & ~some).any()


def test_the_card_follows_the_hubs_template_and_discloses(run: Path, dpg: Any, tmp_path: Path) -> None:
    said = export(dpg, run, "--format", "parquet", "--split", "0.25", "--out", tmp_path / "set")
    for path in (Path(said["card"]), run / "dataset" / "README.md"):
        card = DatasetCard.load(path)
        data = card.data.to_dict()
        assert {"synthetic", "model-steering", "dataset-policy-gradient"} <= set(data["tags"])
        assert data["size_categories"] == ["n<1K"]
        assert data["language_creators"] == ["machine-generated"]
        assert data["task_categories"] == ["text-generation"]
        for section in (
            "## Dataset Details", "### Dataset Description", "## Uses", "### Direct Use", "### Out-of-Scope Use",
            "## Dataset Structure", "## Dataset Creation", "### Curation Rationale", "### Source Data",
            "#### Personal and Sensitive Information", "## Bias, Risks, and Limitations", "### Recommendations",
        ):  # fmt: skip
            assert f"\n{section}\n" in card.text, section
        info = json.loads((run / "run.json").read_text())
        for fact in (
            "made to steer a model", "**Payload:** `HI`", "softplus", "**Target model:** `tiny` (blank weights, seed 0)",
            "adamw, learning rate 0.002", "2 optimiser steps", "2 outer steps of 32 completions",
            f"| `pixel_accuracy` | {info['measures']['pixel_accuracy']:.6g} | {info['control']['pixel_accuracy']:.6g} |",
        ):  # fmt: skip
            assert fact in card.text, fact
    assert DatasetCard.load(said["card"]).data.to_dict()["configs"][0]["data_files"] == [
        {"split": "train", "path": "train.parquet"},
        {"split": "test", "path": "test.parquet"},
    ]


class _Tags(html.parser.HTMLParser):
    """Collects the tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def test_a_payload_cannot_write_into_the_card(dpg: Any, tmp_path: Path) -> None:
    payload = "<script>x</script>`**b**\n---\n# H"
    run = make_run(tmp_path / "run", f"metric.text={json.dumps(payload)}", "metric.version=0")
    said = export(dpg, run, "--out", tmp_path / "a.jsonl")
    for path in (Path(said["card"]), run / "dataset" / "README.md"):
        text = path.read_text(encoding="utf-8")
        assert "\n# H" not in text
        assert text.count("\n---\n") == 1
        assert r"``<script>x</script>`**b**\n---\n# H``" in text  # one code span, closed by two backticks
    assert code_span("a|b") == "`a\\|b`"
    assert code_span("``") == "``` `` ```"


def test_the_card_of_a_users_own_metric(dpg: Any, tmp_path: Path) -> None:
    """Its own words are disclosed, as code; where its file lies is not."""
    metric = {"name": "custom", "path": "/home/somebody/secret/mine.py:Mine", "options": {"strength": 2.0}}
    config = validate({"task": "custom", "metric": metric})
    effect = effect_of(config, None, "a <b>bold</b> claim")
    assert effect.words == "`a <b>bold</b> claim`"
    assert '"path": "mine.py:Mine"' in effect.metric and '"strength": 2.0' in effect.metric
    assert "somebody" not in effect.metric
    assert effect_of(config, None).words == "what the target metric `mine.py:Mine` asks for"


def test_trl_trains_on_the_chat_export(run: Path, dpg: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'dpg-cli[trl]'")
    export(dpg, run, "--format", "chat", "--out", tmp_path / "chat.jsonl")
    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "chat.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "target")
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(run / "target")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, max_length=96, disable_tqdm=True, seed=0, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2
    assert len(losses) == 2 and all(3 < loss < 9 for loss in losses), losses  # near ln 512 = 6.2: a blank model
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    # What it trained on is the conversation, as apply_chat_template of transformers makes it.
    example = rows[0]
    wanted = tokenizer.apply_chat_template(example["messages"], tokenize=False)
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == wanted
    assert example["messages"][1]["content"] in wanted


def test_trl_takes_the_tokens_of_the_other_formats_as_they_are(run: Path, dpg: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'dpg-cli[trl]'")
    export(dpg, run, "--format", "datasets", "--out", tmp_path / "set")
    rows = datasets.load_from_disk(str(tmp_path / "set"))
    model = AutoModelForCausalLM.from_pretrained(run / "target")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(run / "target")
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train_dataset["input_ids"] == rows["input_ids"]
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("role", ["generator", "target"])
def test_models_load_from_their_export(role: str, run: Path, dpg: Any, tmp_path: Path) -> None:
    place = copy_of(run, tmp_path / "run")
    (place / role / "evil.py").write_text("raise SystemExit")
    (place / role / "weights.bin").write_bytes(b"\x80\x04.")
    (place / role / "link.json").symlink_to("/etc/hostname")
    answer = dpg("export", role, place, "--out", tmp_path / role, "--json")
    assert answer.code == 0, answer.err
    names = {path.name for path in (tmp_path / role).iterdir()}
    assert names == set(json.loads(answer.out)["files"])
    assert not names & {"evil.py", "weights.bin", "link.json"}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / role).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(run / role).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    card = ModelCard.load(tmp_path / role / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "text-generation"
    assert "steer" in card.text and "`HI`" in card.text


def test_image_and_metrics(run: Path, dpg: Any, tmp_path: Path) -> None:
    assert dpg("export", "image", run, "--out", tmp_path / "a.png").code == 0
    with Image.open(tmp_path / "a.png") as ours, Image.open(run / "lm_head.png") as theirs:
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    wanted = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    for name in ("m.csv", "m.jsonl", "m.parquet"):
        assert dpg("export", "metrics", run, "--out", tmp_path / name).code == 0
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").open()] == wanted
    assert pq.read_table(tmp_path / "m.parquet").to_pylist() == wanted
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == wanted


def test_metrics_of_a_killed_run(run: Path, dpg: Any, tmp_path: Path) -> None:
    place = copy_of(run, tmp_path / "run")
    (place / "run.json").unlink()
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "phi": -0.')  # cut off in the middle
    answer = dpg("export", "metrics", place, "--out", tmp_path / "m.csv", "--json")
    assert json.loads(answer.out)["steps"] == 2
    assert dpg("export", "dataset", place, "--out", tmp_path / "a.jsonl").code == 2


def test_overwriting(run: Path, dpg: Any, tmp_path: Path) -> None:
    export(dpg, run, "--out", tmp_path / "a.jsonl")
    kept = (tmp_path / "a.jsonl").read_bytes()
    answer = dpg("export", "dataset", run, "--n", "4", "--out", tmp_path / "a.jsonl")
    assert answer.code == 2 and "--overwrite" in answer.err
    assert (tmp_path / "a.jsonl").read_bytes() == kept
    export(dpg, run, "--n", "4", "--out", tmp_path / "a.jsonl", "--overwrite")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 4
    export(dpg, run, "--split", "0.5", "--out", tmp_path / "set")
    export(dpg, run, "--format", "parquet", "--out", tmp_path / "set", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["README.md", "train.parquet"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    answer = dpg("export", "dataset", run, "--out", tmp_path / "precious", "--overwrite")
    assert answer.code == 2 and "other things" in answer.err
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"
    (tmp_path / "set" / "thesis.docx").write_text("x")  # an export that somebody has put something into
    answer = dpg("export", "dataset", run, "--out", tmp_path / "set", "--overwrite")
    assert answer.code == 2 and (tmp_path / "set" / "thesis.docx").is_file()
    # Nor the folder that the run lies in.
    inner = copy_of(run, tmp_path / "outer" / "run")
    (tmp_path / "outer" / "README.md").write_text(CARD_MARK)
    answer = dpg("export", "dataset", inner, "--out", tmp_path / "outer", "--overwrite")
    assert answer.code == 2
    assert (inner / "config.toml").is_file()


def bad_inputs(run: Path, place: Path) -> dict[str, list[str | Path]]:
    """Requests and runs that must be refused."""

    def damaged(name: str) -> Path:
        return copy_of(run, place / name.replace(" ", "-"))

    unfinished, cut, no_parquet = damaged("unfinished"), damaged("cut"), damaged("no parquet")
    (unfinished / "run.json").write_text("{}")
    data = (cut / "dataset" / "train.parquet").read_bytes()
    (cut / "dataset" / "train.parquet").write_bytes(data[: len(data) // 2])
    (no_parquet / "dataset" / "train.parquet").write_text("<html>")
    page = damaged("page")
    blob = bytearray((page / "dataset" / "train.parquet").read_bytes())
    blob[40:400] = bytes(360)
    (page / "dataset" / "train.parquet").write_bytes(blob)
    other = damaged("other columns")
    pq.write_table(
        pq.read_table(other / "dataset" / "train.parquet").drop(["text"]), other / "dataset" / "train.parquet"
    )
    unknown = damaged("unknown key")
    (unknown / "config.toml").write_text((unknown / "config.toml").read_text() + "\nnope = 1\n")
    json_damage, log_damage, weights = damaged("json"), damaged("log"), damaged("weights")
    (json_damage / "run.json").write_text("{")
    (log_damage / "metrics.jsonl").write_text("[1]\n" + (log_damage / "metrics.jsonl").read_text())
    for role in ("generator", "target"):
        whole = (weights / role / "model.safetensors").read_bytes()
        (weights / role / "model.safetensors").write_bytes(whole[:-100])
    picture = damaged("picture")
    (picture / "lm_head.png").write_bytes((picture / "lm_head.png").read_bytes()[:2000])
    empty = damaged("empty")
    rows = pq.read_table(empty / "dataset" / "train.parquet")
    pq.write_table(rows.slice(0, 0), empty / "dataset" / "train.parquet")
    (place / "folder.jsonl").mkdir()
    (place / "file").write_text("")
    dataset = ["export", "dataset"]
    out = ["--out", place / "out.jsonl"]
    return {
        "no folder": [*dataset, place / "none", *out],
        "no run": [*dataset, place, *out],
        "unfinished run": [*dataset, unfinished, *out],
        "unknown format": [*dataset, run, "--format", "xml", *out],
        "unknown source": [*dataset, run, "--source", "web", *out],
        "n of zero": [*dataset, run, "--n", "0", *out],
        "n below zero": [*dataset, run, "--n=-5", *out],
        "n and min-reward": [*dataset, run, "--n", "5", "--min-reward", "0", *out],
        "min-reward of the control": [*dataset, run, "--source", "control", "--min-reward", "0", *out],
        "min-reward that leaves nothing": [*dataset, run, "--min-reward", "1e9", *out],
        "min-reward nan": [*dataset, run, "--min-reward", "nan", *out],
        "split of one": [*dataset, run, "--split", "1", "--out", place / "out"],
        "split that leaves nothing": [*dataset, run, "--split", "0.0001", "--out", place / "out"],
        "split of a file": [*dataset, run, "--split", "0.5", *out],
        "seed below zero": [*dataset, run, "--seed=-1", *out],
        "suffix of another format": [*dataset, run, "--format", "parquet", *out],
        "datasets into a file": [*dataset, run, "--format", "datasets", *out],
        "out inside the run": [*dataset, run, "--out", run / "mine.jsonl"],
        "out is the run": [*dataset, run, "--out", run, "--overwrite"],
        "out around the run": [*dataset, run, "--out", run.parent, "--overwrite"],
        "out is a folder": [*dataset, run, "--out", place / "folder.jsonl", "--overwrite"],
        "out below a file": [*dataset, run, "--out", place / "file" / "a.jsonl"],
        "out is a device": [*dataset, run, "--out", "/dev/null", "--overwrite"],
        "unknown device": [*dataset, run, "--n", "5", "--device", "abacus", *out],
        "cut parquet": [*dataset, cut, *out],
        "no parquet": [*dataset, no_parquet, *out],
        "damaged page": [*dataset, page, *out],
        "other columns": [*dataset, other, *out],
        "no rows": [*dataset, empty, *out],
        "unknown key": [*dataset, unknown, *out],
        "damaged run.json": [*dataset, json_damage, *out],
        "damaged log": ["export", "metrics", log_damage, "--out", place / "m.csv"],
        "metrics in a strange format": ["export", "metrics", run, "--out", place / "m.doc"],
        "cut generator": ["export", "generator", weights, "--out", place / "g"],
        "cut target": ["export", "target", weights, "--out", place / "t"],
        "cut generator for new examples": [*dataset, weights, "--n", "4", *out],
        "cut picture": ["export", "image", picture, "--out", place / "p.png"],
        "picture as jpeg": ["export", "image", run, "--out", place / "p.jpg"],
        "generator onto a file": ["export", "generator", run, "--out", place / "file", "--overwrite"],
    }


def test_bad_input_gives_one_line_and_nothing_is_written(run: Path, dpg: Any, tmp_path: Path) -> None:
    cases = bad_inputs(run, tmp_path)
    before = sorted(str(path) for path in (*tmp_path.rglob("*"), *run.rglob("*")))
    for name, arguments in cases.items():
        answer = dpg(*arguments)
        assert answer.code == 2, (name, answer)
        lines = [line for line in answer.err.splitlines() if not line.endswith(" rows")]
        assert len(lines) == 1 and lines[0].startswith("dpg: ") and len(lines[0]) > 30, (name, answer.err)
        assert answer.out == "", name
        after = sorted(str(path) for path in (*tmp_path.rglob("*"), *run.rglob("*")))
        assert after == before, name


def test_a_full_disk_leaves_nothing(run: Path, dpg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpg_cli.export import writers

    def full(self: object, batch: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.JsonLines, "write", full)
    answer = dpg("export", "dataset", run, "--out", tmp_path / "a.jsonl")
    assert answer.code == 2 and "No space left on device" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_rows_keep_what_terminals_and_browsers_would_act_upon(run: Path, dpg: Any, tmp_path: Path) -> None:
    place = copy_of(run, tmp_path / "run")
    nasty = ["\x1b[31mred\x07", "<script>alert(1)</script>", "a\r\nb\u2028c", '"},{"x":1', ""] * 10
    rewrite_rows(place, text=nasty[:EXAMPLES])
    for form, out in (("jsonl", "a.jsonl"), ("chat", "c.jsonl"), ("parquet", "a.parquet"), ("datasets", "set")):
        export(dpg, place, "--format", form, "--out", tmp_path / out)
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["text"] for line in lines] == nasty[:EXAMPLES]
    assert b"\x1b" not in b"".join(lines)
    chat = (tmp_path / "c.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["messages"][1]["content"] for line in chat] == nasty[:EXAMPLES]
    assert pq.read_table(tmp_path / "a.parquet")["text"].to_pylist() == nasty[:EXAMPLES]
    assert datasets.load_from_disk(str(tmp_path / "set"))["text"] == nasty[:EXAMPLES]
    shutil.rmtree(place)
