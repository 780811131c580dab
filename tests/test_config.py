"""Settings: closed, frozen, all faults at once; presets; overrides; round trips."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpg_cli.errors import ConfigError, DpgError, UsageError
from dpg_cli.settings.config import Config, load_toml, to_toml, validate
from dpg_cli.settings.presets import all_presets, find, merge, parse_override, resolve


def test_every_preset_validates_and_is_named_after_its_settings() -> None:
    presets = all_presets()
    files = list((Path(__file__).parent.parent / "presets").glob("*.toml"))
    assert len(presets) == len(files) >= 16
    for preset in presets:
        config = validate(preset.data())
        assert (config.task, config.scale) == (preset.task, preset.scale)
        assert len(preset.about) > 20
        assert validate(tomllib.loads(to_toml(config))) == config


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(
            {
                "inner": {"lr": -1, "foo": 2},
                "steps": "x",
                "unknown": 1,
                "metric": {"name": "pattern", "image": "a", "text": "b"},
            }
        )
    text = str(caught.value)
    assert len(caught.value.faults) == 5
    for part in ("inner.lr", "inner.foo: unknown setting", "steps", "unknown: unknown setting", "exclude each other"):
        assert part in text
    assert "\n" not in text


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        validate({}).steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"credit": {"mode": "token"}, "rollout": {"group_size": 1}}, "nothing to compare"),
        ({"rollout": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens"),
        ({"inner": {"lr": float("nan")}}, "inner.lr"),
        ({"inner": {"beta1": 1.0}}, "inner.beta1"),
        ({"inner": {"nesterov": True}}, "inner: nesterov looks ahead along a momentum"),
        ({"inner": {"optimizer": "sgd", "nesterov": True}}, "a momentum above 0"),
        ({"inner": {"optimizer": "lion"}}, "inner.optimizer"),
        ({"steps": 10**12}, "steps"),
        ({"seed": -1}, "seed"),
        ({"metric": {"name": "pattern", "origin": [0, -1]}}, "metric.origin"),
        ({"metric": {"origin": [0, 1]}}, "metric.name: give one of pattern"),
        (
            {"metric": {"name": "text-loss", "uuid": "123e4567-e89b-42d3-a456-42661417400g"}},
            "metric.uuid: .* no UUID",
        ),
        ({"metric": {"name": "text-loss", "uuid": "123e4567"}}, "metric.uuid"),
        ({"metric": {"name": "text-loss", "uuid": "fresh", "text": "x"}}, "exactly one"),
        ({"metric": {"name": "text-loss", "file": "task_{language}"}}, "no language is given"),
        ({"prompts": {"chat": "yes"}}, "prompts.chat"),
        ({"prompts": {"limit": -1}}, "prompts.limit"),
    ],
)
def test_impossible_settings_are_refused(data: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        validate(data)


def test_overrides() -> None:
    assert parse_override("inner.lr=1e-4") == {"inner": {"lr": 1e-4}}
    assert parse_override("steps=12") == {"steps": 12}
    assert parse_override("metric.text=HELLO WORLD") == {"metric": {"text": "HELLO WORLD"}}
    assert parse_override('metric.text="a=b"') == {"metric": {"text": "a=b"}}
    for wrong in ("steps", "=3", "a..b=1", ""):
        with pytest.raises(UsageError, match="key=value"):
            parse_override(wrong)
    config = resolve(find("qr-embed.tiny").data(), ["steps=12", "inner.eps=1e-2"], {"seed": 7})
    assert (config.steps, config.inner.eps, config.seed) == (12, 1e-2, 7)
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert merge({"metric": {"name": "pattern", "text": "a", "sharpness": 2.0}}, {"metric": {"image": "b"}}) == {
        "metric": {"name": "pattern", "image": "b", "sharpness": 2.0}
    }
    assert merge({"metric": {"name": "pattern", "text": "a"}}, {"metric": {"name": "norm"}}) == {
        "metric": {"name": "norm"}
    }
    base = {"metric": {"name": "text-loss", "language": "es", "file": "x"}}
    assert merge(base, {"metric": {"language": "fr"}})["metric"] == {"name": "text-loss", "language": "fr"}
    assert merge(base, {"metric": {"file": "y"}})["metric"] == {"name": "text-loss", "language": "es", "file": "y"}
    assert merge(base, {"metric": {"uuid": "fresh"}})["metric"] == {"name": "text-loss", "uuid": "fresh"}
    named = {"metric": {"name": "text-loss", "language": "es", "file": "task_{language}"}}
    assert merge(named, {"metric": {"language": "fr"}})["metric"]["file"] == "task_{language}"
    with pytest.raises(UsageError, match=r"qr-embed\.tiny"):
        find("no-such")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_settings_file_give_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("settings") / "x.toml"
    path.write_bytes(content)
    try:
        validate(load_toml(path))
    except DpgError as error:
        assert error.exit_code == 2
        assert error.cause


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*Config.model_fields, "nope"]),
        VALUES | st.dictionaries(st.sampled_from(["lr", "name", "per_step", "text", "mode"]), VALUES, max_size=2),
        max_size=3,
    )
)
def test_any_nested_data_is_accepted_or_refused_cleanly(data: dict) -> None:
    try:
        config = validate(data)
    except ConfigError as error:
        assert error.faults
    else:
        assert isinstance(config, Config)
