"""The theorem's small worlds: a generator whose completions, and whose datasets, can all be enumerated. Float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.metrics.text_loss import TextLossMetric

TOKENS = 3  # of the vocabulary; token 0 begins every sequence


@dataclass(frozen=True)
class Toy:
    """A generator with Y completions, a target, and Φ.

    Attributes:
        target: θ_0.
        metric: Φ, minus the loss on a fixed text.
        rows: the Y completions as examples.
        probability_Y: π of each.
        score_Y_F: ∇ log π of each, flat over the generator's parameters.
    """

    target: GPT2LMHeadModel
    metric: TextLossMetric
    rows: Examples
    probability_Y: Tensor
    score_Y_F: Tensor


def model(seed: int) -> GPT2LMHeadModel:
    """A one-layer GPT-2 with 4 tokens and 8 dimensions in float64, its weights large enough to be nonlinear."""
    torch.manual_seed(seed)
    shape = GPT2Config(
        vocab_size=TOKENS, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    made = GPT2LMHeadModel(shape).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def log_probability(generator: GPT2LMHeadModel, rows: Examples) -> Tensor:
    """log π of each completion, (Y,), with a graph."""
    log_pi = torch.log_softmax(generator(input_ids=rows.ids_N_S).logits[:, :-1], -1)
    return log_pi.gather(-1, rows.ids_N_S[:, 1:, None])[..., 0].sum(1)


def toy(seed: int, length: int = 1) -> Toy:
    """The generator, target and metric of a seed; completions of `length` tokens."""
    generator, target = model(2 * seed), model(2 * seed + 1)
    rows = Examples.from_sequences([[0, *tokens] for tokens in product(range(TOKENS), repeat=length)])
    logs = log_probability(generator, rows)
    scores = [
        torch.cat(
            [part.flatten() for part in torch.autograd.grad(log, list(generator.parameters()), retain_graph=True)]
        )
        for log in logs
    ]
    documents = Examples.from_sequences([[0, 1, 2, 1], [0, 2, 2, 1]])
    return Toy(target, TextLossMetric(target, documents, "a text"), rows, logs.detach().exp(), torch.stack(scores))


def multisets(kinds: int, size: int) -> list[Tensor]:
    """Counts of each kind, (Y,), of every multiset."""
    return [
        torch.bincount(torch.tensor(chosen), minlength=kinds)
        for chosen in combinations_with_replacement(range(kinds), size)
    ]


def log_chance(counts_Y: Tensor, probability_Y: Tensor) -> float:
    """log of the probability that draws give these counts."""
    total = math.lgamma(int(counts_Y.sum()) + 1) - sum(math.lgamma(count + 1) for count in counts_Y.tolist())
    return total + float((counts_Y * probability_Y.log()).sum())


def datasets(world: Toy, n: int, steps: int) -> Iterator[tuple[Tensor, float]]:
    """Counts by batch and kind, (T, Y), of every dataset of n examples in T batches, with its probability."""
    batch = [(counts, log_chance(counts, world.probability_Y)) for counts in multisets(len(world.rows), n // steps)]
    for parts in product(batch, repeat=steps):
        yield torch.stack([counts for counts, _ in parts]), math.exp(sum(chance for _, chance in parts))


def attributed(
    world: Toy, counts_T_Y: Tensor, optimizer: OptimizerSpec, labels: bool = False
) -> tuple[float, Tensor, Tensor | None]:
    """Φ, the τ of one example of each kind in each batch (T, Y), and of each label of a first token (T, V)."""
    steps, kinds = counts_T_Y.shape
    size = int(counts_T_Y[0].sum())
    repeat = torch.arange(kinds).repeat(steps)
    examples = Examples(world.rows.ids_N_S[repeat], world.rows.attention_N_S[repeat], world.rows.label_N_S[repeat])
    scale = kinds / size  # the engine divides by the tokens of Y rows, the dataset has n / T rows a batch
    result = metagradient(
        world.target, examples, optimizer, world.metric, batch_size=kinds,
        weights_N=(counts_T_Y.double() * scale).flatten(), labels=labels,
    )  # fmt: skip
    first = None if result.label_N_S_V is None else result.label_N_S_V.view(steps, kinds, *result.label_N_S_V.shape[1:])
    return result.value, result.example_N.view(steps, kinds) * scale, None if first is None else first[:, 0, 1] * scale
