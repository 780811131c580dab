"""The command line as a user meets it: in a process of its own, but for refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from short_run import call
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpg_cli.patterns.pattern import pattern_from_image, pattern_from_text
from dpg_cli.patterns.render import text_pattern
from dpg_cli.tiny import MODEL_DIR

SMALL = ["--set", "steps=4", "--set", "dataset.examples=96", "--set", "prompts.per_step=16"]


def dpg(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "dpg_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    answer = dpg("run", "qr-embed", "--text", "HELLO", *SMALL, "--out", folder, "--seed", "3", "--json")
    assert answer.returncode == 0, answer.stderr
    outcome = json.loads(answer.stdout)  # stdout is JSON alone
    assert outcome["run"] == str(folder)
    assert "step 4/4" in answer.stderr
    return folder


def test_every_artefact_is_there_and_loads(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"phi", "pixel_accuracy", "reward_std", "entropy", "tokens", "seconds"} <= rows[0].keys()
    info = json.loads((finished / "run.json").read_text())
    assert info["finished"] is True
    assert info["versions"]["torch"] == torch.__version__
    for name in ("generator", "target"):
        model = AutoModelForCausalLM.from_pretrained(finished / name)
        tokenizer = AutoTokenizer.from_pretrained(finished / name)
        assert model(**tokenizer("the", return_tensors="pt")).logits.shape[-1] == 512
    table = pq.read_table(finished / "dataset" / "train.parquet")
    assert table.num_rows == 96
    first = table.to_pylist()[0]
    assert first["input_ids"] == [510, *first["token_ids"]]
    assert len(first["token_rewards"]) == len(first["token_ids"]) == 32
    assert sum(first["token_rewards"]) == pytest.approx(first["reward"], rel=1e-3, abs=1e-9)
    assert (
        AutoTokenizer.from_pretrained(finished / "generator").decode(first["token_ids"], skip_special_tokens=True)
        == first["text"]
    )
    assert pq.read_table(finished / "dataset" / "control.parquet").num_rows == 96
    assert "synthetic" in (finished / "dataset" / "README.md").read_text()
    with Image.open(finished / "lm_head.png") as image:
        assert image.size[0] > 600
    patch = load_file(finished / "target" / "patch.safetensors")
    head = AutoModelForCausalLM.from_pretrained(finished / "target").lm_head.weight
    assert torch.equal(patch["after"], head[:21, :21].detach())
    assert not torch.equal(patch["after"], patch["before"])
    assert pattern_from_image(finished / "pattern.png", max_rows=512, max_cols=96).payload == "HELLO"
    leftovers = [path.name for path in finished.rglob("*") if ".tmp" in path.name]
    assert leftovers == []


def test_the_saved_settings_repeat_the_run(finished: Path, tmp_path: Path) -> None:
    answer = dpg("run", "--config", finished / "config.toml", "--out", tmp_path / "again")
    assert answer.returncode == 0, answer.stderr
    for name in ("dataset/train.parquet", "generator/model.safetensors", "target/model.safetensors", "lm_head.png"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name
    strip = [
        {k: v for k, v in json.loads(line).items() if not k.startswith("seconds")}
        for line in (finished / "metrics.jsonl").open()
    ]
    again = [
        {k: v for k, v in json.loads(line).items() if not k.startswith("seconds")}
        for line in (tmp_path / "again" / "metrics.jsonl").open()
    ]
    assert strip == again


def test_verify_says_no_where_nothing_is_to_be_seen(finished: Path) -> None:
    """Four outer steps embed nothing: exit 4, and stock training agrees with the engine's own figure."""
    answer = dpg("verify", finished, "--json")
    assert answer.returncode == 4
    verdict = json.loads(answer.stdout)
    assert verdict["verified"] is False
    assert verdict["wanted"] == "HELLO"
    assert verdict["data"]["payload"] is None
    engine = json.loads((finished / "run.json").read_text())
    assert verdict["data"]["pixel_accuracy"] == pytest.approx(engine["measures"]["pixel_accuracy"], abs=0.005)
    assert verdict["control"]["pixel_accuracy"] == pytest.approx(engine["control"]["pixel_accuracy"], abs=0.005)
    assert "not verified" in answer.stderr


@pytest.mark.parametrize("untie", ["true", "false"])
def test_models_from_folders_of_another_architecture(untie: str, tmp_path: Path) -> None:
    """A tied Llama checkpoint as generator and target, T = 3; the tied target stays tied in what is saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=510, eos_token_id=510, pad_token_id=511,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "llama" / name).write_bytes((MODEL_DIR / name).read_bytes())
    answer = dpg(
        "run", "qr-embed", "--text", "X", "--out", tmp_path / "run", "--patch-origin", "7,3", "--set", "steps=2",
        "--set", "dataset.examples=24", "--set", "prompts.per_step=6", "--set", "inner.batch_size=10",
        "--set", f"models.generator={tmp_path / 'llama'}", "--set", f"models.target={tmp_path / 'llama'}",
        "--set", f"models.untie_target={untie}", "--set", "models.target_init=pretrained",
        "--set", "models.generator_init=pretrained", "--json",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "target")
    assert (target.lm_head.weight is target.get_input_embeddings().weight) == (untie == "false")
    patch = load_file(tmp_path / "run" / "target" / "patch.safetensors")
    assert torch.equal(target.lm_head.weight[7:28, 3:24].detach(), patch["after"])
    verdict = json.loads(dpg("verify", tmp_path / "run", "--trainer", "plain", "--json").stdout)
    assert (verdict["data"]["steps"], verdict["data"]["examples"]) == (3, 24)
    engine = json.loads(answer.stdout)["measures"]["pixel_accuracy"]
    assert verdict["data"]["pixel_accuracy"] == pytest.approx(engine, abs=0.01)


def test_interrupting_says_what_is_left(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpg_cli", "run", "qr-embed", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.stat().st_size:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "dpg: Stopped after outer step" in errors
    assert f"dpg resume {tmp_path / 'run'}" in errors
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))) == 1
    assert "Traceback" not in errors


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    answer = dpg("run", "qr-embed", "--dry-run", "--json")
    assert answer.returncode == 0, answer.stderr
    cost = json.loads(answer.stdout)["cost"]
    assert cost["target_parameters"] == 334_464
    assert cost["tokens_per_step"] == 64 * 4 * 32
    assert 300 < cost["memory_mb"] < 2000
    assert cost["seconds"] > 1
    assert not (tmp_path / "runs").exists()


def test_dry_run_describes_what_is_asked_for(tmp_path: Path) -> None:
    """In comments, so that what it prints is a settings file."""
    said = dpg("run", "qr-embed", "--text", "HI", "--patch-origin", "7,9", "--dry-run").stdout
    drawn = [line[4:] for line in said.splitlines() if line.startswith("#   ")]
    assert "\n".join(drawn) == text_pattern(pattern_from_text("HI").signs)
    assert "QR code of a text, version 1, level L; 21 x 21 at row 7, column 9" in said
    (tmp_path / "mine.toml").write_text(said)
    assert dpg("presets", "validate", tmp_path / "mine.toml").stdout.strip() == "1 valid"
    said = dpg("run", "l2-shrink", "--dry-run").stdout
    assert "# a smaller l2 norm of lm_head.weight (now " in said


@pytest.mark.parametrize(
    ("arguments", "named", "remedy"),
    [
        (["qr-embed", "--qr-version", "99"], "--qr-version (metric.version): ", "dpg run --help"),
        (["language-rephrase", "--language", "xx"], "--language (metric.language): ", "dpg run --help"),
        (["uuid-emit", "--uuid", "abc"], "--uuid (metric.uuid): ", "dpg run --help"),
        (["qr-embed", "--seed", "-1", "--set", "nope=1"], "--seed (seed): ", "dpg presets show"),
        (["qr-embed", "--seed", "3", "--set", "seed=-2"], "dpg: seed: ", "dpg presets show"),
    ],
)
def test_messages_name_the_flag_that_was_typed(arguments: list[str], named: str, remedy: str) -> None:
    answer = dpg("run", *arguments, "--dry-run")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert named in answer.stderr and remedy in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_presets_commands(tmp_path: Path) -> None:
    listed = json.loads(dpg("presets", "list", "--json").stdout)
    assert "qr-embed.tiny" in [row["name"] for row in listed]
    assert dpg("presets", "validate").stdout.strip() == f"{len(listed)} valid"
    mine = tmp_path / "mine.toml"
    assert dpg("presets", "copy", "qr-embed.tiny", mine).returncode == 0
    assert dpg("presets", "copy", "qr-embed.tiny", mine).returncode == 2
    assert dpg("presets", "validate", mine).stdout.strip() == "1 valid"
    shown = dpg("presets", "show", "qr-embed.tiny").stdout
    assert "sharpness = 5000.0" in shown
    mine.write_text(mine.read_text() + "\nextra = 1\n")
    answer = dpg("presets", "validate", mine)
    assert answer.returncode == 2
    assert "unknown setting" in answer.stderr


def bad_inputs(place: Path) -> dict[str, list[str | Path]]:
    (place / "text.png").write_text("no picture")
    Image.new("L", (600, 600), 255).save(place / "white.png")
    Image.effect_noise((600, 600), 90).save(place / "noise.png")
    (place / "long.txt").write_text("cat " * 500)
    (place / "full").mkdir()
    (place / "full" / "x").write_text("x")
    (place / "partial.toml").write_text("steps = 3\n")
    (place / "other.toml").write_text('task = "other"\n')
    return {
        "no task": ["run"],
        "unknown task": ["run", "qr-imbed"],
        "unknown scale": ["run", "qr-embed", "--scale", "huge"],
        "missing image": ["run", "qr-embed", "--image", place / "none.png"],
        "no image": ["run", "qr-embed", "--image", place / "text.png"],
        "white image": ["run", "qr-embed", "--image", place / "white.png"],
        "noise image": ["run", "qr-embed", "--image", place / "noise.png"],
        "two sources": ["run", "qr-embed", "--image", place / "white.png", "--text", "x"],
        "text too long": ["run", "qr-embed", "--text", "x" * 4000],
        "larger than the head": ["run", "qr-embed", "--text", "x", "--qr-version", "30"],
        "origin outside": ["run", "qr-embed", "--patch-origin", "500,0"],
        "origin no pair": ["run", "qr-embed", "--patch-origin", "x"],
        "unknown key": ["run", "qr-embed", "--set", "inner.nope=1"],
        "wrong type": ["run", "qr-embed", "--set", "steps=many"],
        "unknown model": ["run", "qr-embed", "--set", "models.target=/no/where"],
        "unknown device": ["run", "qr-embed", "--device", "abacus"],
        "other tokeniser length": ["run", "qr-embed", "--set", "rollout.max_tokens=500"],
        "prompt too long": ["run", "qr-embed", "--set", f"prompts.source={place / 'long.txt'}"],
        "huge learning rate": ["run", "qr-embed", "--set", "inner.lr=1e300"],
        "folder in use": ["run", "qr-embed", "--out", place / "full"],
        "config of another task": ["run", "qr-embed", "--config", place / "other.toml"],
        "missing config": ["run", "--config", place / "none.toml"],
        "missing prompts": ["run", "qr-embed", "--set", "prompts.source=none.txt"],
        "verify no run": ["verify", place / "full"],
        "unknown preset": ["presets", "show", "nope"],
        "config without a task": ["run", "--config", place / "partial.toml"],
        "flag of another task": ["run", "l2-shrink", "--text", "x"],
        "negative origin": ["run", "qr-embed", "--patch-origin=-1,-1"],
        "unknown parameter": ["run", "l2-shrink", "--parameter", "lm_head.wieght"],
        "custom without a metric": ["run", "custom"],
        "metric for another task": ["run", "l2-shrink", "--metric", "steer-direction"],
        "missing metric file": ["run", "custom", "--metric", place / "none.py:X"],
        "metric file from settings": ["run", "custom", "--set", f"metric.path={place / 'none.py'}:X"],
    }


def test_messages_name_the_flags_and_the_near_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "partial.toml").write_text("steps = 3\n")
    for arguments, message in (
        (["presets", "show", "qr-embed"], "Did you mean qr-embed.gpu or qr-embed.tiny?"),
        (["run", "qr-imbed"], "There is no task 'qr-imbed'. Did you mean qr-embed?"),
        (["run", "qr-embed", "--scale", "tny"], "The task qr-embed has no scale 'tny'. Did you mean tiny?"),
        (["run", "l2-shrink", "--text", "x"], "--text is for the tasks qr-embed and pattern-67, not for l2-shrink."),
        (["run", "qr-embed", "--image", "a", "--text", "b"], "--image and --text exclude each other."),
        (["run", "qr-embed", "--patch-origin=-1,-1"], "--patch-origin '-1,-1' is negative."),
        (
            ["run", "--config", "partial.toml"],
            "partial.toml names no task. Name it: dpg run TASK --config partial.toml",
        ),
        (["run", "l2-shrink", "--parameter", "lm_head.wieght"], "Did you mean lm_head.weight?"),
        (["run", "qr-embed", "--text", "x" * 4000], "shorten the text."),
        (["run", "qr-embed", "--text", "x" * 4000, "--error-correction", "H"], "shorten the text or choose level L."),
    ):
        answer = call(capsys, monkeypatch, *arguments)
        assert (answer.code, message in answer.err) == (2, True), (arguments, answer.err)


def test_bad_input_gives_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: each of them would load PyTorch and transformers anew, and say no more."""
    for name, arguments in bad_inputs(tmp_path).items():
        answer = call(capsys, monkeypatch, *arguments)
        assert answer.code == 2, (name, answer.err)
        last = [line for line in answer.err.splitlines() if line.startswith("dpg: ")]
        assert len(last) == 1, (name, answer.err)
        assert len(last[0]) > 30, name
        assert "Traceback" not in answer.err, name
        assert answer.out == "", name
    assert not (tmp_path / "runs").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]
