"""The two untrained models of prose: a GPT-2 as generator and target, a Llama of another width as independent reader."""

from __future__ import annotations

import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

POSITIONS = 128
NEW_TOKENS = 32  # of a completion, where nothing else is asked for


def gpt2(tokenizer: PreTrainedTokenizerFast, seed: int, width: int = 96) -> PreTrainedModel:
    """GPT-2 of two layers, head and embeddings tied, no dropout, float32.

    Args:
        tokenizer: gives the vocabulary and the special ids.
        seed: of the weights.
        width: of the hidden states; heads are 24 wide.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=2,
        n_head=width // 24,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
        **_specials(tokenizer),
    )
    return _sampled(GPT2LMHeadModel(config))


def llama(tokenizer: PreTrainedTokenizerFast, seed: int, width: int = 128) -> PreTrainedModel:
    """Llama of two layers, head and embeddings tied, no dropout, float32.

    Args:
        tokenizer: gives the vocabulary and the special ids.
        seed: of the weights.
        width: of the hidden states; heads are 32 wide.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        **_specials(tokenizer),
    )
    return _sampled(LlamaForCausalLM(config))


def _specials(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids of the special tokens, as a configuration names them."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _sampled(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, set to sample completions of `NEW_TOKENS`."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        max_new_tokens=NEW_TOKENS,
    )
    return model
