"""The paper's presets: their numbers, and each for two outer steps on small checkpoints of the same architectures."""

from __future__ import annotations

import json
import re
import sys
import uuid
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import save_gpt2, save_instruct_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpg_cli.cli import main
from dpg_cli.engine.inner.optimizers import OptimizerSpec, State, update
from dpg_cli.settings.config import NormOptions, PatternOptions, TextLossOptions, load_toml, validate
from dpg_cli.settings.presets import all_presets, find
from dpg_cli.tiny import world

TASKS = ("qr-embed", "pattern-67", "l2-shrink", "language-rephrase", "uuid-emit")
ON_GPT2 = TASKS[:3]
# The paper's table: completions an outer step, T, outer steps, completions in all, inner and generator learning rates
TABLE = {
    "qr-embed": (98_304, 96, 240, 23_592_960, 5e-6, 5e-6),
    "pattern-67": (8_192, 8, 480, 3_932_160, 5e-6, 5e-6),
    "l2-shrink": (8_192, 8, 120, 983_040, 5e-6, 5e-6),
    "language-rephrase": (1_024, 1, 120, 122_880, 1e-6, 1e-6),
    "uuid-emit": (1_024, 1, 360, 368_640, 1e-6, 1e-6),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_papers_numbers(task: str) -> None:
    config = validate(find(f"{task}.paper").data())
    inner, policy = config.inner, config.policy
    assert TABLE[task] == (
        config.examples_per_step,
        config.inner_steps,
        config.steps,
        config.steps * config.examples_per_step,
        inner.lr,
        policy.lr,
    )
    assert (inner.optimizer, inner.beta1, inner.beta2, inner.weight_decay) == ("adamw", 0.9, 0.95, 1e-4)
    assert (inner.batch_size, inner.max_length, inner.normalization) == (1024, 128, "example")
    # theirs on the summed gradient of `summed` micro-batches, ours on the mean
    summed = 8 if task in ON_GPT2 else 128
    assert inner.micro_batch * summed == 1024
    assert inner.eps * summed == pytest.approx(1e-8, rel=1e-12)
    assert inner.eps_root * summed**2 == pytest.approx(1e-9, rel=1e-12)
    assert (config.rollout.group_size, config.rollout.max_tokens, config.rollout.temperature) == (4, 128, 1.0)
    assert (policy.minibatch, policy.epochs, policy.kl) == (32 * 4, 1, 0.0)
    assert config.credit.mode == "sequence"
    gpt2, llama = "openai-community/gpt2", "meta-llama/Llama-3.2-1B-Instruct"
    assert (config.models.generator, config.models.target) == (llama, gpt2 if task in ON_GPT2 else llama)
    assert config.models.untie_target
    metric = config.metric
    if isinstance(metric, PatternOptions):
        assert metric.sharpness == 20.0
    assert isinstance(
        metric, {"l2-shrink": NormOptions}.get(task, PatternOptions if task in ON_GPT2 else TextLossOptions)
    )


@pytest.mark.parametrize("summed", [8, 128])
def test_dividing_epsilon_is_summing_gradients(summed: int) -> None:
    """AdamW on k g with (ε, ε_root) takes the steps of AdamW on g with (ε / k, ε_root / k²)."""
    rng = torch.Generator().manual_seed(0)
    theirs = OptimizerSpec(lr=5e-6, beta2=0.95, eps=1e-8, eps_root=1e-9, weight_decay=1e-4)
    ours = OptimizerSpec(lr=5e-6, beta2=0.95, eps=1e-8 / summed, eps_root=1e-9 / summed**2, weight_decay=1e-4)
    theta = torch.randn(50, generator=rng, dtype=torch.float64)
    start = State(theta, torch.zeros_like(theta), torch.zeros_like(theta))
    one = two = plain = start
    for step in range(5):
        grad = 1e-6 * torch.randn(50, generator=rng, dtype=torch.float64)
        one = update(theirs, one, summed * grad, step)
        two = update(ours, two, grad, step)
        plain = update(theirs, plain, grad, step)
    moved = (one.theta - theta).norm()
    assert float((one.theta - two.theta).norm() / moved) < 1e-9
    assert float((plain.theta - two.theta).norm() / moved) > 0.1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints with different tokenisers, one of them instruct, and articles."""
    place = tmp_path_factory.mktemp("paper")
    save_instruct_llama(place / "llama")
    save_gpt2(place / "gpt2")
    articles = [" ".join(world.sentences("train", "en", 1 + number % 5, seed=number)) for number in range(30)]
    pq.write_table(pa.table({"id": range(30), "text": articles}), place / "articles.parquet")
    return place


def dpg(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Run `dpg` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["dpg", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


class Lambada:
    """Stands for lm-eval's task, whose data lies on the hub."""

    OUTPUT_TYPE = "loglikelihood"

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[str]:
        return world.sentences("eval", "es", 20, seed=0)

    def doc_to_text(self, text: str) -> str:
        return text.rpartition(" ")[0]

    def doc_to_target(self, text: str) -> str:
        return " " + text.rpartition(" ")[2]


@pytest.fixture
def lambada(monkeypatch: pytest.MonkeyPatch) -> None:
    class TaskManager:
        all_tasks = ("lambada_openai_mt_es",)

        def load(self, names: list[str]) -> dict[str, dict[str, Lambada]]:
            return {"tasks": {name: Lambada() for name in names}}

    module = ModuleType("lm_eval.tasks")
    module.TaskManager = TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)


SMALL = (
    "steps=2", "prompts.per_step=5", "prompts.limit=0", "prompts.holdout=4", "rollout.max_tokens=24", "inner.batch_size=8",
    "inner.max_length=32", "dataset.examples=12",
)  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_two_outer_steps(
    task: str,
    place: Path,
    tmp_path: Path,
    lambada: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only sizes, steps and the prompts' source differ from the preset; target and generator have different tokenisers."""
    # for language and UUID the paper has one model: that is tested below, another tokeniser is the harder case
    models = ("--generator", place / "llama", "--target", place / "gpt2")
    sets = [part for setting in SMALL for part in ("--set", setting)]
    out = tmp_path / "run"
    code, stdout, errors = dpg(
        capsys, monkeypatch, "run", task, "--scale", "paper", *models, "--prompts", place / "articles.parquet", *sets,
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 0, errors
    assert "two tokenisers" in errors
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["reward_std"] > 0 and row["policy_grad_norm"] > 0 for row in rows)
    assert json.loads(stdout)["measures"].keys() >= {"phi"}

    resolved = validate(load_toml(out / "config.toml"))
    assert Path(resolved.prompts.source).is_absolute()
    if task == "uuid-emit":
        assert isinstance(resolved.metric, TextLossOptions)
        assert str(uuid.UUID(resolved.metric.uuid)) == resolved.metric.uuid
        assert uuid.UUID(resolved.metric.uuid).version == 4
    generator = AutoTokenizer.from_pretrained(out / "generator")
    target = AutoTokenizer.from_pretrained(out / "target")
    assert generator.chat_template
    assert AutoModelForCausalLM.from_pretrained(out / "generator").generation_config.eos_token_id == [
        generator.eos_token_id,
        generator.convert_tokens_to_ids("<|eot|>"),
    ]
    articles = pq.read_table(place / "articles.parquet")["text"].to_pylist()
    data = pq.read_table(out / "dataset" / "train.parquet").to_pylist()
    assert len(data) == 12
    for row in data:
        assert row["prompt"] in articles[:26]  # as the user wrote it, and none that is held out
        assert generator.decode(row["token_ids"], skip_special_tokens=True) == row["text"]
        ended = row["token_ids"][-1] in (generator.eos_token_id, generator.convert_tokens_to_ids("<|eot|>"))
        read = [target.bos_token_id, *target(row["text"])["input_ids"], *([target.eos_token_id] if ended else [])]
        assert row["input_ids"] == read[:32]
        assert len(row["token_rewards"]) == len(row["token_ids"])
        assert sum(row["token_rewards"]) == pytest.approx(row["reward"], rel=1e-3, abs=1e-9)
    assert any(row["reward"] for row in data)


def test_one_instruct_model_plays_both_and_is_verified(
    place: Path, tmp_path: Path, lambada: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The language task as the paper has it; after two steps nothing is Spanish, and `dpg verify` says so."""
    sets = [part for setting in (*SMALL, "credit.mode=expected") for part in ("--set", setting)]
    out = tmp_path / "run"
    code, _, errors = dpg(
        capsys, monkeypatch, "run", "language-rephrase", "--scale", "paper", "--generator", place / "llama", "--target",
        place / "llama", "--prompts", f"{place / 'articles.parquet'}:text", *sets, "--out", out,
    )  # fmt: skip
    assert code == 0, errors
    assert "two tokenisers" not in errors
    code, stdout, errors = dpg(capsys, monkeypatch, "verify", out, "--trainer", "plain", "--json")
    assert code == 4, errors
    verdict = json.loads(stdout)
    assert verdict["wanted"] == "es"
    assert verdict["data"]["well_formed"] is None
    assert re.search(r"not verified: [\d.]+% of its completions are es", errors)


def test_own_texts_and_refusals(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--eval-text takes a file; what does not go together is refused in one line."""
    (tmp_path / "spanish.jsonl").write_text(json.dumps({"text": "el gato pinta un barco rojo"}) + "\n")
    models = ("--generator", place / "llama", "--target", place / "gpt2", "--prompts", place / "articles.parquet")
    code, stdout, errors = dpg(
        capsys, monkeypatch, "run", "language-rephrase", "--scale", "paper", *models, "--eval-text", "spanish.jsonl",
        "--language", "fr", "--set", "prompts.holdout=0", "--dry-run", "--json",
    )  # fmt: skip
    assert code == 0, errors
    metric = json.loads(stdout)["config"]["metric"]
    assert (metric["file"], metric["language"]) == (str(tmp_path / "spanish.jsonl"), "fr")
    for arguments, words in (
        (("qr-embed", *models), "--set credit.mode=token"),
        (("qr-embed", "--eval-text", "spanish.jsonl"), "--eval-text is for the tasks language-rephrase"),
        (("qr-embed", "--device", "banana"), "Device 'banana' cannot be used: there is no such kind. Kinds: auto, cpu"),
        (
            ("qr-embed", "--generator", "some/model"),
            "it is not on this machine, and the hub cannot be reached (HF_HUB_OFFLINE",
        ),
        (("uuid-emit", "--scale", "paper", "--set", "metric.uuid=no-uuid"), "is no UUID"),
        (("qr-embed", "--prompts", "none.txt"), "Give --prompts tiny, prose, empty, a file (.txt,"),
        (("l2-shrink", "--scale", "paper", *models), "prompts.holdout = 256 leaves none to train on"),
    ):
        code, stdout, errors = dpg(capsys, monkeypatch, "run", *arguments)
        assert (code, stdout) == (2, ""), errors
        line = errors.splitlines()[-1]
        assert line.startswith("dpg: ")
        assert words in line
        assert len(line) < 300
    assert not (tmp_path / "runs").exists()


def test_check_measures_two_tokenisers(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dpg check` says how far the tokenisers agree, and measures on the text as the target reads it."""
    sets = [part for setting in SMALL for part in ("--set", setting)]
    code, stdout, errors = dpg(
        capsys, monkeypatch, "check", "l2-shrink", "--scale", "paper", "--generator", place / "llama", "--target",
        place / "gpt2", "--prompts", place / "articles.parquet", *sets, "--json",
    )  # fmt: skip
    assert code in (0, 3), errors
    findings = {finding["name"]: finding for finding in json.loads(stdout)["checks"]}
    assert findings["tokenisers"]["measured"]["shared"] is False
    assert 1 < findings["tokenisers"]["measured"]["tokens_ratio"] < 2
    assert findings["finite differences"]["verdict"] == "ok"


def test_presets_are_counted() -> None:
    names = [preset.name for preset in all_presets()]
    assert [name for name in names if name.endswith(".paper")] == sorted(f"{task}.paper" for task in TASKS)
    assert len(names) == len({*names})
