"""Weights that are not there: whatever is missing, left over, mis-shaped, half-written or quantised is refused in one line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    CPU,
    INDEX,
    MODEL,
    add_tokenizer,
    cut,
    llama_config,
    loaded,
    make,
    reconfigured,
    reweighted,
    saved,
)
from safetensors.torch import load_file, save_file
from short_run import call
from transformers import LlamaForCausalLM

from dpg_cli.errors import UsageError
from dpg_cli.models.folder import ModelError
from dpg_cli.models.loading import load, load_generator, load_target
from dpg_cli.settings.config import ModelsConfig

Tensors = dict[str, torch.Tensor]


def refused(folder: Path, *words: str) -> str:
    """Load a folder in each of its roles; the refusal must be one line that holds these words."""
    name = str(folder)
    models = ModelsConfig(target=name, generator=name)
    said = set()
    for attempt in (
        lambda: load(name, device=CPU),
        lambda: load_target(models, CPU),
        lambda: load_generator(models, CPU),
    ):
        with pytest.raises(ModelError) as caught:
            attempt()
        said.add(str(caught.value))
        assert caught.value.remedy
    assert len(said) == 1
    line = said.pop()
    assert len(line.splitlines()) == 1
    for word in words:
        assert word in line, line
    return line


def obeyed(command: str) -> None:
    """Do what a printed command says, read as a shell reads it; in this process, which has the libraries loaded."""
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    exec(compile(code, "printed", "exec"), {})


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "bert"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_whole_checkpoints_load_as_they_are(architecture: str, tied: bool, size: str, tmp_path: Path) -> None:
    """Tied heads are absent from the files, and that is right; so it is with several files."""
    model = make(architecture, tied)
    folder = saved(model, tmp_path / "model", max_shard_size=size)
    assert (folder / INDEX).is_file() == (size == "20KB")
    found = loaded(folder)
    assert found.silent_ids == ()
    assert (found.head is found.model.get_input_embeddings().weight) == tied
    for (name, value), (again, other) in zip(model.named_parameters(), found.model.named_parameters(), strict=True):
        assert name == again
        assert torch.equal(value, other)


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("_orig_mod.", "model._orig_mod.save_pretrained"),
        ("module.", "model.module.save_pretrained"),
        ("base_model.model.", "merge_and_unload"),
        ("module._orig_mod.", "model._orig_mod.save_pretrained"),
        ("_fsdp_wrapped_module.", "unwrap_model"),
        ("pretrained_model.", "model.pretrained_model.save_pretrained"),
        ("student.", "one save_pretrained"),
    ],
)
def test_a_wrapped_models_names(architecture: str, prefix: str, remedy: str, tmp_path: Path) -> None:
    folder = reweighted(saved(make(architecture), tmp_path / "model"), prefixed(prefix))
    refused(folder, "do not fit", "missing and would be random", remedy)


def test_a_wrapper_within(tmp_path: Path) -> None:
    """Layers compiled one by one, and adapters that were never merged."""
    folder = saved(make("llama"), tmp_path / "layers")
    reweighted(
        folder, lambda tensors: {name.replace("layers.0.", "layers.0._orig_mod."): t for name, t in tensors.items()}
    )
    refused(folder, "torch.compile")
    folder = saved(make("llama"), tmp_path / "lora")
    reweighted(
        folder, lambda tensors: {name.replace("q_proj.", "q_proj.base_layer."): t for name, t in tensors.items()}
    )
    refused(folder, "merge_and_unload")


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("lm_head"), ["lm_head.weight is missing", "without its LM head"]),
        (without("layers.1."), ["9 weights", "are missing and would be random"]),
        (without("norm.weight"), ["5 weights"]),
        (without("embed_tokens"), ["model.embed_tokens.weight is missing"]),
        (lambda tensors: tensors | {"score.weight": torch.zeros(2, 16)}, ["score.weight is not the model's", "python -c"]),
        (lambda tensors: tensors | {"lm_head.weight": torch.zeros(500, 16)}, ["lm_head.weight is 500 x 16", "512 x 16"]),
        (lambda tensors: tensors | {"model.norm.weight": torch.zeros(15)}, ["model.norm.weight is 15 and should be 16"]),
        (lambda tensors: {}, ["21 weights"]),
    ],
)  # fmt: skip
def test_missing_unexpected_and_misshaped_weights(
    change: Callable[[Tensors], Tensors], words: list[str], tmp_path: Path
) -> None:
    """A stock load of each fills the gaps at random, or passes over the rest."""
    refused(reweighted(saved(make("llama"), tmp_path / "model"), change), "do not fit its config.json", *words)


@pytest.mark.parametrize(
    "setting", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"vocab_size": 600}, {"hidden_size": 8}]
)
def test_a_config_of_another_model(setting: dict[str, int], tmp_path: Path) -> None:
    refused(reconfigured(saved(make("llama"), tmp_path / "model"), **setting), "do not fit its config.json")


def test_a_tied_config_over_an_untied_checkpoint_and_the_reverse(tmp_path: Path) -> None:
    """Untied in the config and no head in the files: refused. A head in the files under a tied config is never dropped."""
    folder = reconfigured(saved(make("llama", tied=True), tmp_path / "tied"), tie_word_embeddings=False)
    refused(folder, "lm_head.weight is missing")
    model = make("llama", tied=False)
    folder = reconfigured(saved(model, tmp_path / "untied"), tie_word_embeddings=True)
    try:
        head = loaded(folder).head
    except UsageError as error:
        assert "lm_head.weight" in str(error)
    else:
        assert torch.equal(head, model.lm_head.weight)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.1, 0.5, 0.999])
def test_half_written_files(share: float, tmp_path: Path) -> None:
    one = saved(make("llama"), tmp_path / "one")
    cut(one / MODEL, share)
    refused(one, "not whole", "model.safetensors")
    many = saved(make("llama"), tmp_path / "many", max_shard_size="20KB")
    cut(sorted(many.glob("model-*"))[1], share)
    refused(many, "not whole", "model-00002-of-00003.safetensors", "Copy it again")


def test_shards_that_are_missing_or_mixed(tmp_path: Path) -> None:
    def shards(name: str) -> tuple[Path, list[Path]]:
        folder = saved(make("gpt2"), tmp_path / name, max_shard_size="20KB")
        return folder, sorted(folder.glob("model-*"))

    folder, files = shards("missing")
    files[0].unlink()
    refused(folder, files[0].name, "missing")
    folder, files = shards("index")
    (folder / INDEX).write_text("{")
    refused(folder, "no JSON")
    (folder / INDEX).write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    refused(folder, "no safetensors file beside it")
    (folder / INDEX).write_text('{"metadata": {}}')
    refused(folder, "no proper weight_map")
    folder, files = shards("fewer")
    save_file(without("ln_1")(load_file(files[1])), files[1], {"format": "pt"})
    refused(folder, "is a mix", "says that")
    folder, files = shards("twice")
    name = next(iter(load_file(files[1])))
    save_file(load_file(files[0]) | {name: load_file(files[1])[name] + 1}, files[0], {"format": "pt"})
    refused(folder, "is a mix", name)
    save_file(load_file(files[0]) | {name: load_file(files[1])[name]}, files[0], {"format": "pt"})
    assert loaded(folder).parameter_count > 0  # the same values twice are harmless
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["transformer.h.7.ln_1.weight"] = files[0].name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "transformer.h.7.ln_1.weight")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_quantised_checkpoints(settings: dict[str, object], word: str, tmp_path: Path) -> None:
    folder = reconfigured(saved(make("llama"), tmp_path / "model"), quantization_config=settings)
    refused(folder, "quantised", word, "Name the model that it was made from", ".dequantize()")


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_rounded_weights_without_a_word_of_it(kind: torch.dtype, tmp_path: Path) -> None:
    """A stock load takes whole numbers for weights."""
    folder = reweighted(
        saved(make("llama"), tmp_path / "model"),
        lambda tensors: {name: (50 * t).to(kind) if t.ndim == 2 else t for name, t in tensors.items()},
    )
    refused(folder, "quantised", "config.json does not say how")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_floating_type_becomes_the_asked_one(kind: torch.dtype, dtype: str, tmp_path: Path) -> None:
    """Masters in models.dtype, value for value; what is computed from the configuration (rotary tables) is no coarser."""
    model = make("llama").to(kind)
    found = loaded(saved(model, tmp_path / "model"), dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {parameter.dtype for parameter in found.model.parameters()} == {wanted}
    assert torch.equal(found.head, model.lm_head.weight.to(wanted))
    exact = loaded(saved(make("llama"), tmp_path / "exact"), dtype=dtype)
    for (name, buffer), (_, other) in zip(found.model.named_buffers(), exact.model.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert next(found.model.parameters()).requires_grad


def test_blank_models_do_not_depend_on_the_stored_type(tmp_path: Path) -> None:
    """Drawn in float32, also where config.json says bfloat16, and also for a float64 copy."""
    half = saved(make("llama").to(torch.bfloat16), tmp_path / "half")
    full = saved(make("llama"), tmp_path / "full")
    first, second = (loaded(folder, init="random", seed=1).head for folder in (half, full))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    assert torch.equal(loaded(full, init="random", seed=1, dtype="float64").head, first.double())
    (full / MODEL).unlink()
    assert torch.equal(loaded(full, init="random", seed=1).head, first)


def test_a_pickle_is_named_with_a_command_that_converts_it(tmp_path: Path) -> None:
    """The command is run as it was printed."""
    model = make("llama")
    folder = saved(model, tmp_path / "a model")
    (folder / MODEL).unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    line = refused(folder, "as a pickle (pytorch_model.bin)", "not opened")
    obeyed(line[line.index("python -c ") :])
    assert torch.equal(loaded(folder).head, model.lm_head.weight)


def test_left_over_weights_are_dropped_by_the_printed_command(tmp_path: Path) -> None:
    folder = saved(make("gpt2"), tmp_path / "it's")
    reweighted(folder, lambda tensors: tensors | {"v_head.summary.weight": torch.zeros(1, 16)})
    line = refused(folder, "v_head.summary.weight is not the model's")
    obeyed(line[line.index("python -c ") :])
    assert loaded(add_tokenizer(tmp_path / "it's-plain")).parameter_count > 0


def test_other_formats(tmp_path: Path) -> None:
    folder = add_tokenizer(tmp_path / "gguf")
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    line = refused(folder, "no config.json", "gguf_file=", "python -c ")
    compile(line[line.index("python -c '") + 11 :].rstrip(".'"), "printed", "exec")
    llama_config().save_pretrained(folder)
    refused(folder, "GGUF (model-q4.gguf)")
    refused(folder / "model-q4.gguf", "is a file", "gguf_file=")
    (folder / "model-q4.gguf").unlink()
    refused(folder, "no weights")
    refused(folder / "config.json", "is a file")


@pytest.mark.parametrize(
    "text", ["{oops", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}', '{"eos_token_id": true}', "\x00"]
)
def test_generation_settings_that_do_not_parse(text: str, tmp_path: Path) -> None:
    """transformers passes over some of them, and completions would end elsewhere."""
    folder = saved(make("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text(text)
    refused(folder, "generation_config.json")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ("{}", "model_type"),
        ('{"model_type": 3}', "model_type"),
        ('{"model_type": "frobnicate"}', "does not know"),
        ('{"model_type": "frobnicate", "auto_map": {"AutoConfig": "a.B"}}', "never runs"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "cannot be loaded"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot be loaded"),
    ],
)
def test_configurations_that_cannot_be(text: str, word: str, tmp_path: Path) -> None:
    folder = saved(make("llama"), tmp_path / "model")
    (folder / "config.json").write_text(text)
    refused(folder, word)


def test_what_was_named_instead(tmp_path: Path) -> None:
    """A run, a trainer's folder of checkpoints, a folder that is not there."""
    inner = saved(make("gpt2"), tmp_path / "trainer" / "checkpoint-500")
    refused(tmp_path / "trainer", f"name {inner}")
    saved(make("gpt2"), tmp_path / "run" / "target")
    (tmp_path / "run" / "config.toml").write_text("")
    refused(tmp_path / "run", f"name {tmp_path / 'run' / 'target'}")
    refused(tmp_path / "nothing", "There is no such folder")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    folder = saved(make("llama"), tmp_path / "model")
    reweighted(folder, lambda tensors: tensors | {"model.norm.weight": torch.full((16,), float("nan"))})
    refused(folder, "not finite")


@pytest.mark.parametrize("damage", ["prefix", "shard", "quantised", "pickle", "config"])
def test_the_command_line_says_it_in_one_line(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run, dry run, attribute: exit code 2. Inspect reads files alone, and is never at a loss."""
    folder = saved(make("llama"), tmp_path / "model", max_shard_size="20KB" if damage == "shard" else "50GB")
    if damage == "prefix":
        reweighted(folder, prefixed("module."))
    elif damage == "shard":
        cut(sorted(folder.glob("model-*"))[0])
    elif damage == "quantised":
        reconfigured(folder, quantization_config={"quant_method": "gptq"})
    elif damage == "pickle":
        (folder / MODEL).rename(folder / "pytorch_model.bin")
    else:
        (folder / "config.json").write_text("{")
    (tmp_path / "data.txt").write_text("one text\nanother text\n")
    for command in (
        ["run", "l2-shrink", "--target", folder, "--out", tmp_path / "run"],
        ["run", "l2-shrink", "--generator", folder, "--dry-run"],
        ["check", "l2-shrink", "--target", folder],
        ["attribute", tmp_path / "data.txt", "--target", folder, "--language", "es", "--out", tmp_path / "s.parquet"],
    ):
        answer = call(capsys, monkeypatch, *command)
        assert answer.code == 2
        last = answer.err.splitlines()[-1]
        assert last.startswith("dpg: ")
        assert str(folder) in last
        assert "Traceback" not in answer.err
    assert not (tmp_path / "run").exists()
    answer = call(capsys, monkeypatch, "inspect", folder)
    assert answer.code == (0 if damage in ("prefix", "quantised") else 2)
    assert "Traceback" not in answer.err


def test_a_hub_model_is_looked_at_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub library's cache, without a network: whole it loads; with a prefix it is refused, by its name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, revision = make("llama"), "0" * 40
    for name in ("good", "bad"):
        place = tmp_path / "hub" / f"models--someone--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(revision)
        (place / "snapshots").mkdir()
        saved(model, place / "snapshots" / revision)
    reweighted(tmp_path / "hub/models--someone--bad/snapshots" / revision, prefixed("module."))
    assert torch.equal(load("someone/good", device=CPU).head, model.lm_head.weight)
    with pytest.raises(ModelError, match=r"weights of someone/bad do not fit.*model\.module\.save_pretrained"):
        load("someone/bad", device=CPU)
    with pytest.raises(ModelError, match="hub cannot be reached"):
        load("someone/else", device=CPU)


def test_a_prefix_is_not_random_each_time(tmp_path: Path) -> None:
    """What a stock load does with such a folder: other weights at each load. This is what the refusals are for."""
    folder = reweighted(saved(make("llama"), tmp_path / "model"), prefixed("module."))
    heads = [LlamaForCausalLM.from_pretrained(folder).lm_head.weight for _ in range(2)]
    assert not torch.equal(*heads)
