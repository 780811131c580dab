"""The metagradient as a reward of TRL: its values, its size, and GRPOTrainer with it against a shuffled control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import save_gpt2
from checkpoints import make, saved
from test_ranks import HERE, started

from dpg_cli.driver.trl.needs import require_trl
from dpg_cli.driver.trl.trainer import arguments
from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.engine.attribution import AttributionSpec, InnerSettings
from dpg_cli.engine.ranks import Ranks
from dpg_cli.errors import ConfigError, DegenerateError, UsageError
from dpg_cli.integrations.trl import MetagradientReward, RewardedBatch, unit_spread
from dpg_cli.metrics.norm import NormMetric
from dpg_cli.models.loading import LanguageModel, load, load_target
from dpg_cli.settings.config import ModelsConfig
from dpg_cli.settings.presets import find, resolve
from dpg_cli.tiny import world

CPU = torch.device("cpu")
ADAMW = OptimizerSpec("adamw", lr=1e-3, eps=1e-3)
pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return load_target(ModelsConfig(dtype="float64"), CPU)


def trl_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """What TRL makes of rewards: float32, and an absolute 1e-4 on the standard deviation."""
    grouped = rewards.float().view(-1, group_size)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def test_size_does_not_matter() -> None:
    """Rewards of 1e-9, as the paper has them: TRL flattens them as they are, and not after `unit_spread`."""
    rewards = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    grouped = rewards.view(-1, 4)
    exact = ((grouped - grouped.mean(1, keepdim=True)) / grouped.std(1, keepdim=True)).flatten()
    assert trl_advantages(rewards * 1e-9, 4).abs().max() < 1e-4
    for size in (1e-200, 1e-9, 1.0, 1e30):
        scaled = unit_spread(rewards * size)
        assert float(scaled.std(correction=0)) == pytest.approx(1, rel=1e-9)
        assert (trl_advantages(scaled, 4) - exact).abs().max() < 1e-3
    assert torch.equal(unit_spread(torch.full((5,), 7e-9)), torch.zeros(5, dtype=torch.float64))


def test_rewards_are_metagradients(tiny: LanguageModel) -> None:
    texts = world.sentences("train", "en", 6, seed=3)
    ids = [tiny.tokenizer.encode(text)[:9] + [tiny.eos_id] for text in texts]
    metric = NormMetric(tiny.model)
    logged: dict[str, float] = {}
    columns: dict[str, list[float]] = {}
    seen = []
    reward = MetagradientReward(
        tiny, tiny, metric, InnerSettings(ADAMW, batch_size=4), group_size=2, on_batch=seen.append
    )
    got = reward(
        prompts=["x"] * 6, completions=["never read"] * 6, completion_ids=ids, trainer_state=None, answer=[1] * 6,
        log_metric=logged.__setitem__, log_extra=columns.__setitem__,
    )  # fmt: skip
    begun = Examples.from_sequences([[tiny.bos_id, *row] for row in ids])
    result = metagradient(tiny.model, begun, ADAMW, metric, batch_size=4)
    assert torch.allclose(
        torch.tensor(columns["metagradient"], dtype=torch.float64), result.example_N, rtol=1e-12, atol=0
    )
    assert torch.allclose(torch.tensor(got, dtype=torch.float64), unit_spread(result.example_N), rtol=1e-9, atol=1e-12)
    assert logged["phi"] == pytest.approx(result.value, rel=1e-12)
    assert logged["reward_std"] == pytest.approx(float(result.example_N.std(correction=0)), rel=1e-9)
    assert "norm" in logged and len(seen) == 1 and len(seen[0].rollout) == 6
    assert len(set(got)) == 6


def test_text_is_read_where_there_are_no_ids(tiny: LanguageModel) -> None:
    texts = world.sentences("train", "en", 4, seed=5)
    ids = tiny.tokenizer(texts, add_special_tokens=False)["input_ids"]
    reward = MetagradientReward(tiny, tiny, NormMetric(tiny.model), InnerSettings(ADAMW, batch_size=4), group_size=2)
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions=texts) == reward(completions=messages) == reward(completion_ids=ids)


def test_another_tokeniser_reads_the_text(tiny: LanguageModel, tmp_path: Path) -> None:
    save_gpt2(tmp_path / "gpt2")
    other = load(str(tmp_path / "gpt2"), device=CPU, dtype="float64")
    texts = world.sentences("train", "en", 4, seed=6)
    ids = [[*tiny.tokenizer.encode(text), tiny.eos_id] for text in texts]
    reward = MetagradientReward(tiny, other, NormMetric(other.model), InnerSettings(ADAMW, batch_size=4), group_size=2)
    got = reward(completion_ids=ids)
    theirs = [[other.bos_id, *other.tokenizer.encode(text), other.eos_id] for text in texts]
    result = metagradient(other.model, Examples.from_sequences(theirs), ADAMW, NormMetric(other.model), batch_size=4)
    assert torch.allclose(torch.tensor(got, dtype=torch.float64), unit_spread(result.example_N), rtol=1e-8)


def test_what_has_no_reward_is_refused(tiny: LanguageModel) -> None:
    inner = InnerSettings(ADAMW, batch_size=4)
    with pytest.raises(ValueError, match="naive"):
        MetagradientReward(
            tiny, tiny, NormMetric(tiny.model), inner, group_size=2, attribution=AttributionSpec("naive", 2)
        )
    reward = MetagradientReward(tiny, tiny, NormMetric(tiny.model), inner, group_size=2)
    with pytest.raises(DegenerateError, match="Every reward is zero"):
        reward(completion_ids=[[], [], [], []])


def test_settings_that_trl_cannot_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    data, base = find("pattern-67.tiny").data(), ['trainer="trl"', 'credit.mode="sequence"']
    with pytest.raises(ConfigError, match="one target"):
        resolve(
            find("language-rephrase.tiny").data(), [*base, "models.redraw_target=true", 'models.target_init="random"']
        )
    config = resolve(data, base)
    require_trl(config, Ranks(0, 2))
    with pytest.raises(UsageError, match="3 processes must divide"):
        require_trl(config, Ranks(0, 3))
    with pytest.raises(UsageError, match="even mini-batches"):
        require_trl(resolve(data, [*base, "policy.minibatch=100"]), Ranks(0, 1))
    with pytest.raises(UsageError, match="kl_decay"):
        require_trl(resolve(data, [*base, "policy.kl=0.1", "policy.kl_decay=0.5"]), Ranks(0, 1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(UsageError, match=r"vllm is not installed.*dpg-cli\[vllm\]"):
        require_trl(resolve(data, [*base, 'trl.vllm="colocate"']), Ranks(0, 1))


@pytest.mark.parametrize("vllm", ["off", "colocate", "server"])
def test_ids_without_text_are_kept_out_of_every_sampler(vllm: str, tmp_path: Path) -> None:
    """transformers has a list for them; vLLM's `SamplingParams`, and its server's JSON, a bias."""
    base = ['trainer="trl"', 'credit.mode="sequence"', "rollout.min_tokens=3", f'trl.vllm="{vllm}"']
    config = resolve(find("pattern-67.tiny").data(), base)
    given = arguments(config, tmp_path, Ranks(0, 1), CPU, (510, 511)).generation_kwargs
    if vllm == "off":
        assert given == {"min_new_tokens": 3, "suppress_tokens": [510, 511]}
    else:
        assert given == {"min_tokens": 3, "logit_bias": {510: -100.0, 511: -100.0}}
    assert not arguments(
        resolve(find("pattern-67.tiny").data(), [*base, "rollout.min_tokens=1"]), tmp_path, Ranks(0, 1), CPU
    ).generation_kwargs


def test_ids_without_text_that_were_drawn_all_the_same_are_counted(tmp_path: Path) -> None:
    padded = load(str(saved(make("llama", rows=520), tmp_path / "padded")), device=CPU, dtype="float64")
    assert padded.silent_ids == tuple(range(512, 520))
    seen: list[RewardedBatch] = []
    reward = MetagradientReward(
        padded, padded, NormMetric(padded.model), InnerSettings(ADAMW, batch_size=4), group_size=2, on_batch=seen.append
    )
    logged: dict[str, float] = {}
    ids = [[5, 512, 7, 519], [9, 30], [40, 41, 513], [8, 9]]
    reward(completion_ids=ids, log_metric=logged.__setitem__)
    assert logged["silent_tokens"] == seen[0].numbers["silent_tokens"] == 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by GRPOTrainer: one and two processes, shuffled rewards, a resume."""
    out = tmp_path_factory.mktemp("trl")
    answer = started(str(HERE / "ranks_worker.py"), "trl", str(out), timeout=800)
    assert answer.returncode == 0, answer.stderr[-4000:]
    return out


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two"])
def test_grpo_trainer_raises_phi_above_the_shuffled_control(runs: Path, name: str) -> None:
    """Φ is -ln 2 = -0.69 where nothing moved. The control has the same rewards on other completions."""
    ours, control = ([row["phi"] for row in rows(runs / run)[-4:]] for run in (name, f"{name}-shuffled"))
    assert sum(ours) / 4 > -0.3
    assert sum(ours) / 4 > sum(control) / 4 + 0.3


@pytest.mark.slow
def test_the_run_folder_is_that_of_a_run(runs: Path) -> None:
    folder = {path.name for path in (runs / "two").iterdir()}
    assert folder >= {"config.toml", "run.json", "metrics.jsonl", "generator", "target", "dataset", "lm_head.png"}
    assert "report.html" in folder
    numbers = rows(runs / "two")
    assert [row["step"] for row in numbers] == list(range(16))
    assert all(row["examples"] == 128 and row["tokens"] == 512 for row in numbers)
    assert {"phi", "entropy", "policy_grad_norm", "reward_std", "seconds_metagradient", "lr"} <= numbers[0].keys()
    assert numbers[0]["lr"] == 0.01 and numbers[-1]["lr"] < 0.003  # the preset's decay
    # the first rollout is of the same untrained generator, by TRL's own sampling
    assert numbers[0]["entropy"] == pytest.approx(6.2, abs=0.1)


@pytest.mark.slow
def test_trl_resumes_with_another_number_of_processes(runs: Path) -> None:
    numbers = rows(runs / "resumed")
    assert [row["step"] for row in numbers] == list(range(16))
    info = json.loads((runs / "resumed" / "run.json").read_text())
    assert [session["first_step"] for session in info["sessions"]] == [0, 5]
    assert [session["hardware"]["processes"] for session in info["sessions"]] == [2, 1]
    assert info["finished"] is True
    assert all(row.keys() == numbers[0].keys() for row in numbers)
    assert numbers[5]["entropy"] < numbers[0]["entropy"]  # it went on from the trained generator
