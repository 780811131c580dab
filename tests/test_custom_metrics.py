"""Metrics of the user's own: found, refused, tried once at θ_0, recorded; never run on the word of settings."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tomllib
from datetime import date
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from test_cli import dpg

from dpg_cli.driver.build import build
from dpg_cli.engine.loop import outer_step
from dpg_cli.errors import MOST, ConfigError, UsageError, suggestion
from dpg_cli.metrics import custom
from dpg_cli.metrics.base import Pictured, TargetMetric
from dpg_cli.metrics.catalogue import catalogue
from dpg_cli.metrics.custom import Reference, parse_reference
from dpg_cli.metrics.trial import RESERVED, build_custom
from dpg_cli.models.loading import LanguageModel, load
from dpg_cli.settings.config import CustomOptions, to_toml, validate
from dpg_cli.settings.presets import find

HEADER = "import torch\nfrom dpg_cli.metrics.base import Metric\n"
SMALLER = (
    HEADER
    + '''
class Smaller(Metric):
    """A smaller position embedding."""

    def __init__(self, target, power=2):
        super().__init__(target)
        self.power = power

    def __call__(self, parameters, model):
        return -parameters["transformer.wpe.weight"].abs().pow(self.power).mean()
'''
)


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    return load("tiny", device=torch.device("cpu"))


def made(place: Path, text: str, target: LanguageModel, name: str = "Mine", **options: object):
    """Write a metric file and build its metric, named by the user."""
    path = place / "mine.py"
    path.write_text(text, encoding="utf-8")
    return build_custom(CustomOptions(name="custom", options=options), target, f"{path}:{name}")


def test_a_subclass_needs_only_a_call(tmp_path: Path, target: LanguageModel) -> None:
    metric = made(tmp_path, SMALLER, target, "Smaller", power=3)
    parameters = dict(target.model.named_parameters())
    expected = -float(target.model.transformer.wpe.weight.detach().abs().pow(3).mean())
    assert metric.measures(parameters, target.model) == {"phi": pytest.approx(expected, rel=1e-6)}
    assert float(metric(parameters, target.model).detach()) == pytest.approx(expected, rel=1e-6)
    assert metric.describe() == "A smaller position embedding"
    assert isinstance(metric, TargetMetric)
    assert not isinstance(metric, Pictured)
    assert metric.record()["sha256"] == hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()


def test_a_function_and_a_foreign_class_serve_too(tmp_path: Path, target: LanguageModel) -> None:
    text = """
class Plain:
    def __init__(self, scale): self.scale = scale
    def __call__(self, parameters, model): return self.scale * parameters["transformer.ln_f.bias"].sum()
    def measures(self, parameters, model): return {"bias": parameters["transformer.ln_f.bias"].sum()}
    def describe(self): return "a larger bias"
def Mine(target, scale=1.0): return Plain(scale)
"""
    metric = made(tmp_path, text, target, scale=3.0)
    parameters = dict(target.model.named_parameters())
    bias = float(target.model.transformer.ln_f.bias.detach().sum())
    assert metric.measures(parameters, target.model) == {"bias": pytest.approx(bias)}
    assert float(metric(parameters, target.model).detach()) == pytest.approx(3 * bias, rel=1e-6)


def body(line: str, before: str = "") -> str:
    """A metric file whose __call__ returns an expression."""
    return f"{HEADER}{before}\nclass Mine(Metric):\n    'x'\n    def __call__(self, parameters, model):\n        return {line}\n"


WEIGHT = 'parameters["transformer.wpe.weight"]'
FAULTS = {
    "syntax": ("class Mine(:\n", "raised SyntaxError"),
    "raises at import": ("raise RuntimeError('not today')\n", "raised RuntimeError: not today while it was loaded"),
    "exits at import": ("import sys\nsys.exit(0)\n", "raised SystemExit: 0 while"),
    "import of what is not there": ("import no_such_package\n", "ModuleNotFoundError"),
    "no such name": (SMALLER.replace("Smaller", "Main"), "has no 'Mine'. Did you mean Main"),
    "no callable": ("Mine = 3\n", "is no class or function, but a int"),
    "not derived": ("class Mine:\n    def __init__(self, target): pass\n", "cannot be called"),
    "a class from a function": (HEADER + "def Mine(target): return Metric\n", "made the class Metric"),
    "no target": ("def Mine(): return None\n", "cannot be called as NAME"),
    "an option without default": (
        HEADER + "class Mine(Metric):\n    def __init__(self, target, layer): pass\n",
        "'layer'",
    ),
    "construction raises": (HEADER + "def Mine(target): return {}['layer']\n", "KeyError: 'layer' in its construction"),
    "no measures": (
        "class Mine:\n    def __init__(self, t): pass\n    def __call__(self, p, m): return p['transformer.wpe.weight'].sum()\n",
        "has no method 'measures'",
    ),
    "no call": (HEADER + "class Mine(Metric): pass\n", "NotImplementedError: Mine defines no __call__"),
    "call raises": (body(f"{WEIGHT} @ {WEIGHT}"), "raised RuntimeError"),
    "float": (body(f"float({WEIGHT}.sum())"), "gave a float, not a tensor"),
    "no scalar": (body(WEIGHT), "shape (128, 96)"),
    "integer": (body(f"{WEIGHT}.sum().long()"), "torch.int64"),
    "not finite": (body(f"{WEIGHT}.sum() / 0"), "before any fine-tuning"),
    "no graph": (body(f"{WEIGHT}.detach().sum()"), "no graph"),
    "its own model": (body("model.transformer.wpe.weight.sum()"), "does not depend on the target's parameters"),
    "gradient not finite": (
        body(f"({WEIGHT} - {WEIGHT}.detach()).abs().sqrt().sum()"),
        "wpe.weight that is not finite",
    ),
    "measures no mapping": (body(f"{WEIGHT}.sum()") + "    def measures(self, p, m): return 3\n", "in measures"),
    "measures no number": (body(f"{WEIGHT}.sum()") + "    def measures(self, p, m): return {'a': 'b'}\n", "ValueError"),
    "measure not finite": (
        body(f"{WEIGHT}.sum()") + "    def measures(self, p, m): return {'a': float('nan')}\n",
        "measure a = nan",
    ),
    "measure of a reserved name": (
        body(f"{WEIGHT}.sum()") + "    def measures(self, p, m): return {'lr': 1}\n",
        "measure named 'lr'",
    ),
    "no description": (body(f"{WEIGHT}.sum()") + "    def describe(self): return ''\n", "empty description"),
    "picture of nothing": (body(f"{WEIGHT}.sum()") + "    def picture(self, p): return None\n", "no PIL image"),
    "picture raises": (body(f"{WEIGHT}.sum()") + "    def picture(self, p): return 1 / 0\n", "ZeroDivisionError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_before_the_first_rollout(fault: str, tmp_path: Path, target: LanguageModel) -> None:
    text, message = FAULTS[fault]
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        made(tmp_path, text, target)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert all(torch.equal(value, before[name]) for name, value in target.model.state_dict().items())


def test_options_are_checked_by_name(tmp_path: Path, target: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"takes no option 'pwoer'\. Did you mean power"):
        made(tmp_path, SMALLER, target, "Smaller", pwoer=2)
    with pytest.raises(UsageError, match=r"takes no option 'x'\. Leave it out"):
        made(
            tmp_path,
            body(f"{WEIGHT}.sum()").replace("    'x'\n", "    'x'\n    def __init__(self, t): pass\n"),
            target,
            x=2,
        )


def test_a_file_is_never_run_on_the_word_of_settings(tmp_path: Path, target: LanguageModel) -> None:
    path, trace = tmp_path / "mine.py", tmp_path / "trace"
    path.write_text(f"open({str(trace)!r}, 'w').write('run')\n{SMALLER}")
    settings = CustomOptions(name="custom", path=f"{path}:Smaller")
    with pytest.raises(UsageError, match="never run on the word of settings") as caught:
        build_custom(settings, target, None)
    assert f"--metric {path}:Smaller" in caught.value.remedy
    assert custom.digest(parse_reference(settings.path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not trace.exists()  # naming and hashing a file runs nothing
    build_custom(settings, target, f"{path}:Smaller")
    assert trace.exists()


def test_a_changed_file_and_another_name_are_noticed(tmp_path: Path, target: LanguageModel) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SMALLER)
    settings = CustomOptions(
        name="custom", path="/elsewhere/mine.py:Smaller", sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    assert build_custom(settings, target, f"{path}:Smaller").describe() == "A smaller position embedding"
    with pytest.raises(UsageError, match="for the metric 'Smaller', not 'Metric'"):
        build_custom(settings, target, f"{path}:Metric")
    path.write_text(SMALLER + "# changed\n")
    with pytest.raises(UsageError, match="is not the file that these settings were made with"):
        build_custom(settings, target, f"{path}:Smaller")


@pytest.mark.parametrize("text", ["", "a/b", "mine.txt:X", "mine.py", "mine.py:", "mine.py:a b", "mine.py:1"])
def test_references_that_are_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("class One: ...\ndef two(): ...\n_three = 3\n")
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    if text.startswith("mine.py"):
        assert str(caught.value).endswith("Give one of: --metric mine.py:One, --metric mine.py:two")
    assert parse_reference("mine.py:One") == Reference(tmp_path / "mine.py", "One")
    assert parse_reference("steer-direction") == Reference(None, "steer-direction")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "huge.py").write_bytes(b"#" * 1_000_001)
    (tmp_path / "folder.py").mkdir()
    for name, message in (
        ("none.py", "no metric file"),
        ("huge.py", "larger than 1 MB"),
        ("folder.py", "no metric file"),
    ):
        with pytest.raises(UsageError, match=message):
            custom.load(Reference(tmp_path / name, "X"))


def test_entry_points(target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package's entry point is found by name, also from settings alone; its faults and doubles are one line."""
    place = tmp_path / "site"
    (place / "other-2.0.dist-info").mkdir(parents=True)
    (place / "other-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    (place / "other-2.0.dist-info" / "entry_points.txt").write_text(
        "[dpg.metrics]\nsmaller = other_metrics:Smaller\nbroken = other_broken:X\ndouble = other_metrics:Smaller\n"
    )
    (place / "more-1.0.dist-info").mkdir()
    (place / "more-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    (place / "more-1.0.dist-info" / "entry_points.txt").write_text("[dpg.metrics]\ndouble = elsewhere:X\n")
    (place / "other_metrics.py").write_text(SMALLER)
    (place / "other_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(place))
    metric = build_custom(CustomOptions(name="custom", path="smaller"), target, None)
    assert metric.record() == {"metric": "smaller", "origin": "other_metrics:Smaller of other 2.0", "sha256": ""}
    assert build_custom(CustomOptions(name="custom"), target, "smaller").factory.source is None
    for name, message in (
        ("broken", "of other 2.0 raised ZeroDivisionError"),
        ("double", "Several packages have a metric 'double': .*other 2.0"),
        ("smalller", "Did you mean smaller"),
    ):
        with pytest.raises(UsageError, match=message):
            build_custom(CustomOptions(name="custom"), target, name)
    entries = {entry.name: entry for entry in catalogue()}
    assert entries["smaller"].options == ["power"]
    assert entries["smaller"].source == "other 2.0"
    assert entries["broken"].about.startswith("cannot be loaded")
    assert entries["pattern"].source == "built-in"
    sys.modules.pop("other_metrics")


def test_the_examples_are_registered() -> None:
    """By the package's own entry points; `pip install -e .` again where this fails after an update."""
    values = {point.name: point.value for point in entry_points(group=custom.GROUP)}
    assert {"steer-direction", "label-accuracy", "attention-bitmap", "forget-text"} <= values.keys()
    listed = {entry.name: entry for entry in catalogue()}
    for name in ("steer-direction", "label-accuracy", "attention-bitmap", "forget-text"):
        assert "cannot be loaded" not in listed[name].about
        assert len(listed[name].about) > 20
    assert listed["steer-direction"].options == ["layer", "prompts", "toward", "away"]


def test_settings_of_a_custom_metric() -> None:
    data = {
        "name": "custom",
        "path": "x.py:X",
        "options": {"layer": 1, "texts": ["a", "b"], "deep": {"x": [1.5, True]}},
    }
    config = validate({"metric": data})
    assert validate({"metric": tomllib.loads(to_toml(config))["metric"]}).metric == config.metric
    for options in ({"x": math.inf}, {"x": [math.nan]}, {"x": None}, {"a b": 1}, {"x": date(2026, 1, 1)}):
        with pytest.raises(ConfigError, match="metric"):
            validate({"metric": {"name": "custom", "options": options}})
    with pytest.raises(ConfigError, match="sha256"):
        validate({"metric": {"name": "custom", "sha256": "abc"}})


def test_reserved_names_are_those_of_the_log() -> None:
    """What an outer step logs besides Φ, the metric's measures and the policy's figures is exactly what is reserved."""
    config = validate({**find("l2-shrink.tiny").data(), "steps": 1})
    small = {"prompts": {"source": "tiny", "per_step": 2}, "rollout": {"group_size": 2, "max_tokens": 4}}
    built = build(validate({**config.model_dump(mode="json"), **small}))
    report = outer_step(built.players, built.spec, built.prompts.at(0), 0)
    logged = {name for name in report.numbers if not name.startswith("policy_")}
    not_always = {
        "well_formed",
        "well_formed_asked",
        "sgd_lr",
        "phi_runs_mean",
        "phi_runs_std",
        "phi_z",
    }  # see test_tracking
    assert (logged - {"phi"} - report.result.measures.keys()) | not_always == RESERVED


def test_suggestions() -> None:
    assert suggestion("qr-embed", ["l2-shrink.tiny", "qr-embed.tiny"], "Presets") == "Did you mean qr-embed.tiny?"
    assert suggestion("zzz", ["a", "b"], "It has") == "It has: a, b."
    listed = ", ".join(map(str, range(10, 10 + MOST)))
    assert suggestion("zzz", map(str, range(10, 11 + MOST)), "It has") == f"It has: {listed}, ..."
    assert suggestion("zzz", map(str, range(10, 10 + MOST)), "It has") == f"It has: {listed}."
    assert suggestion("zzz", [], "It has") == "It has: nothing."


@pytest.mark.slow
def test_a_run_by_file_from_start_to_verdict(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SMALLER)
    small = ["--set", "steps=2", "--set", "dataset.examples=32", "--set", "prompts.per_step=4"]
    answer = dpg("run", "custom", "--metric", f"{path}:Smaller", *small, "--set", "metric.options.power=3",
                 "--out", tmp_path / "run", "--json")  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = (tmp_path / "run" / "config.toml").read_text()
    assert sha in settings
    assert "power = 3" in settings
    assert json.loads((tmp_path / "run" / "run.json").read_text())["metric"]["sha256"] == sha
    assert (tmp_path / "run" / "metric.py").read_bytes() == path.read_bytes()
    assert "A smaller position embedding" in (tmp_path / "run" / "dataset" / "README.md").read_text()

    alone = dpg("run", "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again")
    assert (alone.returncode, "never run on the word of settings" in alone.stderr) == (2, True)
    assert not (tmp_path / "again").exists()
    alone = dpg("verify", tmp_path / "run")
    assert (alone.returncode, f"--metric {path}:Smaller" in alone.stderr) == (2, True)

    verdict = dpg(
        "verify",
        tmp_path / "run",
        "--metric",
        f"{tmp_path / 'run' / 'metric.py'}:Smaller",
        "--trainer",
        "plain",
        "--json",
    )
    assert verdict.returncode in (0, 4), verdict.stderr
    found = json.loads(verdict.stdout)
    assert found["verified"] is (verdict.returncode == 0)
    assert len(found["data"]["folds"]) == len(found["control"]["folds"]) == 4
    assert found["data"]["measures"]["phi"] == pytest.approx(json.loads(answer.stdout)["measures"]["phi"], rel=1e-5)

    path.write_text(SMALLER + "# another\n")
    changed = dpg("verify", tmp_path / "run", "--metric", f"{path}:Smaller")
    assert (changed.returncode, "is not the file" in changed.stderr) == (2, True)
    again = dpg("run", "--config", tmp_path / "run" / "config.toml", "--metric", f"{path}:Smaller", "--dry-run")
    assert again.returncode == 0, again.stderr
    assert "has changed since these settings were written" in again.stderr
    assert dpg("run", "custom", "--metric", f"{path}:Smaler", "--debug", "--dry-run").stderr.count("Traceback") == 1


def test_the_metrics_of_the_documentation_work(tmp_path: Path, target: LanguageModel) -> None:
    page = (Path(__file__).parent.parent / "docs" / "custom-metrics.md").read_text(encoding="utf-8")
    first, second = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    imports = first[: first.index("class")]
    for text, options, block in ((first, {}, 0), (imports + second, {"block": 1}, 1)):
        metric = made(tmp_path, text, target, "QuietBlock", **options)
        weight = target.model.get_parameter(f"transformer.h.{block}.mlp.c_proj.weight")
        parameters = dict(target.model.named_parameters())
        assert float(metric(parameters, target.model).detach()) == pytest.approx(
            -float(weight.detach().norm()), rel=1e-6
        )
        assert metric.describe().startswith("A smaller output matrix in")
