"""`token` and `expected` credit in TRL's GRPOTrainer against our own policy step, in float64: pieces, whole outer steps, processes, a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, make_target, save_gpt2
from policies import KL, SPEC, Largest, credit_of, moved, named_gradients, rollout_of, twin_gradients
from short_run import call
from test_policy_step import close, cubes
from test_ranks import HERE, started
from torch import Tensor
from trl_step import SILENT, compared

from dpg_cli.driver.execute import StopRequest, execute
from dpg_cli.driver.trl.needs import require_trl
from dpg_cli.driver.trl.trainer import arguments
from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.engine.attribution import InnerSettings
from dpg_cli.engine.generator.contexts import drawn
from dpg_cli.engine.generator.loss import loss_of
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.inner import head as chunked
from dpg_cli.engine.inner.head import find_head
from dpg_cli.engine.ranks import ALONE
from dpg_cli.engine.records import Credit
from dpg_cli.errors import BadValueError, InterruptedRunError, UsageError
from dpg_cli.integrations.trl import MetagradientReward
from dpg_cli.integrations.trl_credit import TokenCredit
from dpg_cli.metrics.norm import NormMetric
from dpg_cli.models.loading import LanguageModel, load, load_target
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config, ModelsConfig
from dpg_cli.settings.presets import find, resolve

pytest.importorskip("trl")
CPU = torch.device("cpu")
PIECES = torch.tensor([4, 0, 3]), torch.tensor([1, 5, 2])  # of six completions, in no order


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return load_target(ModelsConfig(dtype="float64"), CPU)


def settings(*more: str) -> Config:
    return resolve(find("pattern-67.tiny").data(), ['trainer="trl"', *more])


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bias"])
@pytest.mark.parametrize("kl", [0.0, KL])
@pytest.mark.parametrize("standard", [True, False])
def test_losses_of_micro_batches_have_the_gradient_of_the_step(
    architecture: str, kl: float, standard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of three tokens, ratios inside and outside the clip, silent ids; and through logits where the head is no standard one."""
    monkeypatch.setattr(chunked, "CHUNK", 3 * VOCAB)
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 1)
    made: Any = make_target(architecture.replace("bias", "llama"), tied=architecture != "bias")
    if architecture == "bias":
        made.lm_head = torch.nn.Linear(16, VOCAB, dtype=torch.float64)
    model, rollout, spec = moved(made), rollout_of(), replace(SPEC, kl=kl)
    reference = make_target("gpt2", tied=False).eval() if kl else None
    credit = credit_of(rollout, True)
    expected, wanted = twin_gradients(model, rollout, credit, spec, reference)
    start = None if reference is None else (reference, find_head(reference) if standard else None)
    told = torch.zeros(2, dtype=torch.float64)
    for piece in PIECES:
        mine = credit.rows(piece, rollout.ids_N_K.shape[1])
        loss, counted = loss_of(
            model, find_head(model) if standard else None, rollout.rows(piece), mine, spec, len(rollout), start
        )
        (3 * loss).backward()  # a trainer may scale it
        told += counted
    close({name: value / 3 for name, value in named_gradients(model).items()}, expected)
    tokens = int(rollout.mask_N_K.sum())
    assert float(told[0]) / tokens == pytest.approx(wanted["clipped"], rel=1e-9)
    assert float(told[1]) / tokens == pytest.approx(wanted.get("kl", 0.0), rel=1e-9)


def test_a_loss_has_no_table_of_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 4 * VOCAB)
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 4)
    model, rollout = moved(make_target("gpt2", tied=False)), rollout_of(completions=(12,) * 24)
    examples = Examples.from_sequences([[1, *row] for row in rollout.ids_N_K.tolist()])
    made = metagradient(
        make_target("gpt2", tied=True), examples, OptimizerSpec(lr=1e-2, eps=1e-2), cubes, labels="factors"
    )
    assert made.factors is not None
    credit = Credit(made.token_N_S[:, 1:], None, {}, made.factors.placed(12, 1))
    head, sizes = find_head(model), {p.numel() for p in model.parameters()} | {24 * 17 * 64, 24 * 17 * 48}
    with Largest(sizes) as seen:
        loss_of(model, head, rollout, credit, SPEC, 24)[0].backward()
    assert 4 * VOCAB <= seen.found < 24 * 12 * VOCAB


def test_rows_and_weights_of_a_credit() -> None:
    """In factors as in a table; a weight of a completion holds for its labels too, one of a token does not."""
    rollout = rollout_of()
    lengths = rollout.mask_N_K.sum(1).tolist()
    rows = [[1, *row[:length]] for row, length in zip(rollout.ids_N_K.tolist(), lengths, strict=True)]
    examples, optimizer = Examples.from_sequences(rows), OptimizerSpec(lr=1e-2, eps=1e-2)
    model = make_target("gpt2", tied=True)
    found = {
        labels: metagradient(model, examples, optimizer, cubes, labels=labels, batch_size=4)  # type: ignore[arg-type]
        for labels in (True, "factors")
    }
    table, factors = found[True].label_N_S_V, found["factors"].factors
    assert table is not None and factors is not None
    scale = torch.tensor(3.0, dtype=torch.float64)
    width = rollout.ids_N_K.shape[1]
    dense = Credit(found[True].token_N_S[:, 1:], scale * table[:, 1:])
    sparse = Credit(found[True].token_N_S[:, 1:], None, {}, factors.placed(width, 1).scaled(scale))
    piece, narrow = torch.tensor([4, 1, 1]), 3
    whole = torch.tensor([[2.0], [0.5], [0.0]], dtype=torch.float64)
    each = torch.rand(3, narrow, dtype=torch.float64)
    places = torch.arange(3 * narrow)
    for weight, labels in ((whole, whole.repeat_interleave(narrow, 0)), (each, 1.0)):
        wanted = labels * scale * table[piece, 1 : narrow + 1].flatten(0, 1)
        for credit in (dense, sparse):
            got = credit.rows(piece, narrow).weighted(weight)
            torch.testing.assert_close(got.advantage_N_K, dense.advantage_N_K[piece, :narrow] * weight)
            torch.testing.assert_close(got.labels_at(places), wanted, rtol=1e-9, atol=1e-18)
        again = sparse.rows(piece, narrow).weighted(weight).rows(torch.tensor([2, 0]), narrow)
        torch.testing.assert_close(
            again.labels_at(torch.arange(2 * narrow)), wanted.view(3, narrow, -1)[[2, 0]].flatten(0, 1), rtol=1e-9, atol=1e-18
        )  # fmt: skip


@pytest.mark.parametrize("standard", [True, False])
def test_what_another_sampler_drew_is_told_as_ours_tells_it(tiny: LanguageModel, standard: bool) -> None:
    """Log-probabilities and entropy under temperature, silent ids and ends that cannot come yet; ragged prompts and completions."""
    sampling = Sampling(3, 20, 15, 1.3, tiny.eos_id, tiny.pad_id, silent_ids=SILENT)
    rollout = sample(
        tiny.model, tiny.tokenizer, ["the", "a red bird sings"], sampling, torch.Generator().manual_seed(0)
    )
    assert len(set(rollout.mask_N_K.sum(1).tolist())) > 1 and not bool(rollout.prompt_mask_N_Q.all())
    head = find_head(tiny.model) if standard else None
    for micro_batch in (0, 4):
        logprobs, entropy = drawn(tiny.model, head, rollout, sampling, micro_batch)
        torch.testing.assert_close(logprobs, rollout.logprobs_N_K, rtol=1e-9, atol=1e-12)
        assert float(entropy.sum() / rollout.mask_N_K.sum()) == pytest.approx(rollout.entropy, rel=1e-9)


@pytest.mark.parametrize(
    ("credit", "factors", "more"),
    [
        ("token", False, ()),
        ("expected", False, ()),
        ("expected", True, ("policy.gradient_checkpointing=true",)),
        ("expected", True, ("models.dtype='float32'", "policy.precision='bf16'")),
    ],
)
def test_an_outer_step_is_our_own(credit: str, factors: bool, more: tuple[str, ...], tmp_path: Path) -> None:
    """The weights after four optimiser steps of four micro-batches, two over each completion, with a KL, on what TRL drew.

    The credits are made anew, without factors. No tolerance but for float64's rounding: with these credits nothing of TRL's is float32.
    In float32 with passes in bf16 the sums are the same ones, in the same order; another order of their terms may cost some 1e-7.
    """
    found = compared(credit, tmp_path, *more, factors=factors)
    half = bool(more) and "bf16" in more[-1]
    assert found["off"] < (1e-5 if half else 1e-12)
    assert found["change"] > 0.1
    assert found["factors"] is factors
    assert len(found["lengths"]) > 3 and found["silent"] == 0
    assert found["rows"] and (found["steps"], found["calls"]) == (4, 16)
    for name in ("clipped", "kl", "norm"):
        theirs, ours = found[name]
        assert theirs == pytest.approx(ours, rel=1e-3 if half else 1e-9)
        assert ours > 0


def test_one_optimiser_step_of_all_completions(tmp_path: Path) -> None:
    """TRL then keeps no log-probabilities of its own accord: they are those of the generator as it is, and no ratio is clipped."""
    found = compared("expected", tmp_path, "policy.minibatch=16", "policy.epochs=1", "policy.kl=0.0", "rollout.min_tokens=1")  # fmt: skip
    assert found["off"] < 1e-12 < found["change"]
    assert (found["steps"], found["calls"]) == (1, 8)
    assert found["clipped"] == (0.0, 0.0)


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    answer = started(str(HERE / "trl_step.py"), "2", str(tmp_path), "token", "expected", timeout=300)
    assert answer.returncode == 0, answer.stderr[-4000:]
    token, expected = map(json.loads, answer.stdout.splitlines())
    for found in (token, expected):
        assert found["off"] < 1e-12 < found["change"]
        assert found["rows"] and (found["steps"], found["calls"]) == (4, 8)
        for name in ("clipped", "kl", "norm"):
            assert found[name][0] == pytest.approx(found[name][1], rel=1e-9)
    assert expected["factors"] and not token["factors"]


def trainer_of(tiny: LanguageModel, folder: Path, credit: str = "expected", **options: Any) -> Any:
    """A trainer whose parts are at hand."""
    from datasets import Dataset
    from trl import GRPOTrainer

    class Trainer(TokenCredit, GRPOTrainer):
        pass

    inner = InnerSettings(OptimizerSpec("adamw", lr=1e-3, eps=1e-3), batch_size=4)
    reward = MetagradientReward(tiny, tiny, NormMetric(tiny.model), inner, group_size=4, credit=credit)
    config = settings("prompts.per_step=4", "policy.minibatch=16")
    given: dict[str, Any] = {
        "args": arguments(config, folder, ALONE, CPU),
        "sampling": Sampling(4, 20, 1, 1.0, tiny.eos_id, tiny.pad_id),
        "policy_at": lambda step: SPEC,
        "train_dataset": Dataset.from_dict({"prompt": ["a"] * 4}),
        "processing_class": tiny.tokenizer,
    }
    return Trainer(model=tiny.model, reward_funcs=reward, **(given | options))


def test_importance_weights_of_vllm(tiny: LanguageModel, tmp_path: Path) -> None:
    """A micro-batch with TRL's weights: of tokens and of completions; and an id drawn that never is, which counts as no token."""
    trainer = trainer_of(tiny, tmp_path)
    rollout = rollout_of(tiny.head.shape[0])
    trainer._credit = credit_of(rollout, True, tiny.head.shape[0])
    piece, width = torch.tensor([4, 0, 3]), rollout.ids_N_K.shape[1]
    rows = rollout.rows(piece)
    inputs = {
        "prompt_ids": rows.prompt_ids_N_Q, "prompt_mask": rows.prompt_mask_N_Q.long(), "completion_ids": rows.ids_N_K,
        "completion_mask": rows.mask_N_K.long(), "old_per_token_logps": rows.logprobs_N_K, "credit_rows": piece,
        "entropy": torch.ones(3),
    }  # fmt: skip
    trainer.current_gradient_accumulation_steps = 2
    for weight in (torch.tensor([[2.0], [0.5], [0.0]]), 2 * torch.rand(3, width)):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, inputs | {"importance_sampling_ratio": weight}).backward()
        found = named_gradients(trainer.model)
        weighed = trainer._credit.rows(piece, width).weighted(weight.double())
        expected, _ = twin_gradients(tiny.model, rows, weighed, SPEC)
        close({name: 2 * value for name, value in found.items()}, expected)
    ids, old = rows.ids_N_K.clone(), rows.logprobs_N_K.clone()
    ids[0, 4], old[0, 4] = SPEC.silent_ids[0], -torch.inf  # the last of its completion: nothing is read after it
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs | {"completion_ids": ids, "old_per_token_logps": old}).backward()
    found = named_gradients(trainer.model)
    without = trainer._credit.rows(piece, width)
    without.advantage_N_K[0, 4] = 0.0
    expected, _ = twin_gradients(tiny.model, rows, without, SPEC)
    close({name: 2 * value for name, value in found.items()}, expected)


def test_a_run_learns_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    """The command's own path: Φ rises, and what was stopped goes on from TRL's checkpoint. -1.26 is where it begins."""
    config = resolve(
        find("qr-embed.tiny").data(),
        ['trainer="trl"', 'credit.mode="expected"', "steps=12", "prompts.per_step=16", "rollout.group_size=8", "rollout.max_tokens=16",
         "rollout.min_tokens=2", "inner.batch_size=128", "policy.minibatch=128", "dataset.examples=16", "dataset.control=false",
         'metric.text="HI"'],
    )  # fmt: skip
    stop, folder = StopRequest(), RunFolder(tmp_path / "run")

    def on_step(report: Any) -> None:
        stop.asked = report.step == 4

    with pytest.raises(InterruptedRunError, match="after outer step 5 of 12"):
        execute(config, folder, on_step=on_step, stop=stop)
    execute(config, folder, resume=True)
    numbers = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in numbers] == list(range(12))
    assert all(row.keys() == numbers[0].keys() for row in numbers)
    phi = [row["phi"] for row in numbers]
    assert sum(phi[-4:]) / 4 > sum(phi[:2]) / 2 + 0.1
    info = json.loads((folder.path / "run.json").read_text())
    assert [session["first_step"] for session in info["sessions"]] == [0, 5] and info["finished"]
    assert numbers[0]["policy_clipped"] == 0.0 and numbers[0]["entropy"] == pytest.approx(6.2, abs=0.1)


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        (["rollout.group_size=1", "policy.minibatch=64"], "rollout.group_size must be at least 2"),
        (["metric.margin=2.0"], "metric.margin counts in standard errors"),
        (["policy.minibatch=100"], "even mini-batches"),
        (["credit.mode='sequence'", "policy.kl=0.1", "policy.kl_decay=0.5"], "policy.kl_decay cannot be kept"),
        (["credit.mode='sequence'", "attribution.method='naive'", "attribution.inner_runs=2"], "attribution.method = 'naive'"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_loads(more: list[str], cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        require_trl(settings(*more), ALONE)
    assert caught.value.remedy and caught.value.exit_code == 2


def test_a_generator_in_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trl(settings("policy.kl=0.1", "policy.kl_decay=0.5"), ALONE)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for credit in ("sequence", "expected"):
        with pytest.raises(UsageError, match="FSDP holds parts of the generator"):
            require_trl(settings(f"credit.mode={credit!r}"), ALONE)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    require_trl(settings("credit.mode='sequence'"), ALONE)
    with pytest.raises(UsageError, match="With 'expected' credit DeepSpeed may hold parts"):
        require_trl(settings(), ALONE)


def test_expected_credit_needs_one_tokeniser(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_gpt2(tmp_path / "gpt2")
    asked = ("--target", str(tmp_path / "gpt2"), "--set", "prompts.per_step=2", "--set", "policy.minibatch=8")
    answer = call(capsys, monkeypatch, "run", "l2-shrink", "--trainer", "trl", *asked, "--out", str(tmp_path / "run"))
    assert answer.code == 2
    assert "have different tokenisers, and the credit mode 'expected' needs one. --set credit.mode=token" in answer.err
    assert answer.err.count("\ndpg: ") == 1 and answer.err.endswith("of one family.\n")
    other = load(str(tmp_path / "gpt2"), device=CPU, dtype="float64")
    inner = InnerSettings(OptimizerSpec(lr=1e-3), batch_size=4)
    with pytest.raises(BadValueError, match="'expected' credit needs one"):
        MetagradientReward(tiny, other, NormMetric(other.model), inner, group_size=2, credit="expected")
    with pytest.raises(BadValueError, match="no credit 'each'"):
        MetagradientReward(tiny, tiny, NormMetric(tiny.model), inner, group_size=2, credit="each")


def test_what_the_trainer_refuses(tiny: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(BadValueError, match="credit 'token' or 'expected'"):
        trainer_of(tiny, tmp_path, credit="sequence")
    with pytest.raises(BadValueError, match="has no eval_dataset"):
        trainer_of(tiny, tmp_path, eval_dataset=[])
    given = arguments(settings("prompts.per_step=4", "policy.minibatch=16"), tmp_path, ALONE, CPU)
    given.top_entropy_quantile = 0.5
    with pytest.raises(BadValueError, match=r"top_entropy_quantile = 0\.5 is no part"):
        trainer_of(tiny, tmp_path, args=given)
    with pytest.raises(ValueError, match="needs the starting generator"):
        trainer = trainer_of(tiny, tmp_path, policy_at=lambda step: replace(SPEC, kl=0.1))
        trainer._credit = Credit(torch.zeros(1, 1))
        one: dict[str, Tensor] = dict.fromkeys(
            ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), torch.ones(1, 1).long()
        )
        trainer._compute_loss(
            trainer.model, one | {"old_per_token_logps": torch.zeros(1, 1), "credit_rows": torch.zeros(1).long()}
        )
