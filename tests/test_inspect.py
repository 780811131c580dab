"""`dpg inspect`: what it says is true, what it draws is what is there, and nothing in a folder can act upon the reader."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpg_cli.errors import UsageError
from dpg_cli.escape import code_span, printable
from dpg_cli.evidence.verify import head_signs
from dpg_cli.inspection.history import read_history, series_of, sparkline
from dpg_cli.inspection.look import look
from dpg_cli.inspection.picture import draw
from dpg_cli.inspection.tensors import read_header
from dpg_cli.models.loading import load_target
from dpg_cli.patterns.pattern import pattern_from_image, pixel_accuracy
from dpg_cli.patterns.render import render_matrix
from dpg_cli.runs.folder import RunFolder
from dpg_cli.tiny import MODEL_DIR
from tests.short_run import EXAMPLES, call, copy_of, make_run, rewrite_rows

NASTY = "\x1b[31mred\x07 [bold]b[/bold] <script>x</script>\u202e\u2028 :smile:"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "short")


@pytest.fixture
def dpg(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def as_json(dpg: Any, path: Path, *arguments: str) -> dict[str, Any]:
    answer = dpg("inspect", path, *arguments, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_said_of_a_run_is_true(run: Path, dpg: Any) -> None:
    said = as_json(dpg, run)
    info = json.loads((run / "run.json").read_text())
    log = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    rows = pq.read_table(run / "dataset" / "train.parquet").to_pylist()
    assert (said["schema"], said["kind"], said["finished"], said["steps_done"]) == (1, "run", True, 2)
    assert said["measures"] == info["measures"] and said["control"] == info["control"]
    assert said["verified"] is None
    assert said["asked"]["payload"] == "HI"
    assert said["settings"]["inner"]["lr"] == 2e-3
    phi = said["history"]["columns"]["phi"]
    assert (phi["first"], phi["last"], phi["chart"]) == (log[0]["phi"], log[1]["phi"], [log[0]["phi"], log[1]["phi"]])
    assert said["history"]["columns"].keys() == log[0].keys() - {"step"}
    # Models: counts, and the head's norm, by torch.
    for role in ("generator", "target"):
        model = AutoModelForCausalLM.from_pretrained(run / role)
        shown = said["models"][role]
        assert shown["parameters"] == sum(p.numel() for p in model.parameters()) == 334_464
        assert shown["dtypes"] == {"F32": 334_464}
        assert shown["head"]["shape"] == [512, 96] and shown["head"]["tied"] is False
        assert shown["head"]["norm"] == pytest.approx(float(model.lm_head.weight.detach().double().norm()), rel=1e-9)
    # The patch: by the means of `dpg verify`.
    patch = load_file(run / "target" / "patch.safetensors")
    change = patch["after"].double() - patch["before"].double()
    assert said["patch"]["norm_change"] == pytest.approx(float(change.norm()), rel=1e-9)
    assert said["patch"]["norm_before"] == pytest.approx(float(patch["before"].double().norm()), rel=1e-9)
    assert said["patch"]["pixel_accuracy"] == pytest.approx(info["measures"]["pixel_accuracy"], abs=1e-12)
    assert said["patch"]["wanted"] == "HI" and said["patch"]["read"] is None
    assert len(said["patch"]["drawing"]) == 11
    # The dataset, and its best and worst rows.
    rewards = [row["reward"] for row in rows]
    shown = said["datasets"]["train"]
    assert shown["rows"] == EXAMPLES
    assert shown["rewards"]["mean"] == pytest.approx(np.mean(rewards), rel=1e-9)
    assert shown["rewards"]["std"] == pytest.approx(np.std(rewards), rel=1e-9)
    highest = shown["samples"]["highest"]
    assert [sample["reward"] for sample in highest] == sorted(rewards, reverse=True)[:3]
    assert [sample["reward"] for sample in shown["samples"]["lowest"]] == sorted(rewards)[:3]
    assert all(rows[sample["row"]]["text"] == sample["text"] for sample in highest)
    assert said["datasets"]["control"]["rewards"] is None


def test_the_terminal_shows_it(run: Path, dpg: Any) -> None:
    answer = dpg("inspect", run)
    assert answer.code == 0, answer.err
    for text in (
        "finished",
        "334,464 in 29 tensors",
        "pixel accuracy",
        "wanted 'HI'",
        "wrong cells",
        "History: 2 outer steps",
    ):
        assert text in answer.out, text
    (phi,) = [line for line in answer.out.splitlines() if line.startswith("  phi ") and ("▁" in line or "█" in line)]
    assert "▁█" in phi or "█▁" in phi
    assert answer.err == ""


def test_a_verdict_is_shown_while_it_is_of_this_dataset(run: Path, dpg: Any, tmp_path: Path) -> None:
    place = copy_of(run, tmp_path / "run")
    (place / "verify.json").write_text(json.dumps({"verified": True, "lines": [NASTY]}))
    assert as_json(dpg, place)["verified"] is True
    assert "\x1b" not in dpg("inspect", place).out
    (place / "verify.json").write_text(json.dumps({"verified": True, "dataset_sha256": "00"}))
    assert as_json(dpg, place)["verified"] is None
    assert "another now than was verified" in dpg("inspect", place).out


def test_a_killed_run_is_shown_as_far_as_it_came(run: Path, dpg: Any, tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    (place / "config.toml").write_bytes((run / "config.toml").read_bytes())
    said = as_json(dpg, place)
    assert (said["finished"], said["steps_done"], said["measures"]) == (False, 0, {})
    assert said["patch"] is None and said["datasets"] == {} and said["models"] == {}
    (place / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-5])
    answer = dpg("inspect", place)
    assert answer.code == 0 and "not finished, 1 of 2 outer steps done" in answer.out
    assert "pixel_accuracy" in answer.out  # known from the log's order alone


def test_every_kind_has_the_same_keys(run: Path, dpg: Any) -> None:
    said = [as_json(dpg, path) for path in (run, run / "target", run / "target" / "patch.safetensors", MODEL_DIR)]
    assert [one["kind"] for one in said] == ["run", "model", "tensors", "model"]
    assert all(one.keys() == said[0].keys() for one in said)
    assert said[1]["role"] == "target" and said[3]["role"] is None
    assert said[1]["patch"] == said[0]["patch"] == said[2]["patch"]
    tensors = {entry["name"]: entry for entry in said[1]["tensors"]}
    weights = load_file(run / "target" / "model.safetensors")
    assert tensors.keys() == weights.keys()
    for name, value in weights.items():
        assert tensors[name]["shape"] == list(value.shape)
        assert tensors[name]["norm"] == pytest.approx(float(value.double().norm()), rel=1e-9, abs=1e-12)
    head = said[3]["models"]["model"]["head"]
    assert head["tied"] is True and head["name"] == "transformer.wte.weight"


def test_a_checkpoint_of_a_run(run: Path, dpg: Any) -> None:
    assert as_json(dpg, run)["checkpoints"] == ["step-2"]
    said = as_json(dpg, run / "checkpoints" / "step-2")
    assert said["kind"] == "checkpoint" and said["state"]["state.json"]["step"] == 2
    # After the last outer step the checkpoint's generator is the one that the run leaves.
    kept = as_json(dpg, run / "generator")["models"]["generator"]
    assert said["models"]["generator"]["head"] == kept["head"]
    assert said["models"]["generator"]["parameters"] == 334_464
    assert said["models"]["optimizer"]["parameters"] == 2 * 334_464 + 29  # two moments, and a step a tensor
    assert said["settings"] == as_json(dpg, run)["settings"]
    assert said["history"] == as_json(dpg, run)["history"]
    assert said["history"]["steps"] == 2
    answer = dpg("inspect", run / "checkpoints" / "step-2")
    assert "step-2: checkpoint after outer step 2 of 2, run of qr-embed (tiny)\n" in answer.out


def test_a_checkpoint_shows_the_log_up_to_it(run: Path, dpg: Any, tmp_path: Path) -> None:
    copy_of(run, tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / "step-1"
    (tmp_path / "run" / "checkpoints" / "step-2").rename(place)
    header = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**header, "step": 1}))
    history = as_json(dpg, place)["history"]
    whole = as_json(dpg, run)["history"]
    assert history["steps"] == 1
    assert history["columns"]["phi"]["last"] == whole["columns"]["phi"]["first"]
    for odd in (
        {**header, "step": -1},
        {**header, "step": "x"},
        {**header, "settings": {"steps": "x"}},
        {"step": True},
    ):
        (place / "state.json").write_text(json.dumps(odd))
        assert dpg("inspect", place).code == 0
        assert as_json(dpg, place)["kind"] == "checkpoint"


def test_a_checkpoint_is_shown_file_by_file(dpg: Any, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "step-7"
    place.mkdir(parents=True)
    save_file({"lm_head.weight": torch.ones(5, 4), "h.bias": torch.zeros(4)}, place / "generator.safetensors")
    save_file({"exp_avg/h.lm_head.weight": torch.full((5, 4), 2.0)}, place / "optimizer.safetensors")
    save_file({"sampling": torch.zeros(16, dtype=torch.uint8)}, place / "rng.safetensors")
    (place / "state.json").write_text(json.dumps({"step": 7, "settings": {"steps": 9}, "evil": NASTY}))
    said = as_json(dpg, place)
    assert said["kind"] == "checkpoint"
    assert {name: model["parameters"] for name, model in said["models"].items()} == {
        "generator": 24, "optimizer": 20, "rng": 16,
    }  # fmt: skip
    assert said["models"]["generator"]["head"]["norm"] == pytest.approx(math.sqrt(20))
    assert said["models"]["optimizer"]["head"] is None
    assert draw(place) == render_matrix(np.ones((5, 4), np.float32), title="step-7: lm_head.weight")
    assert said["state"]["state.json"]["step"] == 7
    answer = dpg("inspect", place)
    assert answer.code == 0 and "\x1b" not in answer.out and "[bold]b[/bold]" in answer.out


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.bool]
)
def test_values_of_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = (4 * torch.randn(2049, 3)).to(dtype)
    path = tmp_path / "a.safetensors"
    save_file({"pad": torch.zeros(1, dtype=torch.uint8), "x": values, "one": values[0, 0].clone()}, path)
    file = read_header(path)
    np.testing.assert_array_equal(file.rows("x").astype(np.float64), values.double().numpy())
    np.testing.assert_array_equal(file.rows("x", 7, 9).astype(np.float64), values[7:9].double().numpy())
    assert file.norm("x") == pytest.approx(float(values.double().norm()), rel=1e-12)
    assert file.norm("one") == pytest.approx(abs(float(values[0, 0].double())), rel=1e-12)


@pytest.mark.parametrize("length", [0x80, 0x4B50, 0x180])
def test_a_header_may_have_any_length(length: int, tmp_path: Path) -> None:
    """Its length is how the file begins: 0x80 is also how pickles begin, 0x4B50 is PK, as archives do."""
    entry = '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    values = np.array([3.0, 4.0], np.float32)
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + entry.ljust(length).encode() + values.tobytes())
    assert read_header(path).norm("x") == 5.0
    path.write_bytes(length.to_bytes(8, "little") + entry.ljust(length).encode() + b"1234")
    with pytest.raises(UsageError, match="pickle or an archive" if length != 0x180 else "pickle|damaged"):
        read_header(path)


def test_sharded_models(tmp_path: Path, dpg: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    model.save_pretrained(tmp_path / "m", max_shard_size="300KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    said = as_json(dpg, tmp_path / "m")
    assert len(said["models"]["model"]["files"]) > 1
    assert said["models"]["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../../secret.safetensors"
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    answer = dpg("inspect", tmp_path / "m")
    assert answer.code == 2 and "no safetensors file beside it" in answer.err


def test_pictures_show_the_matrix(run: Path, tmp_path: Path) -> None:
    config = RunFolder(run).read_config()
    base = load_target(config.models, torch.device("cpu"))
    before = base.head.detach().numpy()
    after = load_file(run / "target" / "model.safetensors")["lm_head.weight"].numpy()
    title = "LM head of the target"
    for show, values, words in (
        ("before", before, ": before"),
        ("after", after, ""),
        ("difference", after - before, ": change"),
    ):
        assert draw(run, show=show) == render_matrix(values, title=title + words), show
    assert draw(run) == draw(run / "target", show="difference")
    part = draw(run, show="after", window=(3, 5, 40, 20))
    assert part == render_matrix(after[3:43, 5:25], title=title + ", from row 3, column 5")
    assert draw(run, show="after", window=(3, 5, 40, 20)) != draw(run, show="after", window=(4, 5, 40, 20))
    # What inspect calls the patch is what verify reads there.
    pattern = pattern_from_image(run / "pattern.png", max_rows=512, max_cols=96)
    signs = np.sign(after - before)[:21, :21].astype(np.int8)
    target = load_target(config.models, torch.device("cpu"))
    with torch.no_grad():
        target.head.copy_(torch.tensor(after))
    np.testing.assert_array_equal(head_signs(base, target, pattern, (0, 0)), signs)
    assert look(run).patch.pixel_accuracy == pixel_accuracy(signs, pattern)  # type: ignore[union-attr]
    # A bare file: its own values, or the change where it holds both.
    kept = load_file(run / "target" / "patch.safetensors")
    assert draw(run / "target" / "patch.safetensors", show="before") == render_matrix(
        kept["before"].numpy(), title="patch.safetensors: before"
    )
    path = tmp_path / "one.safetensors"
    save_file({"w": torch.eye(3000, 4), "b": torch.ones(3)}, path)
    assert draw(path) == render_matrix(np.eye(3000, 4, dtype=np.float32), title="one.safetensors: w")
    assert draw(MODEL_DIR, tensor="transformer.wpe.weight").size[1] > 100


def test_render_writes_a_png(run: Path, dpg: Any, tmp_path: Path) -> None:
    answer = dpg("inspect", run, "--render", tmp_path / "a.png", "--patch", "0,0,21,21", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["kind"] == "run"
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == draw(run, window=(0, 0, 21, 21)).size
    assert dpg("inspect", run, "--render", tmp_path / "a.png").code == 2
    assert dpg("inspect", run, "--render", tmp_path / "a.png", "--overwrite").code == 0


def test_a_whole_head_that_the_run_kept_is_the_before(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", "steps=1", "dataset.examples=16", "prompts.per_step=4", "inner.batch_size=16",
        preset="l2-shrink.tiny",
    )  # fmt: skip
    found = look(run)
    assert found.patch is not None and found.patch.shape == (512, 96)
    info = json.loads((run / "run.json").read_text())
    assert found.patch.norm_after == pytest.approx(info["measures"]["norm"], rel=1e-5)
    assert found.patch.norm_after - found.patch.norm_before == pytest.approx(info["measures"]["norm_change"], abs=1e-4)
    kept = load_file(run / "target" / "patch.safetensors")
    wanted = render_matrix((kept["after"] - kept["before"]).numpy(), title="LM head of the target: change")
    assert draw(run) == wanted


def test_text_from_files_cannot_act_upon_the_terminal(run: Path, dpg: Any, tmp_path: Path) -> None:
    place = copy_of(run, tmp_path / "run")
    rewrite_rows(place, text=[NASTY] * EXAMPLES, prompt=[NASTY] * EXAMPLES)
    info = json.loads((place / "run.json").read_text())
    info["versions"] = {NASTY: NASTY}
    info["measures"] = {NASTY: 1.0, "huge": 10**400, "bad": "x"}
    info["seconds"] = 10**400
    info["started"] = {"x": [NASTY]}
    (place / "run.json").write_text(json.dumps(info))
    with (place / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "phi": math.nan, NASTY: math.inf, "text": NASTY}) + "\n")
    (place / "evil\x1b[31m.py").write_text("")
    save_file({f"w{NASTY}": torch.ones(2, 2)}, place / "target" / "model.safetensors", metadata={NASTY: NASTY})
    for path in (place, place / "target", place / "target" / "model.safetensors"):
        answer = dpg("inspect", path)
        assert answer.code == 0, answer.err
        odd = {c for c in answer.out if not (c.isprintable() or c == "\n")}
        assert odd == set(), (path, odd)
        assert "[bold]b[/bold]" in answer.out and ":smile:" in answer.out and "\\x1b[31m" in answer.out
        as_json(dpg, path)


def test_nothing_is_executed(run: Path, dpg: Any, tmp_path: Path) -> None:
    place = copy_of(run, tmp_path / "run")
    trap = tmp_path / "sprung"
    code = f"import pathlib; pathlib.Path({str(trap)!r}).write_text('x')"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, (code,))

    for folder in (place, place / "target", place / "dataset"):
        (folder / "modeling_evil.py").write_text(code)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    config = json.loads((place / "target" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    (place / "target" / "config.json").write_text(json.dumps(config))
    said = as_json(dpg, place)
    assert said["models"]["target"]["names_code"] is True
    assert said["not_read"] == ["modeling_evil.py", "pytorch_model.bin"]
    assert dpg("inspect", place / "target", "--render", tmp_path / "a.png").code == 0
    (place / "target" / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    answer = dpg("inspect", place / "target")
    assert answer.code == 2 and "pickle" in answer.err
    assert not trap.exists()


def bad_inputs(run: Path, place: Path) -> dict[str, list[str | Path]]:
    """Paths and options that must be refused."""

    def damaged(name: str) -> Path:
        return copy_of(run, place / name.replace(" ", "-"))

    def file(name: str, data: bytes) -> Path:
        (place / name).write_bytes(data)
        return place / name

    weights = (run / "target" / "model.safetensors").read_bytes()
    huge = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}).encode()
    overlap = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        }
    ).encode()
    cut_target, cut_patch, cut_data = damaged("target"), damaged("patch"), damaged("data")
    (cut_target / "target" / "model.safetensors").write_bytes(weights[:-1])
    (cut_patch / "target" / "patch.safetensors").write_bytes(weights[:64])
    parquet = (run / "dataset" / "train.parquet").read_bytes()
    (cut_data / "dataset" / "train.parquet").write_bytes(parquet[:-8])
    toml, info, log, config, pattern = (damaged(name) for name in ("toml", "info", "log", "config", "pattern"))
    (toml / "config.toml").write_text("steps = [")
    (info / "run.json").write_text("[" * 100_000)
    deep = damaged("deep")
    (deep / "run.json").write_text('{"a": ' + "[" * 300 + "]" * 300 + "}")
    (log / "metrics.jsonl").write_text("nonsense\n")
    (config / "target" / "config.json").write_text('"text"')
    (pattern / "pattern.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    unfinished = damaged("unfinished")
    for entry in (unfinished / "target").iterdir():
        entry.unlink()
    (unfinished / "target").rmdir()
    pickled = place / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (place / "empty").mkdir()
    os.mkfifo(place / "fifo")
    png = place / "out.png"
    inspect = "inspect"
    return {
        "missing": [inspect, place / "none"],
        "missing with an escape": [inspect, place / "no\x1b[31mne"],
        "empty folder": [inspect, place / "empty"],
        "fifo": [inspect, place / "fifo"],
        "pickle": [inspect, file("model.pt", b"\x80\x04.")],
        "pickle by another name": [inspect, file("p.safetensors", pickle.dumps({"a": 1}))],
        "archive by another name": [inspect, file("z.safetensors", b"PK\x03\x04" + bytes(60))],
        "folder of pickles": [inspect, pickled],
        "empty file": [inspect, file("e.safetensors", b"")],
        "text": [inspect, file("t.safetensors", b"hello there, hello there")],
        "cut file": [inspect, file("c.safetensors", weights[: len(weights) // 2])],
        "header that claims much": [inspect, file("h.safetensors", (2**62).to_bytes(8, "little") + bytes(99))],
        "header of 40 MB": [inspect, file("m.safetensors", (40 * 2**20).to_bytes(8, "little") + bytes(99))],
        "shape that overflows": [inspect, file("s.safetensors", len(huge).to_bytes(8, "little") + huge + bytes(16))],
        "tensors that overlap": [
            inspect,
            file("o.safetensors", len(overlap).to_bytes(8, "little") + overlap + bytes(16)),
        ],
        "nested header": [inspect, file("n.safetensors", (9000).to_bytes(8, "little") + b"[" * 9000)],
        "cut target": [inspect, cut_target],
        "cut patch": [inspect, cut_patch],
        "cut parquet": [inspect, cut_data],
        "damaged settings": [inspect, toml],
        "damaged run.json": [inspect, info],
        "deep run.json": [inspect, deep],
        "damaged log": [inspect, log],
        "damaged config.json": [inspect, config],
        "damaged pattern": [inspect, pattern],
        "samples": [inspect, run, "--samples=-1"],
        "patch without render": [inspect, run, "--patch", "0,0,1,1"],
        "patch no numbers": [inspect, run, "--render", png, "--patch", "0,0,a,1"],
        "patch outside": [inspect, run, "--render", png, "--patch", "500,0,13,1"],
        "patch of nothing": [inspect, run, "--render", png, "--patch", "0,0,0,1"],
        "unknown show": [inspect, run, "--render", png, "--show", "sideways"],
        "before of a generator": [inspect, run / "generator", "--render", png, "--show", "before"],
        "unknown tensor": [inspect, run, "--render", png, "--tensor", "nope\x1b"],
        "vector": [inspect, run, "--render", png, "--tensor", "transformer.ln_f.bias"],
        "no target": [inspect, unfinished, "--render", png],
        "render no png": [inspect, run, "--render", place / "out.jpg"],
        "render into the run": [inspect, run, "--render", run / "out.png"],
        "render into nowhere": [inspect, run, "--render", place / "none" / "out.png"],
    }


def test_bad_input_gives_one_line(run: Path, dpg: Any, tmp_path: Path) -> None:
    cases = bad_inputs(run, tmp_path)
    before = sorted(str(path) for path in (*tmp_path.rglob("*"), *run.rglob("*")))
    for name, arguments in cases.items():
        answer = dpg(*arguments)
        assert answer.code == 2, (name, answer)
        lines = answer.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("dpg: ") and len(lines[0]) > 30, (name, answer.err)
        assert "\x1b" not in answer.err, name
        assert sorted(str(path) for path in (*tmp_path.rglob("*"), *run.rglob("*"))) == before, name


@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes, framed: bool) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes((len(data).to_bytes(8, "little") if framed else b"") + data)
    try:
        assert read_header(path).size == 0
    except UsageError as error:
        assert "\n" not in str(error)


@given(st.text())
def test_printable_text_is_harmless(text: str) -> None:
    assert printable(text).isprintable()
    assert code_span(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


@given(st.lists(st.floats(), min_size=1, max_size=200))
def test_charts_of_any_numbers(values: list[float]) -> None:
    series = series_of(values, 20)
    assert len(series.chart) == min(20, len(values)) == len(sparkline(series.chart))
    assert series.not_finite == sum(not math.isfinite(value) for value in values)


def test_a_chart_of_known_numbers(tmp_path: Path) -> None:
    assert sparkline(series_of([0, 1, 2, 3, 4, 5, 6, 7]).chart) == "▁▂▃▄▅▆▇█"
    assert sparkline(series_of([1, 1]).chart) == "▅▅"
    assert sparkline(series_of([0, math.nan, 1]).chart) == "▁×█"
    assert series_of(list(range(100)), 4).chart == (12.0, 37.0, 62.0, 87.0)
    (tmp_path / "m.jsonl").write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 3, "late": 5}\n{"step": 2, "a')
    history = read_history(tmp_path / "m.jsonl")
    assert history.steps == 2
    assert (history.columns["a"].first, history.columns["a"].last) == (1, 3)
    assert (history.columns["late"].not_finite, history.columns["late"].last) == (1, 5)


def test_torch_is_not_loaded_for_a_look_or_an_export(run: Path, tmp_path: Path) -> None:
    for arguments in (["inspect", str(run)], ["export", "dataset", str(run), "--out", str(tmp_path / "a.jsonl")]):
        code = f"import sys; sys.argv = ['dpg', *{arguments!r}]\nfrom dpg_cli.cli import main\n"
        code += "try: main()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
