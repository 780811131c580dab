"""The settings of the policy step on the generator, by our own loop or by TRL. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpg_cli.settings.metric_options import Count, Decay, NonNegative, Positive, PositiveInt, Section


class PolicyConfig(Section):
    """The policy-gradient step on the generator. `lr` to `decay` but `kl` are AdamW's; `kl_budget` to `fisher_tokens` those of
    natural steps."""

    step: Literal["adamw", "natural"] = Field(
        "adamw", description="natural: (F + λ)⁻¹∇Φ, F the Fisher information of the generator's tokens"
    )
    parameters: Literal["all", "head", "lora"] = Field(
        "all",
        description="head: the LM head alone moves (untied, and saved so), by natural steps without a backward pass; lora: adapters "
        "(PEFT, extra `peft`), merged into the saved generator; the KL's reference is then the base, without a second copy",
    )
    lora_rank: PositiveInt = Field(8, description="lora: r")
    lora_alpha: Positive = Field(16.0, description="lora: α, the adapters' change is scaled by α / r")
    lora_modules: tuple[str, ...] = Field(
        ("all-linear",),
        description="lora: linear maps that get adapters, by name or its end; `all-linear`: all but the LM head",
        strict=False,
        min_length=1,
    )
    kl_budget: Positive = Field(
        0.1, description="natural: most KL(generator || starting generator), in nats a token; kept to"
    )
    trust: Positive = Field(
        1e-3,
        description="natural: KL of the first step, in nats a token; halved when Φ falls, a tenth larger when it does not",
    )
    damping: NonNegative = Field(1e-2, description="natural: λ, as a share of a Kronecker product that stands near F")
    cg_iterations: PositiveInt = Field(10, description="natural: most products with F a step")
    fisher_tokens: Count = Field(
        0,
        description="natural: tokens a step that the gradient, F and the KL are taken of; the others only act on Φ. 0: as many "
        "as have 2^25 probabilities, 32,768 for a vocabulary of 1,024; beyond the head at most 8,192",
    )
    lr: Positive = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    optimizer_states: Literal["float32", "8bit"] = Field(
        "float32", description="adamw: what its moments are kept as; 8bit: a byte each, by bitsandbytes (extra `8bit`)"
    )
    max_grad_norm: NonNegative = Field(1.0, description="0 turns clipping off")
    clip: Positive = Field(0.2, description="ratio clipping range of PPO/GRPO")
    epochs: PositiveInt = 1
    minibatch: PositiveInt = Field(256, description="completions a policy-optimiser step")
    micro_batch: Count = Field(
        0, description="completions of a mini-batch in memory at once; 0: all; changes nothing but memory"
    )
    micro_batch_tokens: Count = Field(
        0,
        description="adamw: tokens in memory at once, padding included, of completions sorted by length; 0: no such limit; changes "
        "nothing but memory",
    )
    share_prompts: bool = Field(
        True,
        description="completions of a group are read in one row with their prompt, where the model can and it is cheaper; "
        "mini-batches are then of whole groups",
    )
    gradient_checkpointing: bool = Field(
        False, description="of the generator: less memory, about a third more time; by TRL too"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="adamw: bf16 computes the generator's passes so, rollouts included; its weights and their moments stay float32",
    )
    kl: NonNegative = Field(
        0.0,
        description="coefficient of KL(generator || starting generator); of natural steps in units of Φ per nat a token",
    )
    kl_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the steps over which kl falls to 0"
    )
    warmup: Annotated[int, Field(ge=0, le=2**31)] = Field(0, description="outer steps of linear learning-rate warm-up")
    decay: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="share of the steps over which lr falls to 0")


class TrlConfig(Section):
    """What only `trainer = "trl"` reads."""

    vllm: Literal["off", "colocate", "server"] = Field(
        "off", description="rollouts by vLLM through TRL: on the GPUs that train, or on a server; extra `vllm`"
    )
    gradient_checkpointing: bool = Field(False, description="the same as policy.gradient_checkpointing, its older name")
