"""Sampling and the policy step, on the embedded model."""

from __future__ import annotations

import pytest
import torch

from dpg_cli.engine import Recipe
from dpg_cli.engine.generator.align import target_examples
from dpg_cli.engine.generator.credit import assign
from dpg_cli.engine.generator.policy import PolicySpec, completion_logits, policy_step
from dpg_cli.engine.generator.rollout import Sampling, encode_prompts, sample
from dpg_cli.engine.loop import LoopSpec
from dpg_cli.engine.records import Credit, Rollout
from dpg_cli.models.loading import LanguageModel, load
from dpg_cli.tiny import world

CPU = torch.device("cpu")


@pytest.fixture
def generator() -> LanguageModel:
    return load("tiny", device=CPU)


def draw(generator: LanguageModel, prompts: list[str], seed: int = 0, **options: float) -> Rollout:
    settings = {"group_size": 3, "max_tokens": 20, "min_tokens": 1, "temperature": 1.0, "batch_size": 1024, **options}
    sampling = Sampling(eos_id=generator.eos_id, pad_id=generator.pad_id, **settings)  # type: ignore[arg-type]
    return sample(generator.model, generator.tokenizer, prompts, sampling, torch.Generator().manual_seed(seed))


def test_recorded_logprobs_are_those_of_one_full_pass(generator: LanguageModel) -> None:
    prompts = [*world.prompts("eval", 5, seed=1), "", "x"]  # ragged: left-padding and positions must not show
    for temperature in (1.0, 1.7):
        rollout = draw(generator, prompts, temperature=temperature)
        assert len(rollout) == 21
        logits = completion_logits(generator.model, rollout).detach() / temperature
        full = torch.log_softmax(logits, -1).gather(-1, rollout.ids_N_K[..., None])[..., 0] * rollout.mask_N_K
        assert float((full - rollout.logprobs_N_K).abs().max()) < 1e-4
        assert float(rollout.logprobs_N_K.min()) < -0.5


def test_rows_end_at_their_end_of_sequence_token(generator: LanguageModel) -> None:
    rollout = draw(generator, world.prompts("eval", 40, seed=2), max_tokens=40)
    eos = (rollout.ids_N_K == generator.eos_id) & rollout.mask_N_K
    lengths = rollout.mask_N_K.sum(1)
    assert bool((eos.sum(1) <= 1).all())
    assert int(eos.any(1).sum()) > 100
    finished = eos.any(1)
    assert bool((eos.long().argmax(1)[finished] == lengths[finished] - 1).all())
    assert bool((rollout.ids_N_K[~rollout.mask_N_K] == generator.pad_id).all())


def test_min_tokens_holds_the_end_back(generator: LanguageModel) -> None:
    rollout = draw(generator, world.prompts("eval", 10, seed=2), max_tokens=24, min_tokens=24)
    assert bool((rollout.mask_N_K.sum(1) == 24).all())
    assert not bool((rollout.ids_N_K[:, :-1] == generator.eos_id).any())


def test_sampling_follows_the_distribution(generator: LanguageModel) -> None:
    """First-token frequencies of 6,000 samples against the model's own probabilities (5 standard errors)."""
    prompt = world.prompts("eval", 1, seed=5)
    rollout = draw(generator, prompt, group_size=6000, max_tokens=1)
    first = torch.bincount(rollout.ids_N_K[:, 0], minlength=512) / 6000
    ids, _ = encode_prompts(generator.tokenizer, prompt, generator.pad_id)
    truth = torch.softmax(generator.model(input_ids=ids).logits[0, -1].detach(), -1)
    error = (truth * (1 - truth) / 6000).sqrt()
    assert bool(((first - truth).abs() < 5 * error + 1e-3).all())
    assert float(truth.max()) < 0.95


def test_batches_and_seeds(generator: LanguageModel) -> None:
    prompts = world.prompts("eval", 6, seed=3)
    first, again, other = (draw(generator, prompts, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids_N_K, again.ids_N_K)
    assert first.ids_N_K.shape != other.ids_N_K.shape or not torch.equal(first.ids_N_K, other.ids_N_K)
    split = draw(generator, prompts, batch_size=6)
    assert split.prompts == first.prompts
    assert len(split) == 18


def test_examples_for_the_target_hold_the_completion_alone(generator: LanguageModel) -> None:
    rollout = draw(generator, world.prompts("eval", 3, seed=3))
    examples, offset = target_examples(rollout, generator.bos_id)
    assert offset == 1
    assert examples.ids_N_S[:, 0].tolist() == [generator.eos_id] * 9
    assert torch.equal(examples.ids_N_S[:, 1:], rollout.ids_N_K)
    assert torch.equal(examples.label_N_S[:, 1:], rollout.mask_N_K)
    bare, offset = target_examples(rollout, None)
    assert offset == 0
    assert not bool(bare.label_N_S[:, 0].any())
    assert torch.equal(bare.label_N_S[:, 1:], rollout.mask_N_K[:, 1:])


@pytest.mark.parametrize("mode", ["sequence", "token", "expected"])
def test_policy_steps_raise_the_reward(generator: LanguageModel, mode: str) -> None:
    """A reward for one word: its share must more than double, whichever way the credit reaches the tokens.

    About 18 % of the prompts allow the word; `sequence` credit stays within them for long.
    """
    word = generator.tokenizer.encode(" little")[0]
    prompts = world.prompts("train", 32, seed=4)
    optimizer = torch.optim.AdamW(generator.model.parameters(), lr=1e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    shares = []
    for step in range(12):
        rollout = draw(generator, prompts, seed=step, group_size=4, max_tokens=24)
        hits = (rollout.ids_N_K == word) & rollout.mask_N_K
        shares.append(float(hits.any(1).float().mean()))
        labels = torch.zeros(*hits.shape, 512)
        labels[..., word] = 1e-7
        credit = assign(mode, hits * 1e-7, labels * rollout.mask_N_K[..., None], rollout.mask_N_K, 4)
        stats = policy_step(generator.model, optimizer, rollout, credit, PolicySpec(minibatch=64), order)
        assert stats["grad_norm"] > 0
    assert sum(shares[-3:]) / 3 > 2 * shares[0], shares


def test_kl_holds_the_generator_back(generator: LanguageModel) -> None:
    reference = load("tiny", device=CPU).model
    with torch.no_grad():
        for parameter in generator.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rollout = draw(generator, world.prompts("train", 32, seed=4))
    nothing = Credit(torch.zeros(rollout.mask_N_K.shape))
    optimizer = torch.optim.AdamW(generator.model.parameters(), lr=1e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    spec = PolicySpec(kl=1.0, minibatch=96)
    divergences = [
        policy_step(generator.model, optimizer, rollout, nothing, spec, order, reference)["kl"] for _ in range(10)
    ]
    assert divergences[0] > 0.05
    assert divergences[-1] < 0.5 * divergences[0]


def test_clipping_stops_the_pull() -> None:
    generator = load("tiny", device=CPU)
    rollout = draw(generator, world.prompts("train", 8, seed=4))
    old = Rollout(
        rollout.prompts, rollout.prompt_ids_N_Q, rollout.prompt_mask_N_Q, rollout.ids_N_K, rollout.mask_N_K,
        rollout.logprobs_N_K - 0.5, rollout.group_size, 0.0,
    )  # fmt: skip
    optimizer = torch.optim.SGD(generator.model.parameters(), lr=0.0)
    order = torch.Generator().manual_seed(0)
    up = Credit(rollout.mask_N_K.float())
    stats = policy_step(generator.model, optimizer, old, up, PolicySpec(minibatch=1000), order)
    assert stats == {"clipped": 1.0, "grad_norm": 0.0}
    down = Credit(-rollout.mask_N_K.float())
    assert policy_step(generator.model, optimizer, old, down, PolicySpec(minibatch=1000), order)["grad_norm"] > 0


def test_schedules_by_hand() -> None:
    """Ten steps: lr rises over two and falls over the last half; the KL coefficient falls over the last 40 %."""
    sampling = Sampling(group_size=1, max_tokens=1, min_tokens=1, temperature=1.0, eos_id=0, pad_id=0)
    spec = LoopSpec(
        steps=10, sampling=sampling, recipe=Recipe(), micro_batch=1,
        credit="sequence", discount=1.0, policy=PolicySpec(kl=0.5, clip=0.3), lr=6.0, lr_warmup=2, lr_decay=0.5,
        kl_decay=0.4,
    )  # fmt: skip
    assert [spec.lr_at(step) for step in range(10)] == pytest.approx([3, 6, 6, 6, 6, 5, 4, 3, 2, 1])
    kl = [spec.policy_at(step).kl for step in range(10)]
    assert kl == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert all(spec.policy_at(step).clip == 0.3 for step in range(10))
