"""Checkpoints of known shapes with random weights and a tokeniser of as many made-up words: what a check needs of a model, and no hub.

python -m benchmarks.gpu_check.checkpoints gpt2 FOLDER        (gpt2, llama-1b, tiny-gpt2, tiny-llama)
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from dpg_cli.planning.shapes import KNOWN

END = "<end>"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
TINY = {"vocabulary": 512, "width": 32, "layers": 2, "heads": 2}


def words(count: int) -> list[str]:
    """So many made-up words, each another: syllables, shortest first."""
    syllables = ["".join(pair) for pair in itertools.product(CONSONANTS, VOWELS)]
    found: list[str] = []
    for length in itertools.count(1):
        for parts in itertools.product(syllables, repeat=length):
            if len(found) == count:
                return found
            found.append("".join(parts))
    return found


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokeniser with exactly so many tokens: a word each, and the end of a text, which also begins it."""
    table = {END: 0} | {word: number for number, word in enumerate(words(vocabulary - 1), 1)}
    made = Tokenizer(WordLevel(table, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, bos_token=END, unk_token=END)


def shape(name: str) -> PreTrainedConfig:
    """The configuration of a shape by its short name."""
    vocabulary, width, layers, heads = TINY.values()
    tiny = {
        "tiny-gpt2": GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=width, n_layer=layers, n_head=heads),
        "tiny-llama": LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        ),
    }  # fmt: skip
    known = {
        "gpt2": "openai-community/gpt2",
        "llama-1b": "meta-llama/Llama-3.2-1B",
        "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    }
    config = tiny[name] if name in tiny else KNOWN[known.get(name, name)]()
    config.bos_token_id = config.eos_token_id = 0
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return config


def save(name: str, folder: Path, seed: int = 0, config: PreTrainedConfig | None = None) -> Path:
    """Write a checkpoint, unless it is there already.

    Args:
        name: of the shape.
        folder: where to.
        seed: of the weights.
        config: of another shape.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    config = config or shape(name)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer_of(config.vocab_size).save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="20GB")
    return folder


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(save(options.shape, options.folder, options.seed))


if __name__ == "__main__":
    main()
