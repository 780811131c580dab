"""README.md is true to the code: its Python runs as it stands, its thresholds are the constants, its commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpg_cli.evidence import text, verify

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_library_snippet_runs_and_does_what_it_says() -> None:
    (snippet,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    result, examples, metric, target = (names[name] for name in ("result", "examples", "LowLoss", "target"))
    english, spanish, other = result.example_N.tolist()
    assert spanish > 0 > max(english, other)
    torch.testing.assert_close(result.token_N_S.sum(1), result.example_N)
    assert result.token_N_S.shape == examples.ids_N_S.shape
    # What counting the Spanish text more does to Φ, by stock PyTorch alone.
    phi = []
    for weight in (1.0, 1.01):
        model = type(target).from_pretrained(names["MODEL_DIR"])
        loss = torch.nn.functional.cross_entropy(
            model(examples.ids_N_S, attention_mask=examples.attention_N_S).logits[:, :-1].flatten(0, 1),
            examples.ids_N_S[:, 1:].flatten(),
            reduction="none",
        ).view(3, -1)
        valid = examples.label_N_S[:, 1:]
        per_example = (loss * valid).sum(1) * torch.tensor([1.0, weight, 1.0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-3, weight_decay=0.0)
        (per_example.sum() / valid.sum()).backward()
        optimizer.step()
        phi.append(metric()(dict(model.named_parameters()), model).item())
    assert result.value == pytest.approx(phi[0], rel=1e-5)
    assert (phi[1] - phi[0]) / 0.01 == pytest.approx(spanish, rel=0.05)  # float32, and a step of a hundredth


def test_thresholds_are_those_of_the_code() -> None:
    rows = {line.split("|")[1].strip(): line for line in README.splitlines() if line.startswith("| ")}
    assert f"accuracy of {verify.BITMAP_ACCURACY} or more" in rows["bitmap"]
    for share in (text.ASKED, text.FLUENT, text.CONTROL):
        assert f"{100 * share:.0f} %" in rows["language"]
    for share in (text.EXACT, text.CONTROL):
        assert f"{100 * share:.0f} %" in rows["UUID"]
    assert f" {text.COMPLETIONS} completions" in rows["language"]
    assert f" {text.COMPLETIONS} completions" in rows["UUID"]


def test_every_option_in_the_commands_exists() -> None:
    """Each `dpg` line of the page is asked for its help: unknown commands and options fail there."""
    lines = [line.partition("#")[0] for block in blocks("") for line in block.splitlines() if line.startswith("dpg ")]
    assert len(lines) >= 20
    helps: dict[tuple[str, ...], str] = {}
    for line in lines:
        words = shlex.split(line)[1:]
        nested = words[0] in ("export", "presets", "metrics")
        command = tuple(words[: 2 if nested else 1])
        if command not in helps:
            answer = subprocess.run(
                [sys.executable, "-m", "dpg_cli", *command, "--help"],
                capture_output=True,
                text=True,
                env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
            )
            assert answer.returncode == 0, (line, answer.stderr)
            helps[command] = answer.stdout
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", helps[command]), line
