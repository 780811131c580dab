"""`dpg inspect` on model folders that are damaged, partial, or of other formats: figures, or one line; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, MODEL, cut, make, reconfigured, reweighted, saved
from short_run import call

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 2, "target_modules": ["q_proj"]}


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / MODEL).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))


def index(text: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / MODEL).unlink()
        (folder / INDEX).write_text(text)

    return write


GOOD = {
    "as it is": lambda folder: None,
    "a prefix": lambda folder: reweighted(folder, lambda tensors: {f"module.{n}": t for n, t in tensors.items()}),
    "no head": lambda folder: reweighted(folder, lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n}),
    "no layers": lambda folder: reweighted(folder, lambda tensors: {}),
    "one value": lambda folder: reweighted(folder, lambda tensors: {"lm_head.weight": torch.tensor(1.0)}),
    "NaN": lambda folder: reweighted(folder, lambda tensors: {n: t * float("nan") for n, t in tensors.items()}),
    "float8": lambda folder: reweighted(folder, lambda tensors: {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}),
    "whole numbers": lambda folder: reweighted(folder, lambda tensors: {n: t.to(torch.int8) for n, t in tensors.items()}),
    "quantised": lambda folder: reconfigured(folder, quantization_config={"quant_method": "gptq"}),
    "another config": lambda folder: reconfigured(folder, vocab_size="many", architectures=7, tie_word_embeddings=[1]),
    "code": lambda folder: reconfigured(folder, auto_map={"AutoModel": "x.Y"}),
    "an adapter alone": adapter,
    "an adapter beside": lambda folder: (folder / "adapter_config.json").write_text("{"),
}  # fmt: skip
BAD = {
    "cut short": lambda folder: cut(folder / MODEL),
    "empty file": lambda folder: cut(folder / MODEL, 0.0),
    "no weights": lambda folder: (folder / MODEL).unlink(),
    "a pickle": lambda folder: (folder / MODEL).rename(folder / "pytorch_model.bin"),
    "GGUF": lambda folder: (folder / MODEL).rename(folder / "model.gguf"),
    "an index of nothing": index('{"weight_map": {}}'),
    "an index of missing files": index('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
    "an index of other folders": index('{"weight_map": {"a": "../x.safetensors"}}'),
    "an index that is a list": index("[]"),
    "an index that is a number": index('{"weight_map": {"a": 3}}'),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "not UTF-8": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"),
    "a folder for a file": lambda folder: ((folder / MODEL).unlink(), (folder / MODEL).mkdir()),
}


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_inspect_is_never_at_a_loss(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(make("llama"), tmp_path / "model")
    (GOOD | BAD)[name](folder)
    for options in ([], ["--json"], ["--render", tmp_path / "picture.png", "--show", "after"]):
        answer = call(capsys, monkeypatch, "inspect", folder, *options)
        rendered = bool(options) and options[0] == "--render"
        assert answer.code in ((0, 2) if rendered else (0 if name in GOOD else 2,)), answer.err
        assert "Traceback" not in answer.err
        if answer.code == 2:
            last = answer.err.splitlines()[-1]
            assert last.startswith("dpg: ")
            assert str(folder) in last or rendered
        elif "--json" in options:
            json.loads(answer.out)
