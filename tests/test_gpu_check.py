"""`make gpu-check` rehearsed: a stage on the CPU with tiny shapes, limits that hold, figures that stay, and the page that shows them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_a_checkpoint_has_its_shape_and_as_many_tokens(tmp_path: Path) -> None:
    from benchmarks.gpu_check.checkpoints import save, words

    assert len(set(words(60_000))) == 60_000
    folder = save("tiny-gpt2", tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_output_embeddings().weight.shape == (len(tokenizer), 32) == (512, 32)
    ids = tokenizer("ba gu ze")["input_ids"]
    assert len(ids) == 3 and tokenizer.decode(ids).split() == ["ba", "gu", "ze"]
    before = torch.get_rng_state()
    assert save("tiny-gpt2", tmp_path / "model") == folder  # it is there: nothing is drawn again
    assert torch.equal(torch.get_rng_state(), before)


def test_outer_steps_are_rehearsed_and_compared_with_the_plan(tmp_path: Path) -> None:
    """The whole script for one stage, in the process that a user starts: JSON with rows, peak and prediction."""
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_check",
        "--device",
        "cpu",
        "--python",
        sys.executable,
        "--only",
        "outer",
    ]
    ended = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "== outer: done" in ended.stdout and "outer step 3 of 3" in ended.stdout
    stage = json.loads(out.read_text())["stages"]["outer"]
    assert stage["ended"] == "done"
    figures = stage["figures"]
    assert len(figures["rows"]) == 3 and all(row["policy_kl"] > 0 for row in figures["rows"])
    assert figures["predicted_mb"] == pytest.approx(figures["peak_mb"], rel=0.3)
    assert figures["about"]["torch"] == torch.__version__


def test_the_generators_step_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import stages

    monkeypatch.setattr(stages, "MADE", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["stages", "generator", "--device", "cpu", "--tiny", "--out", str(tmp_path / "found.json")]
    )
    stages.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["shape"], found["tokens"]) == ("tiny-llama", 32)
    assert found["figures"]["step_kl"] > 0 and found["seconds_step"] > 0


WRITES = "import json, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(json.dumps({'row': 1})); time.sleep(60)"


def test_limits_hold_and_partial_figures_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import __main__ as script

    monkeypatch.setattr(script, "LIMITS", {"install": 1, "metagradient": 3, "outer": 3})
    monkeypatch.setattr(script, "LEAST", 2.5)
    monkeypatch.setattr(script, "commands", lambda name, options, python, out: [sys.executable, "-c", WRITES, str(out)])
    out, began = tmp_path / "deep" / "found.json", time.monotonic()
    assert script.main(["--device", "cpu", "--python", sys.executable, "--limit", "5", "--out", str(out)]) == 1
    assert time.monotonic() - began < 20
    stages = json.loads(out.read_text())["stages"]
    assert stages["metagradient"]["ended"] == "stopped at its limit"
    assert stages["metagradient"]["figures"] == {"row": 1}
    assert stages["outer"] == {"ended": "not begun: no time was left"}
    assert list(out.parent.iterdir()) == [out]  # no half-written file beside it


def test_stages_that_are_not_there_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu_check.__main__ import parse

    with pytest.raises(SystemExit) as refused:
        parse(["--skip", "outter"])
    assert refused.value.code == 2
    assert (
        "there is no stage 'outter'; stages: install, tests, metagradient, generator, outer" in capsys.readouterr().err
    )


def test_the_page_says_that_nothing_was_run_or_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import performance

    monkeypatch.setattr(performance, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    assert "Not run on a card yet" in performance.gpu_check()
    outer = {
        "rows": [{"seconds": 2.0}, {"seconds": 4.0}, {"seconds": 3.0}], "peak_mb": 9000.0, "predicted_mb": 9900.0,
        "about": {"card": "A card", "torch": "2"},
    }  # fmt: skip
    found = {
        "date": "2026-12-01",
        "device": "cuda",
        "stages": {"outer": {"ended": "done", "seconds": 20.0, "figures": outer}},
    }
    (tmp_path / "results" / "gpu-check.json").write_text(json.dumps(found))
    text = performance.gpu_check()
    assert "A card" in text and "| outer | done | 20 |" in text
    assert "3 outer steps, median 3.0 s; peak 9,000 MB, 9,900 predicted (+10%)" in text
    sys.modules.pop("performance")
