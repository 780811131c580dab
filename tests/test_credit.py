"""The three credit modes, against the exact policy gradient on a model small enough to enumerate every completion."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dpg_cli.engine.generator.credit import assign, leave_one_out, returns
from dpg_cli.engine.generator.policy import PolicySpec, completion_logits, policy_loss
from dpg_cli.engine.records import Credit, Rollout

VOCAB, LENGTH, EOS, BOS = 4, 3, 0, 3


def tiny_generator() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def completions() -> list[tuple[int, ...]]:
    """Every completion: it ends at EOS or at LENGTH tokens."""
    found = []
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        cut = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        if cut not in found:
            found.append(cut)
    return found


def rollout_of(rows: list[tuple[int, ...]], model: GPT2LMHeadModel, group_size: int) -> Rollout:
    ids = torch.tensor([list(row) + [EOS] * (LENGTH - len(row)) for row in rows])
    mask = torch.tensor([[k < len(row) for k in range(LENGTH)] for row in rows])
    prompt = torch.full((len(rows), 1), BOS)
    rollout = Rollout(
        [""] * len(rows),
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        ids,
        mask,
        torch.zeros(mask.shape, dtype=torch.float64),
        group_size,
        0.0,
    )
    with torch.no_grad():
        log_pi = torch.log_softmax(completion_logits(model, rollout), -1).gather(-1, ids[..., None])[..., 0] * mask
    return Rollout(rollout.prompts, prompt, rollout.prompt_mask_N_Q, ids, mask, log_pi, group_size, 0.0)


def reward_table(rows: list[tuple[int, ...]]) -> Tensor:
    """A fixed reward function τ(y | prefix), as (N, LENGTH, VOCAB): any number for each prefix and label."""
    table: dict[tuple[int, ...], Tensor] = {}
    rng = torch.Generator().manual_seed(0)
    for row in sorted(completions()):
        for k in range(len(row)):
            table.setdefault(row[:k], torch.randn(VOCAB, generator=rng, dtype=torch.float64) * 1e-6)
    zero = torch.zeros(VOCAB, dtype=torch.float64)
    return torch.stack([torch.stack([table[row[:k]] if k < len(row) else zero for k in range(LENGTH)]) for row in rows])


def gradient(model: GPT2LMHeadModel, value: Tensor) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in torch.autograd.grad(value, list(model.parameters()))])


@pytest.mark.parametrize(("mode", "group_size"), [("sequence", 2), ("token", 2), ("expected", 2), ("expected", 1)])
def test_expected_policy_gradient_is_exact(mode: str, group_size: int) -> None:
    model = tiny_generator()
    alone = completions()
    rows = [row for group in itertools.product(alone, repeat=group_size) for row in group]
    rollout = rollout_of(rows, model, group_size)
    labels = reward_table(rows)
    tokens = labels.gather(-1, rollout.ids_N_K[..., None])[..., 0] * rollout.mask_N_K
    credit = assign(mode, tokens, labels, rollout.mask_N_K, group_size, normalize=False)

    # Every group occurs with its own probability, where sampling would draw it; the loss averages over rows.
    probability = rollout.logprobs_N_K.sum(1).unflatten(0, (-1, group_size)).sum(1).exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-12)
    weight = probability.repeat_interleave(group_size)[:, None] * len(rows) / group_size
    weighted = Credit(
        credit.advantage_N_K * weight, None if credit.label_N_K_V is None else credit.label_N_K_V * weight[..., None]
    )
    loss, _ = policy_loss(completion_logits(model, rollout), rollout, weighted, PolicySpec())
    estimate = -gradient(model, loss)

    single = rollout_of(alone, model, 1)
    log_pi = torch.log_softmax(completion_logits(model, single), -1)
    chosen = (log_pi.gather(-1, single.ids_N_K[..., None])[..., 0] * single.mask_N_K).sum(1)
    table = reward_table(alone)
    reward = (table.gather(-1, single.ids_N_K[..., None])[..., 0] * single.mask_N_K).sum(1)
    if group_size == 1:  # the future part is missing by design: compare with the gradient of the immediate part
        immediate = (log_pi.exp() * table).sum(-1) * single.mask_N_K
        truth = gradient(model, (chosen.detach().exp() * immediate.sum(1)).sum())
    else:
        truth = gradient(model, (chosen.exp() * reward).sum())
    assert float(truth.norm()) > 1e-9
    assert float((estimate - truth).norm() / truth.norm()) < 1e-9


def test_rewards_of_any_size_give_the_same_advantages() -> None:
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randn(8, 5, generator=rng)
    labels = torch.randn(8, 5, 7, generator=rng)
    mask = torch.ones(8, 5, dtype=torch.bool)
    for mode in ("sequence", "token", "expected"):
        large = assign(mode, tokens, labels, mask, 4)
        small = assign(mode, tokens * 1e-12, labels * 1e-12, mask, 4)
        torch.testing.assert_close(small.advantage_N_K, large.advantage_N_K, rtol=1e-4, atol=1e-5)
        assert float(large.advantage_N_K.abs().max()) > 0.1
        if large.label_N_K_V is not None and small.label_N_K_V is not None:
            torch.testing.assert_close(small.label_N_K_V, large.label_N_K_V, rtol=1e-4, atol=1e-5)


def test_groups_without_spread_get_nothing() -> None:
    tokens = torch.zeros(8, 3)
    tokens[4:, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    credit = assign("sequence", tokens, None, torch.ones(8, 3, dtype=torch.bool), 4)
    assert bool((credit.advantage_N_K[:4] == 0).all())
    assert credit.stats["dead_groups"] == 0.5
    # (reward - mean of the others) / std of the group, by hand: mean 2.5, std 1.29099, G/(G-1) = 4/3
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5]) * (4 / 3) / 1.2909944
    torch.testing.assert_close(credit.advantage_N_K[4:, 0], expected)


def test_discounted_returns_by_hand() -> None:
    tokens = torch.tensor([[1.0, 2.0, 4.0]])
    assert returns(tokens).tolist() == [[7.0, 6.0, 4.0]]
    assert returns(tokens, 0.5).tolist() == [[3.0, 4.0, 4.0]]
    assert returns(tokens, 0.0).tolist() == [[1.0, 2.0, 4.0]]


def test_leave_one_out_by_hand() -> None:
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
