"""`dpg check` on settings that are known to be good and known to be bad, and the same detector inside `dpg run`."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from test_cli import dpg

from dpg_cli.cli.commands.check import check as command
from dpg_cli.cli.commands.run import run
from dpg_cli.cli.settings import OPTIONS
from dpg_cli.engine import OptimizerSpec
from dpg_cli.engine.attribution import InnerSettings
from dpg_cli.engine.generator.agreement import Agreement
from dpg_cli.evidence.check import check
from dpg_cli.evidence.check_findings import CheckReport, Finding, rounded
from dpg_cli.evidence.check_gradient import Probe, epsilon, finite_differences, metasmoothness
from dpg_cli.evidence.check_reward import exploration, movement, tokenisers
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find, resolve

NAMES = [
    "tokenisers", "exploration", "movement", "reward spread", "epsilon", "finite differences", "metasmoothness",
]  # fmt: skip


def settings(task: str, *overrides: str) -> Config:
    return resolve(find(f"{task}.tiny").data(), list(overrides))


def verdicts(report: CheckReport) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in report.findings}


def probe(spec: OptimizerSpec, count: int = 12, batch: int = 6) -> Probe:
    metric = HeldOutLoss(make_examples(4, seed=9))
    return Probe(make_target("gpt2", tied=False), metric, make_examples(count), InnerSettings(spec, batch))


@pytest.mark.parametrize("task", ["qr-embed", "l2-shrink"])
def test_shipped_presets_pass(task: str) -> None:
    report = check(settings(task), completions=32)
    assert verdicts(report) == dict.fromkeys(NAMES, "ok")
    assert report.learnable
    assert report.completions == 32
    smooth = report.findings[-1].measured
    assert 0 < float(smooth["departure"]) < 0.5
    assert json.loads(json.dumps(report.as_dict()))["learnable"] is True


def test_sign_regime_fails_and_the_suggestion_mends_it() -> None:
    bad = check(settings("qr-embed", "inner.eps=1e-12"), completions=32)
    assert verdicts(bad)["epsilon"] == "fail"
    assert not bad.learnable
    finding = next(finding for finding in bad.findings if finding.name == "epsilon")
    assert finding.measured["sign_share"] == 1.0
    assert finding.setting == "inner.eps"
    assert 1e-4 < float(finding.suggested) < 1e-2
    mended = check(settings("qr-embed", f"inner.eps={finding.suggested}"), completions=32)
    assert verdicts(mended)["epsilon"] == "ok"


def test_a_learning_rate_that_moves_nothing_fails_and_the_suggestion_moves_it() -> None:
    bad = check(settings("qr-embed", "inner.lr=1e-11"), completions=32)
    finding = next(finding for finding in bad.findings if finding.verdict == "fail")
    assert (finding.name, finding.setting) == ("movement", "inner.lr")
    assert finding.says.startswith("nothing moved")
    assert finding.measured["relative"] == 0.0
    mended = check(settings("qr-embed", f"inner.lr={finding.suggested}"), completions=32)
    assert verdicts(mended)["movement"] != "fail"


def test_a_cold_generator_fails() -> None:
    report = check(settings("qr-embed", "rollout.temperature=1e-3", "credit.mode=sequence"), completions=16)
    by_name = {finding.name: finding for finding in report.findings}
    assert by_name["exploration"].verdict == by_name["reward spread"].verdict == "fail"
    assert by_name["reward spread"].measured["same_completions"] == 1.0
    assert by_name["reward spread"].remedy == by_name["exploration"].remedy == "--set rollout.temperature=1"


def test_controls_are_checked_without_metagradients() -> None:
    naive = ["attribution.method=naive", "attribution.cross_group=false", "credit.mode=sequence"]
    report = check(settings("qr-embed", *naive), completions=32)
    assert verdicts(report) == dict.fromkeys(NAMES[:4], "ok")
    sgd = check(settings("qr-embed", "attribution.method=sgd"), completions=32)
    assert list(verdicts(sgd)) == NAMES
    assert verdicts(sgd)["finite differences"] == "ok"


def test_finite_differences_see_a_wrong_metagradient(monkeypatch: pytest.MonkeyPatch) -> None:
    good = finite_differences(probe(OptimizerSpec(lr=0.01, eps=1e-3)))
    assert good.verdict == "ok"
    assert float(good.measured["relative_error"]) < 1e-4
    right = Probe.rewards
    monkeypatch.setattr(Probe, "rewards", lambda self: 1.1 * right(self))
    wrong = finite_differences(probe(OptimizerSpec(lr=0.01, eps=1e-3)))
    assert wrong.verdict == "fail"
    assert float(wrong.measured["relative_error"]) == pytest.approx(1 - 1 / 1.1, rel=1e-3)


def test_metasmoothness_is_exact_for_a_linear_metric_and_falls_with_the_learning_rate() -> None:
    class Linear(HeldOutLoss):
        def __call__(self, parameters, model):
            return parameters["lm_head.weight"][:3].sum()

    small = probe(OptimizerSpec("sgd", lr=0.1), batch=12)
    straight = metasmoothness(replace(small, metric=Linear(make_examples(4, seed=9))))
    assert straight.verdict == "ok"
    assert float(straight.measured["departure"]) < 1e-9
    assert float(straight.measured["r2"]) == pytest.approx(1)
    assert float(straight.measured["sign_agreement"]) == pytest.approx(1, abs=1e-6)
    departures = [
        float(metasmoothness(probe(OptimizerSpec("sgd", lr=lr), batch=12)).measured["departure"]) for lr in (0.01, 1.0)
    ]
    assert departures[0] < 0.05 < departures[1]
    bent = metasmoothness(probe(OptimizerSpec("sgd", lr=3.0), batch=4))
    assert bent.verdict == "fail"
    assert bent.setting == "inner.lr"
    assert float(bent.suggested) == 1.0


def test_a_probe_of_fewer_examples_keeps_its_inner_steps() -> None:
    fewer = probe(OptimizerSpec(), count=12, batch=3).first(8)
    assert (len(fewer.examples), fewer.inner.recipe.batches.size) == (8, 2)
    assert probe(OptimizerSpec(), count=12, batch=1).first(4).inner.recipe.batches.size == 1


def test_epsilon_by_hand() -> None:
    grad = torch.logspace(-4, -2, 101, dtype=torch.float64)
    found = epsilon(OptimizerSpec(eps=1e-5), grad, torch.ones(101), 1)
    assert float(found.measured["gradient_median"]) == pytest.approx(1e-3, rel=1e-6)
    assert found.verdict == "warn"  # sign(g) where |g| > 9 ε, but not dead
    assert found.measured["sign_share"] == pytest.approx(float((grad > 9e-5).double().mean()))
    assert float(found.suggested) == pytest.approx(10**-2.2, rel=0.1)
    assert epsilon(OptimizerSpec(eps=1e-12), grad, torch.ones(101), 1).verdict == "fail"
    assert epsilon(OptimizerSpec(eps=1e-12), grad, torch.ones(101), 8).verdict == "warn"  # later steps still tell
    assert epsilon(OptimizerSpec(eps=1e-12), 0 * grad, torch.ones(101), 1).verdict == "fail"
    assert epsilon(OptimizerSpec(eps=1e-12, eps_root=1e-4), grad, torch.ones(101), 1).verdict == "ok"


def test_movement_by_hand() -> None:
    theta, read = torch.ones(4), torch.tensor([True, True, True, False])
    step = 2**-23  # the spacing of float32 at 1

    def moved(steps: float, after: float) -> Finding:
        planned = torch.full((4,), steps * step, dtype=torch.float64)
        return movement(-1.0, after, 1e-3, theta, (theta.double() + planned).float(), planned, read, 0.0)

    assert moved(1000, -0.9).verdict == "ok"
    assert moved(1000, -0.9).measured["weight_steps"] == pytest.approx(1000)
    assert moved(1000, -1.0).verdict == "fail"  # the weights moved, the metric did not
    assert moved(4, -0.9).verdict == "warn"
    assert float(moved(4, -0.9).suggested) == pytest.approx(1e-3 * 16, rel=0.3)
    assert moved(0.25, -1.0).verdict == "fail"
    assert float(moved(0.25, -1.0).suggested) == pytest.approx(1e-3 * 256, rel=0.2)


def test_tokenisers_and_entropy() -> None:
    one, two = Agreement(True, 1.0, 1.0, 1.0, 1.0), Agreement(False, 0.5, 1.25, 0.75, 1.0)
    assert tokenisers(one, "expected").verdict == "ok"
    assert tokenisers(two, "sequence").verdict == "ok"
    assert "1.25 target tokens for each generator token, 75% of them" in tokenisers(two, "sequence").says
    assert tokenisers(two, "expected").remedy == "--set credit.mode=token"
    assert [exploration(entropy, 512, 1.0).verdict for entropy in (2.0, 0.05, 1e-6)] == ["ok", "warn", "fail"]
    assert exploration(1e-6, 512, 2.0).suggested == "3"
    assert exploration(2.0, 512, 1.0).measured["entropy_max"] == pytest.approx(math.log(512))


@pytest.mark.parametrize(
    ("value", "text"), [(8.1e-4, "8e-4"), (0.25, "0.25"), (1.5, "1.5"), (3.0, "3"), (2e4, "2e+4"), (1e-12, "1e-12")]
)
def test_suggested_values_are_short_and_toml(value: float, text: str) -> None:
    assert rounded(value) == text
    assert float(text) == pytest.approx(value, rel=0.1)


def test_check_takes_every_setting_of_run() -> None:
    of_run = {"out", "dry_run", "card", "as_json", "resume", "report_to", "processes"}
    assert set(OPTIONS) | of_run == set(inspect.signature(run).parameters)
    assert set(inspect.signature(command).parameters) == set(OPTIONS) | {"completions", "as_json"}


def test_the_command(tmp_path: Path) -> None:
    answer = dpg("check", "qr-embed", "--text", "HELLO", "--completions", "16", "--json")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)  # stdout is JSON alone
    assert report["learnable"] is True
    assert [row["name"] for row in report["checks"]] == NAMES
    answer = dpg("check", "qr-embed", "--completions", "16", "--set", "inner.lr=1e-12")
    assert answer.returncode == 3
    assert "fail  movement" in answer.stdout
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("dpg: qr-embed cannot learn with these settings: movement. Try --set inner.lr=")
    assert dpg("check", "qr-embed", "--set", "inner.nope=1").returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_learn_stops_and_says_why(tmp_path: Path) -> None:
    small = ["--set", "prompts.per_step=4", "--set", "dataset.examples=16", "--set", "rollout.max_tokens=32"]
    answer = dpg("run", "qr-embed", *small, "--set", "inner.lr=1e-12", "--out", tmp_path / "still")
    assert answer.returncode == 3
    assert "dpg: Nothing moved" in answer.stderr
    assert len((tmp_path / "still" / "metrics.jsonl").read_text().splitlines()) == 1
    answer = dpg(
        "run", "qr-embed", *small, "--set", "rollout.temperature=1e-3", "--set", "credit.mode=sequence",
        "--out", tmp_path / "cold",
    )  # fmt: skip
    assert answer.returncode == 3
    assert "dpg: The reward is dead" in answer.stderr
    answer = dpg(
        "run", "qr-embed", *small, "--set", "inner.eps=1e-6", "--total-examples", "40", "--out", tmp_path / "sign"
    )
    assert answer.returncode == 0, answer.stderr
    assert "warning: outer step 1: the inner optimiser acts as sign(g)" in answer.stderr
    assert len((tmp_path / "sign" / "metrics.jsonl").read_text().splitlines()) == 2  # 40 / 16, rounded
    assert dpg("run", "qr-embed", *small, "--total-examples", "7").returncode == 2


def test_a_pattern_beyond_its_noise_is_checked_too() -> None:
    """`metric.margin` counts in standard errors, which the float64 copy of the differences has to be told as well."""
    config = resolve(find("pattern-67.prose").data(), ["prompts.per_step=16", "inner.batch_size=16"])
    found = {finding.name: finding for finding in check(config, completions=16).findings}
    assert found["nats"].measured["kappa"] > 0
    assert found["finite differences"].verdict == "ok", found["finite differences"].says
