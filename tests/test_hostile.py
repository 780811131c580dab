"""Bad and hostile input: settings, overrides, preset names, checkpoints, logs. Each gives one line and exit code 2.

Every case below must be refused (or, for a checkpoint, passed over); nothing may change outside the run folder.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from dpg_cli.cli import main
from dpg_cli.driver import checkpoint as checkpoints
from dpg_cli.driver.build import Built, build
from dpg_cli.driver.execute import execute
from dpg_cli.errors import DpgError, UsageError, one_line
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.sessions import read_info
from dpg_cli.settings.config import Config, NormOptions, PatternOptions, TextLossOptions, load_toml, validate
from dpg_cli.settings.presets import find, parse_override, resolve


def relaxed(examples: int) -> settings:
    """Hypothesis with fixed draws, without a limit of time."""
    unfit = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=unfit)


def refused(call: Callable[[], Any]) -> str:
    """The line with which something is refused."""
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.exit_code == 2
    line = one_line(str(caught.value))
    assert 20 < len(line) < 3000
    assert line.isprintable()
    return line


# ---------------------------------------------------------------------------------------------------------------- settings


def leaves(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every setting as `section.key`."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if name == "metric":
            for options in (PatternOptions, NormOptions, TextLossOptions):
                yield from (f"metric.{options.model_fields['name'].default!s}/{key}" for key in options.model_fields)
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


BAD_VALUES = {  # bad for every setting there is
    "a table": "{a = 1}",
    "a date": "2020-01-01",
    "not a number": "nan",
    "infinity": "-inf",
    "a huge number": "1" + "0" * 300,
    "nested lists": "[[[1]]]",
    "an empty table": "{}",
}
SETTINGS = [name for name in leaves() if "/" not in name]


@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES)
def test_every_setting_refuses(value: str, tmp_path: Path) -> None:
    assert len(SETTINGS) * len(BAD_VALUES) >= 300
    for key in SETTINGS:
        path = tmp_path / "bad.toml"
        path.write_text(f"{key} = {value}\n")
        assert key in refused(lambda path=path: validate(load_toml(path))), (key, value)
        assert key in refused(lambda key=key: resolve(find("pattern-67.tiny").data(), [f"{key}={value}"]))


BAD_FILES = {
    "unknown key": b"nope = 1",
    "unknown section": b"[nope]\nx = 1",
    "section as value": b"inner = 3",
    "value as section": b"[steps]\nx = 1",
    "list of sections": b"[[inner]]\nlr = 1.0",
    "twice": b"steps = 1\nsteps = 2",
    "no TOML": b"steps: 1",
    "no UTF-8": b"steps = 1 # \xff\xfe",
    "utf-16": "steps = 1".encode("utf-16"),
    "null": b"\0" * 100,
    "control characters": b'task = "\x1b[31m"',
    "cut off": b'task = "x',
    "deep list": b"x = " + b"[" * 5000 + b"]" * 5000,
    "deep list that TOML reads": b"seed = " + b"[" * 200 + b"]" * 200,
    "deep table": b"x = " + b"{a=" * 5000 + b"1" + b"}" * 5000,
    "deep key": b".".join([b"a"] * 50_000) + b" = 1",
    "deep key in a section": b"[inner]\nlr." + b".".join([b"a"] * 5000) + b" = 1",
    "huge integer": b"steps = " + b"9" * 100_000,
    "huge hexadecimal integer": b"steps = 0x" + b"f" * 100_000,
    "huge exponent": b"[inner]\nlr = 1e999999999",
    "many keys": b"\n".join(b"k%d = 1" % number for number in range(20_000)),
    "long key": b"k" * 100_000 + b" = 1",
    "long value": b'[credit]\nmode = "' + b"x" * 500_000 + b'"',
    "too large": b"#" * 2_000_000,
    "pickle": pickle.dumps({"steps": 1}),
    "code": b"import os\nos.system('touch hacked')",
    "another metric's keys": b'[metric]\nname = "norm"\nimage = "x"',
    "unknown metric": b'[metric]\nname = "os.system"',
    "negative origin": b"[metric]\nname = 'pattern'\norigin = [-1, 0]",
    "origin of three": b"[metric]\nname = 'pattern'\norigin = [1, 0, 0]",
    "boolean number": b"steps = true",
    "number as text": b'steps = "12"',
    "float steps": b"steps = 1.5",
    "no steps": b"steps = 0",
    "negative checkpoint time": b"[checkpoint]\nevery_seconds = -1.0",
    "negative checkpoint steps": b"[checkpoint]\nevery_steps = -1",
    "seed too large": b"seed = 4294967296",
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_settings_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    refused(lambda: resolve(load_toml(path), []))
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.toml"]


def test_settings_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "none", tmp_path / "loop", tmp_path / ("x" * 300), Path("/dev/null/x")):
        refused(lambda path=path: load_toml(path))


BAD_OVERRIDES = [
    "", "=", "steps", "=1", ".=1", "steps.=1", ".steps=1", "inner..lr=1", "steps=", "steps=x", "steps=1 2", "steps=[", "nope=1",
    "inner=1", "inner.nope=1", "inner.lr.x=1", "inner.lr=nan", "inner.lr=inf", "inner.lr=-1", "inner.lr=0", "inner.lr=1e400",
    "steps=1\nseed=2", "steps=1e3", "steps=true", "metric=1", "metric.name=os", "metric.name=", "__class__=1", "model_config.extra=1",
    "inner.__dict__.lr=1", "models.dtype=float16", "credit.mode=../x", "steps=" + "9" * 5000, "steps=0x" + "f" * 9000,
    "steps=" + "[" * 9000, "steps=" + "{a=" * 9000, "a." * 9000 + "a=1", "x" * 9000, "x" * 9000 + "=1", "\0=1", "\x1b[2J=1", "steps=\0",
    "rollout.min_tokens=33", "rollout.group_size=0", "policy.clip=0", "checkpoint.keep=1", "checkpoint.every_steps=-1",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_OVERRIDES, ids=range(len(BAD_OVERRIDES)))
def test_overrides(text: str) -> None:
    refused(lambda: resolve(find("pattern-67.tiny").data(), [text]))


@relaxed(200)
@given(
    st.text(max_size=60)
    | st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,3}=[-+0-9eE.x\[\]{}\"',: ]{0,12}", fullmatch=True)
)
def test_any_override_is_taken_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_override(text), dict)
        resolve(find("pattern-67.tiny").data(), [text])
    except DpgError as error:
        assert error.exit_code == 2


@pytest.mark.parametrize(
    "name",
    ["..", ".", "/", "", "../presets/pattern-67.tiny", "pattern-67.tiny/../qr-embed.tiny", "/etc/passwd", "~/x", "*", "evil",
     "%2e%2e/evil", "pattern-67.tiny.toml", "PATTERN-67.TINY", "pattern-67\0.tiny", "\x1b[31m", "x" * 10_000, "../evil", "./evil"],
    ids=range(18),
)  # fmt: skip
def test_preset_names_lead_nowhere(name: str, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path.parent):
        (place / "evil.toml").write_text(find("pattern-67.tiny").path.read_text())
    for wanted in (name, str(tmp_path / name), f"../{name}", f"{tmp_path}/evil"):
        assert "There is no preset" in refused(lambda wanted=wanted: find(wanted))


# ------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Built]:
    """A run that was left after two outer steps, and the run made anew from its settings."""
    overrides = [
        "steps=3",
        "prompts.per_step=2",
        "rollout.max_tokens=4",
        "rollout.min_tokens=2",
        "checkpoint.every_steps=1",
    ]
    config = resolve(find("pattern-67.tiny").data(), overrides)
    folder = RunFolder(tmp_path_factory.mktemp("begun") / "run")

    def leave(report: Any) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(config, folder, on_step=leave)
    folder.rewind_metrics(json.loads((folder.checkpoints / "step-2" / "state.json").read_text())["metrics_bytes"])
    return folder.path, config, build(config)


def state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `state.json`."""
    data = json.loads((path / "state.json").read_text())
    change(data)
    (path / "state.json").write_text(json.dumps(data))


def put(path: Path, name: str, content: bytes) -> None:
    """Write one of the three files, with its sum put right: only its content can give it away."""
    (path / f"{name}.safetensors").write_bytes(content)
    state(path, lambda data: data["sha256"].update({name: hashlib.sha256(content).hexdigest()}))


def tensors(path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of one of the three files."""
    data = load_file(path / f"{name}.safetensors")
    change(data)
    save_file({key: tensor.contiguous() for key, tensor in data.items()}, path / "new")
    put(path, name, (path / "new").read_bytes())
    (path / "new").unlink()


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class Exploit:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("hacked"),))


HEAD = "lm_head.weight"
Spoil = Callable[[Path], Any]
SPOILT: dict[str, Spoil] = {
    "huge header": lambda p: put(p, "generator", raw({}, length=2**63)),
    "header longer than the file": lambda p: put(p, "generator", raw({}, length=10_000)),
    "header of 90 MB": lambda p: put(p, "rng", raw(b" " * 90_000_000)),
    "header is no JSON": lambda p: put(p, "generator", raw(b"{" * 50)),
    "header is a list": lambda p: put(p, "generator", raw([])),
    "deep header": lambda p: put(p, "generator", raw(b"[" * 50_000)),
    "no tensors": lambda p: put(p, "generator", raw({})),
    "eight bytes": lambda p: put(p, "generator", b"\0" * 8),
    "seven bytes": lambda p: put(p, "generator", b"\0" * 7),
    "zeros": lambda p: put(p, "optimizer", bytes(100_000)),
    "pickle": lambda p: put(p, "generator", pickle.dumps(Exploit())),
    "torch pickle": lambda p: put(p, "generator", pickled()),
    "offsets past the end": lambda p: put(p, "generator", raw({HEAD: entry([512, 96], [0, 196_608])})),
    "negative offsets": lambda p: put(p, "generator", raw({HEAD: entry([1], [-4, 0])}, bytes(4))),
    "offsets backwards": lambda p: put(p, "generator", raw({HEAD: entry([1], [4, 0])}, bytes(4))),
    "overlapping": lambda p: put(p, "rng", raw({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, bytes(4))),
    "huge shape": lambda p: put(p, "rng", raw({"order": entry([2**62, 2**62], [0, 4])}, bytes(4))),
    "negative shape": lambda p: put(p, "rng", raw({"order": entry([-1], [0, 4])}, bytes(4))),
    "fractional shape": lambda p: put(p, "rng", raw({"order": entry([1.5], [0, 6])}, bytes(6))),
    "unknown dtype": lambda p: put(p, "rng", raw({"order": entry([1], [0, 4], "OBJECT")}, bytes(4))),
    "path as tensor name": lambda p: tensors(p, "generator", lambda t: t.update({"../../x": t.pop(HEAD)})),
    "escape as tensor name": lambda p: tensors(p, "generator", lambda t: t.update({"\x1b[2J": t.pop(HEAD)})),
    "missing tensor": lambda p: tensors(p, "generator", lambda t: t.pop(HEAD)),
    "extra tensor": lambda p: tensors(p, "generator", lambda t: t.update(extra=torch.zeros(1))),
    "wrong shape": lambda p: tensors(p, "generator", lambda t: t.update({HEAD: t[HEAD][:-1]})),
    "transposed": lambda p: tensors(p, "generator", lambda t: t.update({HEAD: t[HEAD].T})),
    "wrong dtype": lambda p: tensors(p, "generator", lambda t: t.update({HEAD: t[HEAD].double()})),
    "integers": lambda p: tensors(p, "generator", lambda t: t.update({HEAD: t[HEAD].int()})),
    "half": lambda p: tensors(p, "generator", lambda t: t.update({HEAD: t[HEAD].half()})),
    "nan": lambda p: tensors(p, "generator", lambda t: t[HEAD].fill_(float("nan"))),
    "infinity": lambda p: tensors(p, "generator", lambda t: t[HEAD][0].fill_(float("inf"))),
    "no moments": lambda p: tensors(p, "optimizer", lambda t: t.pop(f"exp_avg/{HEAD}")),
    "no step": lambda p: tensors(p, "optimizer", lambda t: t.pop(f"step/{HEAD}")),
    "step of another shape": lambda p: tensors(p, "optimizer", lambda t: t.update({f"step/{HEAD}": torch.ones(1)})),
    "negative step": lambda p: tensors(p, "optimizer", lambda t: t[f"step/{HEAD}"].fill_(-1)),
    "nan step": lambda p: tensors(p, "optimizer", lambda t: t[f"step/{HEAD}"].fill_(float("nan"))),
    "negative variance": lambda p: tensors(p, "optimizer", lambda t: t[f"exp_avg_sq/{HEAD}"][0].fill_(-1e-9)),
    "nan moment": lambda p: tensors(p, "optimizer", lambda t: t[f"exp_avg/{HEAD}"][0].fill_(float("nan"))),
    "rng too short": lambda p: tensors(p, "rng", lambda t: t.update(order=t["order"][:-1])),
    "rng too long": lambda p: tensors(p, "rng", lambda t: t.update(order=torch.cat([t["order"]] * 2))),
    "rng of floats": lambda p: tensors(p, "rng", lambda t: t.update(order=t["order"].float())),
    "rng of ones": lambda p: tensors(p, "rng", lambda t: t["torch"].fill_(255)),
    "rng missing": lambda p: tensors(p, "rng", lambda t: t.pop("sampling")),
    "of another part": lambda p: put(p, "generator", (p / "optimizer.safetensors").read_bytes()),
    "a folder as file": lambda p: ((p / "rng.safetensors").unlink(), (p / "rng.safetensors").mkdir()),
    "a link as file": lambda p: link(p / "rng.safetensors", p.parent / "step-1" / "rng.safetensors"),
    "a link as state": lambda p: link(p / "state.json", p.parent / "step-1" / "state.json"),
    "state of another": lambda p: shutil.copy(p.parent / "step-1" / "state.json", p / "state.json"),
    "state is empty": lambda p: (p / "state.json").write_bytes(b""),
    "state is null": lambda p: (p / "state.json").write_bytes(b"null"),
    "state is a list": lambda p: (p / "state.json").write_bytes(b"[]"),
    "state is deep": lambda p: (p / "state.json").write_bytes(b"[" * 100_000),
    "state is deep within": lambda p: (p / "state.json").write_bytes(
        b'{"settings": ' + b'{"a":' * 900 + b"1" + b"}" * 901
    ),
    "state is large": lambda p: (p / "state.json").write_bytes(b" " * 2_000_000),
    "state is a pickle": lambda p: (p / "state.json").write_bytes(pickle.dumps(Exploit())),
    "state has a huge number": lambda p: (p / "state.json").write_bytes(b'{"step": ' + b"9" * 9000 + b"}"),
    "state is cut off": lambda p: (p / "state.json").write_bytes((p / "state.json").read_bytes()[:-20]),
    "state is no UTF-8": lambda p: (p / "state.json").write_bytes(b"\xff\xfe\xfa"),
    "step of another folder": lambda p: state(p, lambda d: d.update(step=1)),
    "step beyond the run": lambda p: state(p, lambda d: d.update(step=2**31)),
    "negative number of bytes": lambda p: state(p, lambda d: d.update(metrics_bytes=-1)),
    "more bytes than there are": lambda p: state(p, lambda d: d.update(metrics_bytes=2**62)),
    "fewer bytes": lambda p: state(p, lambda d: d.update(metrics_bytes=d["metrics_bytes"] - 1)),
    "no bytes": lambda p: state(p, lambda d: d.update(metrics_bytes=0)),
    "huge bytes": lambda p: state(p, lambda d: d.update(metrics_bytes=2**64)),
    "unknown key": lambda p: state(p, lambda d: d.update(path="../../../etc/passwd")),
    "path as part": lambda p: state(p, lambda d: d["sha256"].update({"../../x": "0"})),
    "path as sum": lambda p: state(p, lambda d: d["sha256"].update(rng="../../../etc/passwd")),
    "no sums": lambda p: state(p, lambda d: d.update(sha256={})),
    "another format": lambda p: state(p, lambda d: d.update(format=2)),
    "unknown setting": lambda p: state(p, lambda d: d["settings"].update(nope=1)),
    "bad setting": lambda p: state(p, lambda d: d["settings"]["inner"].update(lr="x")),
    "no settings": lambda p: state(p, lambda d: d.update(settings=None)),
    "escape in place": lambda p: state(p, lambda d: d.update(place="\x1b[2J")),
    "long place": lambda p: state(p, lambda d: d.update(place="x" * 10_000)),
    "folder is a file": lambda p: (shutil.rmtree(p), p.write_bytes(b"x")),
    "folder is empty": lambda p: (shutil.rmtree(p), p.mkdir()),
}
for _part in ("generator", "optimizer", "rng"):
    SPOILT[f"{_part} missing"] = lambda p, part=_part: (p / f"{part}.safetensors").unlink()
    for _share in (0.0, 0.01, 0.5, 0.999):
        SPOILT[f"{_part} cut to {_share}"] = lambda p, part=_part, share=_share: cut(p / f"{part}.safetensors", share)
        SPOILT[f"{_part} cut to {_share}, sum put right"] = lambda p, part=_part, share=_share: (
            cut(p / f"{part}.safetensors", share),
            put(p, part, (p / f"{part}.safetensors").read_bytes()),
        )
for _key in ("step", "metrics_bytes", "prompts", "settings", "place", "sha256"):
    SPOILT[f"state without {_key}"] = lambda p, key=_key: state(p, lambda d: d.pop(key))
    for _value in (None, [], "x" if _key in ("step", "metrics_bytes", "settings", "sha256") else 1, 1.5, True):
        SPOILT[f"state with {_key} {_value!r}"] = lambda p, key=_key, value=_value: state(
            p, lambda d: d.update({key: value})
        )


def pickled() -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save({HEAD: torch.zeros(2), "x": Exploit()}, buffer)
    return buffer.getvalue()


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


def test_enough_is_tried() -> None:
    assert len(SPOILT) >= 100
    assert len(SPOILT) + len(BAD_FILES) + len(BAD_OVERRIDES) + len(BAD_METRICS) + len(BAD_INFO) >= 200


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_checkpoints(spoil: Spoil, begun: tuple[Path, Config, Built], tmp_path: Path) -> None:
    """The one before it is taken; without one the run is refused; nothing is changed by looking."""
    path, config, built = begun
    shutil.copytree(path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    spoil(folder.checkpoints / "step-2")
    before = sorted(tmp_path.rglob("*"))
    found, faults = checkpoints.newest(folder, config, built)
    assert found is not None
    assert found.header.step == 1
    assert len(faults) == 1
    assert faults[0].startswith("step-2 is damaged (")
    assert sorted(tmp_path.rglob("*")) == before
    shutil.rmtree(folder.checkpoints / "step-1")
    assert "No checkpoint" in refused(lambda: checkpoints.newest(folder, config, built))
    assert not (tmp_path / "hacked").exists()


@relaxed(150)
@given(
    part=st.sampled_from(["generator", "optimizer", "rng", "state"]), place=st.floats(0, 1), flip=st.integers(1, 255)
)
def test_any_flipped_byte_is_noticed_or_harmless(
    part: str, place: float, flip: int, begun: tuple[Path, Config, Built], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, config, built = begun
    name = "state.json" if part == "state" else f"{part}.safetensors"
    file = path / "checkpoints" / "step-2" / name
    content = file.read_bytes()
    at = int(place * (len(content) - 1))
    try:
        file.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
        found, faults = checkpoints.newest(RunFolder(path), config, built)
        assert found is not None
        if part != "state":
            assert found.header.step == 1
            assert len(faults) == 1
    except UsageError as error:  # a changed setting is another run's
        assert part == "state"
        assert "begun with other" in str(error) or "are not those" in str(error)
    finally:
        file.write_bytes(content)


def test_odd_names_among_the_checkpoints_are_left_alone(begun: tuple[Path, Config, Built], tmp_path: Path) -> None:
    path, config, built = begun
    shutil.copytree(path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for name in (
        "step-03",
        "step--1",
        "step-1e3",
        "step-99999999999999999999",
        "step-\u0663",
        "step-",
        "Step-9",
        "notes",
    ):
        shutil.copytree(folder.checkpoints / "step-2", folder.checkpoints / name)
    found, faults = checkpoints.newest(folder, config, built)
    assert found is not None
    assert (found.header.step, faults) == (2, [])
    shutil.copytree(folder.checkpoints / "step-2", folder.checkpoints / "step-4")
    state(folder.checkpoints / "step-4", lambda data: data.update(step=4))
    found, faults = checkpoints.newest(folder, config, built)
    assert found is not None
    assert found.header.step == 2
    assert "only 3 outer steps" in faults[0]


# ------------------------------------------------------------------------------------------------------ logs of the run

BAD_METRICS = [
    b"x\n", b"[]\n", b"1\n", b"null\n", b'"a"\n', b"{\n", b"\n", b"\xff\n", b"\0\n", b"{}\n{\n", b"[" * 9000 + b"\n",
    b'{"a": ' + b"9" * 9000 + b"}\n", b'{"step": 0}\n{"step"\n{"step": 2}\n', pickle.dumps(Exploit()) + b"\n",
]  # fmt: skip
BAD_INFO = [
    b"", b"x", b"[]", b"1", b"null", b"{", b"\xff", b"\0", b"[" * 9000, b'{"finished": "yes"}', b'{"finished": 1}',
    b'{"sessions": 1}', b'{"sessions": [1]}', b'{"sessions": {}}', b'{"sessions": [{"seconds": "1"}]}',
    b'{"sessions": [{"seconds": -1}]}', b'{"sessions": [{"seconds": NaN}]}', b'{"sessions": [{"seconds": 1e300}]}',
    b'{"sessions": [{"seconds": null}]}', b'{"sessions": [{"seconds": [1]}]}', b'{"measures": []}', b'{"measures": {"a": "b"}}',
    b'{"control": 1}', b'{"seconds": -1}', b'{"seconds": "1"}', b'{"seconds": Infinity}', b'{"peak_memory_mb": "x"}',
    b'{"seconds": ' + b"9" * 9000 + b"}", b'{"sessions": ' + b"[" * 5000, pickle.dumps(Exploit()),
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_METRICS, ids=range(len(BAD_METRICS)))
def test_metrics(content: bytes, begun: tuple[Path, Config, Built], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(content)
    refused(folder.read_metrics)
    assert "metrics.jsonl does not hold" in str(refused_checkpoints(begun, content, tmp_path))


def refused_checkpoints(begun: tuple[Path, Config, Built], content: bytes, place: Path) -> str:
    """What is said of a run with other metrics."""
    shutil.copytree(begun[0], place / "run")
    folder = RunFolder(place / "run")
    folder.metrics.write_bytes(content)
    return refused(lambda: checkpoints.newest(folder, *begun[1:]))


@pytest.mark.parametrize("content", BAD_INFO, ids=range(len(BAD_INFO)))
def test_run_json(content: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.info.write_bytes(content)
    assert "run.json is damaged" in refused(lambda: read_info(folder))


@relaxed(200)
@given(
    st.binary(max_size=80)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["finished", "sessions", "seconds", "measures", "step", "x"]), inner, max_size=4
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode() + b"\n")
)
def test_any_log_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(content)
    folder.info.write_bytes(content)
    for read in (folder.read_metrics, lambda: read_info(folder), lambda: folder.rewind_metrics(0)):
        try:
            read()
        except DpgError as error:
            assert error.exit_code == 2
    assert folder.metrics.read_bytes() == b""


# ------------------------------------------------------------------------------------------------------ the command line


def test_at_the_command_line(
    begun: tuple[Path, Config, Built],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on stderr, nothing on stdout, exit code 2, and nothing new anywhere."""
    shutil.copytree(begun[0], tmp_path / "spoilt")
    for step in (1, 2):
        SPOILT["pickle"](tmp_path / "spoilt" / "checkpoints" / f"step-{step}")
    shutil.copytree(begun[0], tmp_path / "linked")
    (tmp_path / "linked" / "target").symlink_to(tmp_path / "spoilt")
    shutil.copytree(begun[0], tmp_path / "garbage")
    (tmp_path / "garbage" / "run.json").write_bytes(b"\0")
    shutil.copytree(begun[0], tmp_path / "other")
    (tmp_path / "other" / "config.toml").write_text("steps = 'x'\x1b")
    (tmp_path / "deep.toml").write_bytes(BAD_FILES["deep key"])
    before = sorted(tmp_path.rglob("*"))
    for arguments in (
        ["resume", "spoilt"], ["resume", "linked"], ["resume", "garbage"], ["resume", "other"], ["resume", "deep.toml"],
        ["resume", "/dev/null"], ["resume", "\x1b[31mx"], ["run", "--config", "deep.toml"], ["run", "../../deep"],
        ["run", "pattern-67", "--scale", "../tiny"], ["run", "pattern-67", "--set", "a." * 5000 + "b=1"],
        ["run", "pattern-67", "--out", "/proc/dpg"], ["run", "pattern-67", "--out", "/dev/null"],
        ["run", "pattern-67", "--out", "deep.toml", "--resume"], ["run", "pattern-67", "--out", "x" * 300],
        ["run", "pattern-67", "--out", "garbage", "--resume"], ["run", "pattern-67", "--device", "meta"],
        ["run", "qr-embed", "--set", 'metric.image="a\\u0000b"'], ["run", "qr-embed", "--set", 'prompts.source="a\\u0000b"'],
        ["run", "qr-embed", "--set", 'models.target="a\\u0000b"'], ["run", "qr-embed", "--set", 'device="a\\u0000b"'],
        ["presets", "show", "../presets/pattern-67.tiny"], ["presets", "validate", "deep.toml"],
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["dpg", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("dpg: ")]
        assert (caught.value.code, out, len(lines)) == (2, "", 1), (arguments[:4], err[-500:])
        assert "\x1b" not in err, arguments
        assert sorted(tmp_path.rglob("*")) == before, arguments
