"""Tiny configurations: what almost every architecture has, shrunk; a row of the table says the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

VOCAB, PAD = 29, 2  # the padding token is the end of sequence

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD, "eos_token_id": PAD, "bos_token_id": 1, "decoder_start_token_id": 1, "sep_token_id": PAD,
    "max_position_embeddings": 32, "n_positions": 32, "max_seq_len": 32, "n_ctx": 32, "context_length": 32,
    "max_target_positions": 32, "original_max_position_embeddings": 32,
    "hidden_size": 16, "d_model": 16, "n_embd": 16, "dim_model": 16, "emb_dim": 16, "embedding_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 1,
    "num_decoder_layers": 2, "num_encoder_layers": 1,
    "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_attention_heads": 2, "num_decoder_attention_heads": 2,
    "num_encoder_attention_heads": 2, "num_key_value_heads": 1, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1,
    "head_dim": 8, "swa_head_dim": 8, "attention_head_size": 8, "kv_channels": 8, "dim_head": 8, "global_head_dim": 8,
    "intermediate_size": 24, "ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_ffn_dim": 24, "dff": 24, "dim_ff": 24,
    "n_inner": 24, "d_inner": 24, "intermediate_size_mlp": 24, "ffn_hidden_size": 24, "feed_forward_size": 24,
    "moe_intermediate_size": 12, "expert_ffn_hidden_size": 12, "shared_expert_intermediate_size": 12,
    "shared_intermediate_size": 12, "shared_experts_intermediate_size": 12, "dense_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 12, "router_hidden_size": 8,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "zero_expert_num": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "o_lora_rank": 8, "o_groups": 2,
    "sliding_window": 4, "sliding_window_size": 4, "attention_window_size": 4, "local_attention": 4, "window_size": 4,
    "attention_chunk_size": 4,
    "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 4,
    "mamba_n_groups": 1, "mamba_ngroups": 1, "mamba_d_ssm": 32, "mamba_num_heads": 4, "mamba_head_dim": 8,
    "mamba_headdim": 8, "mamba_dt_rank": 2, "time_step_rank": 2, "ssm_state_size": 4, "n_mamba_heads": 2,
    "state_size": 4, "conv_kernel": 2, "chunk_size": 4, "n_groups": 1, "linear_conv_kernel_dim": 2,
    "short_conv_kernel_size": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_head_dim": 4, "linear_num_heads": 2, "lru_width": 16, "attention_hidden_size": 16,
    "rotary_dim": 4, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 4, "block_size": 4,
    "d_rel": 4, "rel_extent": 8, "conv_kernel_size": 2, "laurel_rank": 4, "query_pre_attn_scalar": 8,
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0, "num_kv_shared_layers": 0, "adapter_rank": 4,
}  # fmt: skip


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a model type with `SMALL` where it has such a field, and `overrides`."""
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)}
    small = {key: value for key, value in SMALL.items() if key in known}
    if "kv_lora_rank" in known:  # multi-head latent attention: keys for every head, of which this part alone is rotated
        small |= {"head_dim": 4, "num_key_value_heads": 2}
        small = {key: value for key, value in small.items() if key in known}
    return kind(**(small | overrides))


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """A causal LM with weights large enough that every nonlinearity is felt, float64, eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
