"""The architectures: what each is tried with beyond `tiny.SMALL`, and what is special about it.

`dense` has one kind of block after another, `experts` mixtures, `recurrent` states in place of (some) attention, `older`
the decoders of BERT's and BART's descendants. A row that names a refusal is there because it can't be right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        model_type: of its configuration.
        special: what it has that others have not.
        options: of the tiny configuration.
        tied: whether its head is tried tied, and untied.
        notes: part of what the engine must say that it chose; empty for nothing.
        refused: part of the refusal, where the architecture is refused.
    """

    model_type: str
    special: str
    options: dict[str, Any] = field(default_factory=dict)
    tied: tuple[bool, ...] = (True, False)
    notes: str = ""
    refused: str = ""


BOTH = (True, False)
UNTIED = (False,)
EAGER = "Experts ran as 'eager'"
DOUBLE = "double backward"
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DECODER = {"is_decoder": True}

DENSE = [
    Row("gpt2", "learned positions, Conv1D maps, layer norm with bias"),
    Row("openai-gpt", "norms after the blocks, no norm at the end"),
    Row("gpt_neo", "local and global attention in turn", {"attention_types": [[["global", "local"], 1]]}),
    Row("gpt_neox", "parallel attention and MLP, partly rotated heads"),
    Row("gpt_neox_japanese", "a bias in the last attention alone, its own activation"),
    Row("gptj", "interleaved rotation, parallel blocks, a head with bias"),
    Row("codegen", "rotation as in GPT-J, queries, keys and values cut for four devices", {"n_head": 4}),
    Row("gpt_bigcode", "multi-query attention"),
    Row("ctrl", "fixed sinusoids, scaled embeddings, a head with bias"),
    Row("xlm", "reads padding off the ids unless it is given a mask", {"causal": True}),
    Row("bloom", "an autograd function as activation, ALiBi, a norm on the embedding", notes=DOUBLE),
    Row("mpt", "ALiBi, low-precision layer norm without bias"),
    Row("falcon", "multi-query attention, parallel blocks"),
    Row("opt", "positions counted by the mask, an offset of 2, ReLU"),
    Row("xglm", "fixed sinusoids with a padding row, scaled embeddings"),
    Row("biogpt", "scaled embeddings, positions counted by the mask"),
    Row("llama", "RMS norms, rotation, gated MLP, grouped keys"),
    Row("mistral", "a sliding window"),
    Row("ministral", "sliding windows by layer", SLIDING),
    Row("ministral3", "attention scaled by position"),
    Row("qwen2", "biases on queries, keys and values"),
    Row("qwen3", "norms on queries and keys"),
    Row("gemma", "RMS norm of 1 + w, embeddings times √width"),
    Row("gemma2", "capped logits and scores, norms before and after, a window in turn"),
    Row("gemma3_text", "two rotations, norms on queries and keys", SLIDING),
    Row("gemma3n_text", "AltUp streams, Laurel, embeddings for each layer, sparse activations", SLIDING),
    Row("gemma4_text", "embeddings for each layer, keys that are values, two head sizes"),
    Row("gemma4_unified_text", "as Gemma 4 of one tower"),
    Row("vaultgemma", "Gemma 2 without the norms after"),
    Row("phi", "parallel blocks, partly rotated heads, a head with bias"),
    Row("phi3", "one map for queries, keys and values, one for gate and up"),
    Row("stablelm", "partly rotated heads, layer norms"),
    Row("starcoder2", "layer norms, biases everywhere"),
    Row("persimmon", "layer norms on queries and keys, squared ReLU"),
    Row("nemotron", "layer norm of 1 + w, squared ReLU"),
    Row("olmo", "layer norms without weights"),
    Row("olmo2", "norms after the blocks alone, norms on queries and keys"),
    Row("olmo3", "as OLMo 2, with sliding windows", SLIDING),
    Row("cohere", "parallel blocks, scaled logits, layer norm without bias"),
    Row("cohere2", "as Cohere, with windows and layers without positions", SLIDING),
    Row("glm", "interleaved and partly rotated heads"),
    Row("glm4", "norms before and after, interleaved rotation"),
    Row("granite", "scaled embeddings, residuals, attention and logits"),
    Row("granite_swa", "attention sinks through log-sum-exp, windows in turn"),
    Row("helium", "interleaved rotation"),
    Row("smollm3", "layers without rotation", {"no_rope_layers": [1, 0]}),
    Row("exaone4", "norms after the blocks, windows, layers without positions", SLIDING),
    Row("seed_oss", "biases and a head size of its own"),
    Row("arcee", "squared ReLU"),
    Row("apertus", "xIELU, an activation with trained parameters"),
    Row("nanochat", "norms without weights, capped logits, squared ReLU"),
    Row("bitnet", "norms within the blocks, squared ReLU"),
    Row("diffllama", "the difference of two attentions", {"num_key_value_heads": 2}),
    Row("doge", "attention masks that are learned"),
    Row("hunyuan_v1_dense", "norms on queries and keys after the rotation"),
    Row("jais2", "layer norms, squared ReLU, biases everywhere"),
    Row("hyperclovax", "scaled residuals and logits"),
    Row("minicpm3", "multi-head latent attention, scaled depth"),
    Row("youtu", "multi-head latent attention without experts"),
    Row("cwm", "windows in turn, scaled rotation"),
    Row("modernbert-decoder", "one map for queries, keys and values, a dense head before the head"),
    Row("hrm_text", "two stacks in loops, all but the last without gradient"),
    Row("internlm3", "Llama by another name"),
]

EXPERTS = [
    Row("mixtral", "experts chosen by a softmax", notes=EAGER),
    Row("qwen2_moe", "a shared expert behind a gate", notes=EAGER),
    Row("qwen3_moe", "norms on queries and keys", notes=EAGER),
    Row("olmoe", "norms on queries and keys, no normalised weights", notes=EAGER),
    Row("flex_olmo", "OLMo 2 with experts", notes=EAGER),
    Row("gpt_oss", "attention sinks, experts with biases and clipped gates", notes=EAGER),
    Row("deepseek_v2", "multi-head latent attention, experts in groups", notes=EAGER),
    Row("deepseek_v3", "a router of sigmoids, corrected by a buffer, without gradient", notes=EAGER),
    Row("deepseek_v32", "an indexer that chooses what attention sees", notes=EAGER),
    Row("deepseek_v4", "hyper-connections, compressed attention, experts by hash", notes=EAGER),
    Row("dots1", "a router of sigmoids, norms on queries and keys", notes=EAGER),
    Row("glm4_moe", "experts in groups, partly rotated heads", notes=EAGER),
    Row("glm4_moe_lite", "GLM 4 with latent attention", notes=EAGER),
    Row("glm_moe_dsa", "latent attention with an indexer", notes=EAGER),
    Row("granitemoe", "one matrix for all experts, scaled residuals", notes=EAGER),
    Row("granitemoeshared", "a shared expert beside", notes=EAGER),
    Row("granitemoe_swa", "attention sinks, windows in turn", notes=EAGER),
    Row("phimoe", "a sparse mixer as router, layer norms", notes=EAGER),
    Row("jetmoe", "experts of attention"),
    Row("ernie4_5_moe", "a router corrected by a buffer, interleaved rotation", notes=EAGER),
    Row("hunyuan_v1_moe", "a shared expert without a gate", notes=EAGER),
    Row("llama4_text", "chunked attention, sigmoid weights on the input", {"no_rope_layers": [1, 0]}),
    Row("longcat_flash", "experts that do nothing, two attentions a layer"),
    Row("minimax_m2", "norms over all heads at once", notes=EAGER),
    Row("mimo_v2_flash", "windows and sinks, two head sizes", notes=EAGER),
    Row("afmoe", "gated attention, windows", SLIDING, notes=EAGER),
    Row("aria_text", "shared experts in one MLP", notes=EAGER),
    Row("exaone_moe", "windows, a router of sigmoids", notes=EAGER),
    Row("cohere2_moe", "parallel blocks of experts", SLIDING, notes=EAGER),
    Row("laguna", "a gate on each head", notes=EAGER),
    Row("solar_open", "a router of sigmoids in groups", notes=EAGER),
    Row("mellum", "experts in every layer", notes=EAGER),
]

RECURRENT = [
    Row("mamba", "a selective scan"),
    Row("mamba2", "a scan in chunks", {"num_heads": 4}),
    Row("falcon_mamba", "norms within the scan"),
    Row("rwkv", "a weighted mean of the past"),
    Row("xlstm", "matrix memories with exponential gates", tied=UNTIED),
    Row("recurrent_gemma", "a gated linear recurrence with a bounded root", {"num_hidden_layers": 3}, notes=DOUBLE),
    Row("jamba", "scans, attention and experts", {"attn_layer_period": 2, "attn_layer_offset": 1}, notes=EAGER),
    Row("bamba", "scans and attention", {"attn_layer_indices": [1]}),
    Row("falcon_h1", "scans beside attention in each layer, scaled everywhere"),
    Row("granitemoehybrid", "scans, attention, experts", {"layer_types": ["mamba", "attention"]}, notes=EAGER),
    Row("nemotron_h", "scans, experts, attention and MLPs, a layer each", tied=UNTIED, notes=EAGER),
    Row(
        "zamba",
        "one attention shared by layers",
        {
            "num_hidden_layers": 3,
            "attention_hidden_size": 32,
            "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        },
    ),
    Row("zamba2", "a shared block with adapters", {"layers_block_type": ["linear_attention", "hybrid"]}),
    Row("qwen3_next", "gated delta rule, gated attention, experts", LINEAR, notes=EAGER),
    Row("qwen3_5_text", "gated delta rule, gated attention", LINEAR),
    Row("olmo_hybrid", "delta rule and attention", LINEAR),
    Row("kimi_linear", "delta rule with a decay for each channel", tied=UNTIED, notes=EAGER),
    Row("minimax", "lightning attention, norms of its own", notes=EAGER),
    Row("lfm2", "short convolutions and attention", {"layer_types": ["conv", "full_attention"]}),
    Row("lfm2_moe", "short convolutions, experts", {"layer_types": ["conv", "full_attention"]}, notes=EAGER),
]

OLDER = [
    Row("bart", "a decoder with unused cross-attention, learned positions"),
    Row("mbart", "norms before the blocks, scaled embeddings"),
    Row("marian", "fixed sinusoids"),
    Row("pegasus", "fixed sinusoids, norms before the blocks"),
    Row("bigbird_pegasus", "a decoder of BigBird", tied=UNTIED),
    Row("blenderbot", "norms before the blocks"),
    Row("blenderbot-small", "a norm on the embedding"),
    Row("plbart", "scaled embeddings"),
    Row("mvp", "no prompts"),
    Row("prophetnet", "relative buckets of n-grams, taken from other places", refused="no causal language model"),
    Row("trocr", "the decoder of a reader"),
    Row("whisper", "the decoder of a listener"),
    Row("bert", "bidirectional", refused="no causal language model"),
    Row("bert", "made a decoder: token types, a dense head with bias", DECODER),
    Row("bert-generation", "no token types", DECODER),
    Row("electra", "a small embedding, projected", DECODER),
    Row("ernie", "task types", DECODER),
    Row("megatron-bert", "norms before the blocks", DECODER),
    Row("roberta", "positions counted by the ids that are not padding", DECODER),
    Row("roberta-prelayernorm", "norms before the blocks", DECODER),
    Row("camembert", "RoBERTa by another name", DECODER),
    Row("data2vec-text", "RoBERTa without its pooling", DECODER),
    Row("xlm-roberta", "RoBERTa in many languages", DECODER),
    Row("xlm-roberta-xl", "norms before the blocks", DECODER),
    Row("xmod", "an adapter for each language", {**DECODER, "default_language": "en_XX"}),
    Row("roformer", "rotation by fixed sinusoids", DECODER),
    Row(
        "rembert", "embeddings apart from the head", {**DECODER, "input_embedding_size": 16, "output_embedding_size": 16},
        tied=UNTIED,
    ),
    Row("big_bird", "full attention", {**DECODER, "attention_type": "original_full"}),
    Row("xlnet", "permuted, bidirectional", refused="no causal language model"),
    Row("cpmant", "a prompt that sees everything", tied=UNTIED, refused="no causal language model"),
]  # fmt: skip

FAMILIES = {"dense": DENSE, "experts": EXPERTS, "recurrent": RECURRENT, "older": OLDER}
