"""Small checkpoints of several architectures, saved with the embedded tokeniser, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dpg_cli.models.loading import LanguageModel, load
from dpg_cli.tiny import MODEL_DIR

CPU = torch.device("cpu")
ROWS = 512  # tokens of the embedded tokeniser
END, PAD = 510, 511
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def llama_config(tied: bool = False, rows: int = ROWS, **more: Any) -> LlamaConfig:
    """Two layers, 16 wide."""
    sizes = {"vocab_size": rows, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2} | more
    return LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied,
        bos_token_id=END, eos_token_id=END,
    )  # fmt: skip


def make(architecture: str, tied: bool = False, rows: int = ROWS) -> PreTrainedModel:
    """A small causal LM with seeded random weights."""
    torch.manual_seed(3)
    ends = {"bos_token_id": END, "eos_token_id": END}
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=rows, n_positions=128, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied, **ends
            )
        )
    if architecture == "neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=rows, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                max_position_embeddings=128, tie_word_embeddings=tied, **ends,
            )
        )  # fmt: skip
    if architecture == "bert":
        return BertLMHeadModel(bert_config(decoder=True, rows=rows, tied=tied))
    return LlamaForCausalLM(llama_config(tied, rows))


def bert_config(decoder: bool, rows: int = ROWS, tied: bool = True) -> BertConfig:
    """One layer, 16 wide; a decoder looks back alone."""
    return BertConfig(
        vocab_size=rows, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, is_decoder=decoder,
        max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip


def add_tokenizer(folder: Path) -> Path:
    """The embedded tokeniser's files."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL_DIR / name).read_bytes())
    return folder


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """A checkpoint with its tokeniser."""
    model.save_pretrained(folder, **options)
    return add_tokenizer(folder)


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The same folder with other tensors."""
    tensors = change(load_file(folder / MODEL))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / MODEL, {"format": "pt"})
    return folder


def reconfigured(folder: Path, file: str = "config.json", **values: Any) -> Path:
    """The same folder with other settings."""
    data = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(data))
    return folder


def cut(file: Path, share: float = 0.6) -> Path:
    """The first part of a file."""
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    return file


def loaded(folder: Path, **options: Any) -> LanguageModel:
    """By the library's own function."""
    return load(str(folder), device=CPU, **options)
