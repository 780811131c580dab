"""Sizes of models from their configurations alone: no weight is read, made or fetched.

A folder's config.json, or that of a hub model that was fetched before, says everything. The models that presets name are in a
table besides, so that a plan needs no network: the figures are those of their published config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from dpg_cli.errors import UsageError
from dpg_cli.models.folder import examine, find
from dpg_cli.models.hub import first_line
from dpg_cli.models.loading import location, quiet_transformers, untie_head
from dpg_cli.models.lora import Lora, adapt
from dpg_cli.models.strict import causal_config
from dpg_cli.planning.job import Size, looked_up


def _gpt2(width: int, layers: int, heads: int) -> PreTrainedConfig:
    return GPT2Config(vocab_size=50_257, n_positions=1024, n_embd=width, n_layer=layers, n_head=heads)


def _llama(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip


KNOWN = {
    "openai-community/gpt2": lambda: _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": lambda: _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": lambda: _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": lambda: _gpt2(1600, 48, 25),
    "meta-llama/Llama-3.2-1B": lambda: _llama(128_256, 2048, 8192, 16, 32, 8),
    "HuggingFaceTB/SmolLM2-135M": lambda: _llama(49_152, 576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M": lambda: _llama(49_152, 960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B": lambda: _llama(49_152, 2048, 8192, 24, 32, 32),
}


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model that settings name.

    Raises:
        UsageError: if it is neither in the table, nor a folder, nor a hub model whose configuration is at hand or can be fetched.
    """
    base = name.removesuffix("-Instruct")
    if base in KNOWN and not Path(name).exists():
        return KNOWN[base]()
    place, path = location(name), Path(name).expanduser()
    if place != name or name.startswith((".", "/", "~")) or path.exists():
        return causal_config(examine(name, find(name, None if place == name else place), weights=False))
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of the hub library
        raise UsageError(
            f"The shape of {name!r} is not known: its config.json is not on this machine and cannot be fetched ({first_line(error)[:80]}).",
            f"Name a folder, or one of {', '.join(KNOWN)}.",
        ) from error


def size_of(name: str, *, untied: bool = False, lora: Lora | None = None) -> Size:
    """The size of a model, made without storage.

    Args:
        name: a folder, an embedded model or a hub name.
        untied: the head has weights of its own.
        lora: adapters beside it.

    Raises:
        UsageError: see `config_of`; and for adapters on modules that are not there.
    """
    with quiet_transformers():
        config = config_of(name)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
            model.tie_weights()
            if untied:
                untie_head(model)
            whole, tables = sum(parameter.numel() for parameter in model.parameters()), looked_up(model)
            if lora is not None:
                model = adapt(model, lora, 0, "model")
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad) if lora is not None else 0
    text = config.get_text_config()
    head = model.get_output_embeddings()
    heads = getattr(text, "num_attention_heads", 12)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = head.weight.shape[1]
    layers = getattr(text, "num_hidden_layers", 12)
    return Size(
        whole + adapters, layers, width, heads, head.weight.shape[0], width // heads * kv_heads, adapters, tables
    )
