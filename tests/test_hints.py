"""Every command in a message can be pasted as it was printed: it parses, its paths are quoted, and nothing clings to it."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from short_run import call

from dpg_cli.cli.app import app
from dpg_cli.errors import ConfigError, UsageError
from dpg_cli.escape import pasted
from dpg_cli.runs.commands import command
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config
from dpg_cli.settings.faults import keys_of
from dpg_cli.settings.presets import find, resolve

ROOT = Path(__file__).parent.parent / "dpg_cli"
KNOWN = "|".join(typer.main.get_command(app).commands)
STARTS = re.compile(rf"(?:(?<=^)|(?<=[ `(]))(dpg (?:{KNOWN})|pip install|python -[mc]|hf auth)(?= |$|`)")
QUOTED = {"pasted", "command", "quote", "pickle_remedy"}  # what puts a value into a command
PLAIN = {"again", "run", "extra", "name", "role", "only", "steps", "seed"}  # quoted already, numbers, or names of ours
HOLE = "\x00"  # where a message has a value


def messages() -> Iterator[tuple[str, int, str, list[ast.expr]]]:
    """(file, line, text, values) of every string but docstrings; values stand in the text as holes."""
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        described = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                values = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
                parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
                yield name, node.lineno, "".join(map(str, parts)), values
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described | inner:
                yield name, node.lineno, node.value, []


def commands() -> list[tuple[str, str, list[ast.expr], bool]]:
    """(where, command, values in it, whether it stands in backticks) of every command that some message holds."""
    found = []
    for file, line, text, values in messages():
        for match in STARTS.finditer(text):
            ticked = text[: match.start()].endswith("`")
            rest = text[match.start() :]
            said = rest.partition("`")[0] if ticked else rest
            before = text[: match.start()].count(HOLE)
            found.append((f"{file}:{line}", said, values[before : before + said.count(HOLE)], ticked))
    return found


def test_nothing_clings_to_a_commands_path() -> None:
    """Where a value is a whole command (`command(...)`), it ends its message, or a blank or a backtick follows."""
    faults = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts: list[Any] = node.values if isinstance(node, ast.JoinedStr) else []
            for part, after in zip(parts, [*parts[1:], None], strict=False):
                if not (isinstance(part, ast.FormattedValue) and ast.unparse(part.value).startswith("command")):
                    continue
                text = after.value if isinstance(after, ast.Constant) else "" if after is None else "?"
                if text and str(text)[0] not in " `":
                    faults.append(f"{path.name}:{node.lineno}: {text!r}")
    assert faults == []


def parses(words: list[str]) -> None:
    """Parse a command line without running it.

    Raises:
        Exception: of Typer's parser.
    """
    node: Any = typer.main.get_command(app)
    while hasattr(node, "commands") and words and words[0] in node.commands:
        node, words = node.commands[words[0]], words[1:]
    if hasattr(node, "commands") and words[:1] != ["--help"]:
        raise ValueError(f"no command {words[:1]}")
    if "--help" not in words:
        node.make_context("dpg", list(words))


def test_every_printed_command_parses() -> None:
    found = commands()
    assert len(found) > 25
    faults = []
    for where, said, values, ticked in found:
        for value in values:
            called = value.func if isinstance(value, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", getattr(value, "id", "")))
            if name not in QUOTED | PLAIN:
                faults.append(f"{where}: a value in {said!r} is not quoted: {ast.unparse(value)}")
        if not ticked and said[-1] in ".;,":
            faults.append(f"{where}: something clings to the end of {said!r}")
        if not said.startswith("dpg "):
            continue
        words = shlex.split(said.replace(f"--{HOLE}", "--target").replace(f"{HOLE}--", "--").replace(HOLE, "x"))[1:]
        if ticked and len(words) <= 2 and all(word.isalpha() for word in words):
            words = [*words, "--help"]  # a command's name
        try:
            parses(words)
        except Exception as error:
            faults.append(f"{where}: {said!r} does not parse: {error!r}")
    assert faults == []


@pytest.mark.parametrize("name", ["run", "a run", "it's", "$HOME", "a;b", "-x", "läuft", 'say "so"', "a\\b", "*"])
def test_paths_come_back_from_a_shell(name: str) -> None:
    for text in (command("resume", Path(name)), f"dpg inspect {pasted(name)}"):
        words = shlex.split(text)
        assert len(words) == 3
        assert Path(words[2]) == Path(name)
        parses(words[1:])


def test_the_file_of_an_own_metric_is_named_again() -> None:
    """Without --metric such a run does not go on."""
    own = resolve(find("custom.tiny").data(), ['metric.path="/a b/mine.py:Mine"'])
    assert command("verify", "r", own) == "dpg verify r --metric '/a b/mine.py:Mine'"
    installed = resolve(find("custom.tiny").data(), ['metric.path="steer-direction"'])
    assert command("verify", "r", installed) == "dpg verify r"


def test_hints_of_a_folder_with_blanks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from its first word to its last: what each message says can be done next is done as it was printed."""
    small = [
        "steps=2", "prompts.per_step=2", "rollout.group_size=2", "rollout.max_tokens=4", "rollout.min_tokens=2",
        "inner.batch_size=4", "policy.minibatch=4", "dataset.examples=40",
    ]  # fmt: skip
    sets = [word for setting in small for word in ("--set", setting)]
    answer = call(capsys, monkeypatch, "run", "l2-shrink", "--out", "my runs/one's", *sets)
    assert answer.code == 0, answer.err
    following = answer.out.strip().rpartition("Next: ")[2]
    assert shlex.split(following) == ["dpg", "verify", "my runs/one's"]
    answer = call(capsys, monkeypatch, "run", "l2-shrink", "--out", "my runs/one's", *sets)
    assert answer.code == 2
    resume = answer.err.strip().rpartition(": ")[2]
    assert call(capsys, monkeypatch, *shlex.split(resume)[1:]).code == 0
    assert call(capsys, monkeypatch, *shlex.split(following)[1:]).code in (0, 4)
    with pytest.raises(UsageError, match=r"dpg resume 'my runs/one'\"'\"'s'$"):
        RunFolder.free(Path("my runs/one's"))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("inner.lrr", "inner.lr"),
        ("inner.LR", "inner.lr"),
        ("lr", "inner.lr or policy.lr"),
        ("rollout.groupsize", "rollout.group_size"),
        ("rollout.group-size", "rollout.group_size"),
        ("inner.group_size", "rollout.group_size"),
        ("group_size", "rollout.group_size"),
        ("innner", "inner"),
        ("models.targt", "models.target"),
        ("checkpoint.every", "checkpoint.every_seconds or checkpoint.every_steps"),
        ("metric.langauge", "metric.language"),
        ("metric.documnets", "metric.documents"),
        ("sede", "seed"),
        ("policy.learning_rate", None),
        ("zzzz", None),
        ("x" * 100_000, None),
    ],
)
def test_an_unknown_setting_suggests_the_nearest(key: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(find("language-rephrase.tiny").data(), [f"{key}=1"])
    line = str(caught.value)
    assert "unknown setting" in line
    assert len(line) < 250
    assert (f"did you mean {meant}?" in line) == (meant is not None)
    for known in meant.split(" or ") if meant else []:
        assert known in keys_of(Config)


def test_a_setting_of_another_metric_says_so() -> None:
    with pytest.raises(
        ConfigError,
        match=r"metric\.language: unknown setting; another metric than pattern has it",
    ):
        resolve(find("qr-embed.tiny").data(), ['metric.language="es"'])


def test_every_setting_is_known() -> None:
    """The list that near ones are looked for in is the schema's own: each key of the resolved settings, and no other."""

    def flat(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in data.items():
            yield prefix + name
            if isinstance(value, dict) and name != "options":
                yield from flat(value, f"{prefix}{name}.")

    for preset in ("qr-embed.tiny", "l2-shrink.tiny", "language-rephrase.tiny"):
        config = resolve(find(preset).data(), [])
        assert set(flat(config.model_dump())) == set(keys_of(Config, config.metric.name))
