"""Runs that go on from a checkpoint: the credits of a whole run's later visits, finite differences, and the Trainer's own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from builders import VOCAB, HeldOutLoss, make_examples, make_target
from optimizers_table import OPTIMIZERS
from safetensors.torch import save_file
from test_fidelity import SEED, adamw, distance, mean_loss, without_dropout
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpg_cli.attribution.checkpoint import Checkpoint, read_checkpoint
from dpg_cli.cli.app import app
from dpg_cli.engine import Batches, Examples, Group, Groups, OptimizerSpec, Recipe, Schedule, Start, metagradient
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.errors import UsageError
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models.loading import load
from dpg_cli.settings.config import LoraConfig, TextLossOptions
from dpg_cli.tiny import world

METRIC = HeldOutLoss(make_examples(4, seed=9))
T, K = 8, 3  # steps of the whole run, and those before the checkpoint
WHOLE = LoraConfig()


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def recipe_of(optimizer: str) -> Recipe:
    groups = Groups((Group(("*mlp*",), lr=0.005),), ("biases", "norms"))
    batches = Batches(3, max_steps=T, order="shuffled", seed=2)
    return Recipe(OPTIMIZERS[optimizer].spec, Schedule("cosine", warmup=2), 0.5, groups, batches)


def stopped(recipe: Recipe, examples: Examples, step: int = K) -> tuple[nn.Module, Start]:
    """The model as the whole run has it before a step, and where the run is then."""
    model = make_target("gpt2", tied=True)
    with recipe.prepared(model):
        run = TargetRun(model, recipe.space(model), recipe.normalization, examples.ids_N_S.shape[1])
        theta = run.space.read(model)
        trace = inner_run(run, theta, examples, recipe, theta.new_ones(len(examples)))
        state = trace.steps[step].before
        named = {
            key: {name: view.clone() for name, view in run.space.views(vector.contiguous()).items()}
            for key, vector in state._asdict().items()
            if len(vector)
        }
        run.space.write(model, state.theta)
    return model, Start(step, named["m"], named.get("v", {}))


@pytest.mark.parametrize("optimizer", ["adamw-eps_root", "adam", "sgd-nesterov", "muon"])
def test_equals_the_later_visits_of_the_whole_run(optimizer: str) -> None:
    recipe, examples = recipe_of(optimizer), make_examples(8)
    model, start = stopped(recipe, examples)
    whole = metagradient(make_target("gpt2", tied=True), examples, recipe, METRIC, visits=True)
    assert whole.visits is not None
    later = whole.visits.step_M >= K
    assert 0 < int((~later).sum()) < len(later)
    for memory in ("keep", "sqrt", "offload"):
        warm = metagradient(model, examples, recipe, METRIC, visits=True, memory=memory, start=start)
        assert abs(warm.value - whole.value) < 1e-12
        assert warm.visits is not None
        assert torch.equal(warm.visits.step_M, whole.visits.step_M[later])
        assert torch.equal(warm.visits.example_M, whole.visits.example_M[later])
        assert relative(warm.visits.credit_M, whole.visits.credit_M[later]) < 1e-10
        sums = torch.zeros(8, dtype=torch.float64).index_add_(0, warm.visits.example_M, warm.visits.credit_M)
        assert relative(warm.example_N, sums) < 1e-10
        assert all(relative(warm.final[name], value) < 1e-12 for name, value in whole.final.items())
    assert relative(warm.example_N, whole.example_N) > 1e-3


def test_finite_differences_through_the_warm_start() -> None:
    recipe, examples = recipe_of("adamw-eps_root"), make_examples(8)
    model, start = stopped(recipe, examples)
    found = metagradient(model, examples, recipe, METRIC, start=start).example_N
    h, slopes = 1e-4, []
    for number in range(8):
        values = []
        for sign in (1, -1):
            weights = torch.ones(8, dtype=torch.float64)
            weights[number] += sign * h
            values.append(metagradient(model, examples, recipe, METRIC, weights_N=weights, start=start).value)
        slopes.append((values[0] - values[1]) / (2 * h))
    assert relative(found, torch.tensor(slopes, dtype=torch.float64)) < 1e-6


def test_a_start_that_does_not_fit_is_refused() -> None:
    recipe, examples = recipe_of("adamw-eps_root"), make_examples(8)
    model, start = stopped(recipe, examples)
    name = next(iter(start.m))
    for wrong, words in (
        (replace(start, step=T), "none is left to attribute"),
        (replace(start, m={"other": start.m[name]}), "'other'.*is not trained"),
        (replace(start, m={name: start.m[name][:1]}), "has the shape"),
        (replace(start, v={name: start.v[name] * float("nan")}), "not finite"),
    ):
        with pytest.raises(UsageError, match=words):
            metagradient(model, examples, recipe, METRIC, start=wrong)
    with pytest.raises(UsageError, match="sgd keeps none"):
        metagradient(model, examples, recipe_of("sgd"), METRIC, start=start)


ARGUMENTS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "warmup_steps": 2,
    "lr_scheduler_type": "cosine", "max_grad_norm": 0.7, "weight_decay": 0.3, "learning_rate": 1e-2, "seed": SEED,
}  # fmt: skip
RECIPE = Recipe(
    adamw(weight_decay=0.3), Schedule("cosine", warmup=2), 0.7, Groups(no_decay=("biases", "norms")),
    Batches(2, accumulation=2, epochs=3, order="shuffled", seed=SEED),
)  # fmt: skip
SGD = {**ARGUMENTS, "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.3}
OTHER = replace(RECIPE, optimizer=OptimizerSpec("sgd", lr=0.3, momentum=0.9, weight_decay=0.3))


def trained(
    model: nn.Module,
    examples: Examples,
    arguments: dict[str, Any],
    folder: Path,
    adapters: Any = None,
    resume: str = "",
) -> nn.Module:
    """The model after SFTTrainer, which saves after every fourth step; resumed from a checkpoint, where one is named."""
    trl = pytest.importorskip("trl")
    words = WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w0", pad_token="w0")
    rows = [
        {
            "input_ids": examples.ids_N_S[row, :length].tolist(),
            "labels": [-100, *examples.ids_N_S[row, 1:length].tolist()],
        }
        for row, length in enumerate(examples.attention_N_S.sum(1).tolist())
    ]
    config = trl.SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", save_steps=4, logging_steps=10**6, disable_tqdm=True,
        gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, **arguments,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        compute_loss_func=mean_loss, peft_config=adapters,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer.model


def continued(model: nn.Module, examples: Examples, recipe: Recipe, known: Checkpoint) -> dict[str, Tensor]:
    """The weights of our run from the checkpoint on."""
    result = metagradient(model, examples, recipe, lambda parameters, model: sum(p.sum() for p in parameters.values()),
                          start=known.start)  # fmt: skip
    assert float(result.example_N.abs().max()) > 0
    return result.final


@pytest.mark.parametrize(("arguments", "recipe"), [(ARGUMENTS, RECIPE), (SGD, OTHER)], ids=["adamw", "sgd"])
def test_goes_on_as_the_trainer_does(arguments: dict[str, Any], recipe: Recipe, tmp_path: Path) -> None:
    """float64: 9 steps in all, stopped after 4, the same weights in the end."""
    model, examples = without_dropout(make_target("gpt2", tied=True)), make_examples(10)
    first = trained(copy.deepcopy(model), examples, arguments, tmp_path / "first")
    folder = tmp_path / "first" / "checkpoint-4"
    resumed = trained(copy.deepcopy(model), examples, arguments, tmp_path / "second", resume=str(folder))
    ours = copy.deepcopy(model)
    known = read_checkpoint(folder, ours, recipe, len(recipe.plan(examples)), WHOLE)
    assert known.start.step == 4
    assert "4 of 9 steps are made" in known.note
    final = continued(ours, examples, recipe, known)
    assert distance(final, resumed, model) < 1e-10
    assert distance(final, first, model) < 1e-10
    fresh = metagradient(ours, examples, recipe, METRIC).final  # a fresh optimiser from the same weights goes elsewhere
    assert distance(fresh, resumed, model) > 1e-2


def test_adapters_go_on_as_the_trainer_s_do(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from dpg_cli.models.lora import Lora, adapt

    model, examples = without_dropout(make_target("llama", tied=True)), make_examples(10)
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4.0, target_modules="all-linear")
    arguments = {**ARGUMENTS, "learning_rate": 5e-2}
    theirs = trained(copy.deepcopy(model), examples, arguments, tmp_path / "first", adapters)
    folder = tmp_path / "first" / "checkpoint-4"
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, lr=5e-2))
    ours = adapt(copy.deepcopy(model), Lora(2, 4.0), SEED).eval()
    start = copy.deepcopy(ours)
    settings = LoraConfig(rank=2, alpha=4.0)
    known = read_checkpoint(folder, ours, recipe, len(recipe.plan(examples)), settings)
    final = continued(ours, examples, recipe, known)
    assert set(final) == {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert distance(final, theirs, start) < 1e-6  # PEFT keeps adapters in float32
    with pytest.raises(UsageError, match=r"lora.alpha is 4.0 there and 8.0 here"):
        read_checkpoint(folder, ours, recipe, 9, LoraConfig(rank=2, alpha=8.0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    trained(without_dropout(make_target("gpt2", tied=True)), make_examples(10), ARGUMENTS, folder)
    return folder / "checkpoint-4"


def test_what_does_not_map_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = make_target("gpt2", tied=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refusal(path: Path = checkpoint, recipe: Recipe = RECIPE, steps: int = 9, target: nn.Module = model) -> str:
        with pytest.raises(UsageError) as refused:
            read_checkpoint(path, target, recipe, steps, WHOLE)
        return str(refused.value)

    spec = RECIPE.optimizer
    assert "inner.eps is 1e-08 there and 0.001 here" in refusal(
        recipe=replace(RECIPE, optimizer=adamw(eps=1e-3, weight_decay=0.3))
    )
    assert "betas are (0.9, 0.999) there" in refusal(recipe=replace(RECIPE, optimizer=replace(spec, beta2=0.95)))
    assert "weight decay" in refusal(recipe=replace(RECIPE, groups=Groups()))
    assert "learning rate of step 4 is" in refusal(recipe=replace(RECIPE, schedule=Schedule("linear", warmup=2)))
    assert "its run has 9 steps in all, this recipe has 12" in refusal(steps=12)
    assert "none is left to attribute" in refusal(steps=4)
    assert "groups of 10, 18 parameters" in refusal(target=make_target("gpt2", tied=False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def damaged(name: str, content: bytes | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in checkpoint.iterdir():
            if file.name != name:
                (folder / file.name).symlink_to(file)
            elif content is not None:
                (folder / file.name).write_bytes(content)
        return folder

    assert "model.safetensors is no safetensors file" in refusal(damaged("model.safetensors", b"x" * 100))
    assert "trainer_state.json cannot be read" in refusal(damaged("trainer_state.json", None))

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.write_text, (tmp_path / "ran", "x"))

    torch.save({"state": {}, "param_groups": [Evil()]}, tmp_path / "evil.pt")
    said = refusal(damaged("optimizer.pt", (tmp_path / "evil.pt").read_bytes()))
    assert "more than tensors and plain values" in said
    assert not (tmp_path / "ran").exists()
    assert "is no checkpoint" in refusal(tmp_path / "nowhere")
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    saved["state"][3]["step"] = torch.tensor(3.0)
    torch.save(saved, tmp_path / "skipped.pt")
    other = tmp_path / "skipped"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).symlink_to(tmp_path / "skipped.pt" if file.name == "optimizer.pt" else file)
    assert "was updated 3 times by step 4" in refusal(other)


def test_a_file_of_one_s_own_loop(tmp_path: Path) -> None:
    recipe, examples = recipe_of("adamw-eps_root"), make_examples(8)
    stopped_model, start = stopped(recipe, examples)
    path = tmp_path / "mine.safetensors"
    parts = {"weights": dict(stopped_model.named_parameters()), "m": start.m, "v": start.v}
    tensors = {
        f"{part}/{name}": tensor.detach().contiguous() for part, own in parts.items() for name, tensor in own.items()
    }
    save_file(tensors, path, {"step": str(K)})
    model = make_target("gpt2", tied=True)
    known = read_checkpoint(path, model, recipe, T, WHOLE)
    whole = metagradient(stopped_model, examples, recipe, METRIC, start=start)
    assert torch.equal(metagradient(model, examples, recipe, METRIC, start=known.start).example_N, whole.example_N)
    save_file(tensors, path)
    with pytest.raises(UsageError, match="does not say its step"):
        read_checkpoint(path, model, recipe, T, WHOLE)
    save_file({**tensors, "w": torch.zeros(1)}, path, {"step": "3"})
    with pytest.raises(UsageError, match="has a tensor 'w'"):
        read_checkpoint(path, model, recipe, T, WHOLE)
    save_file({name: tensor for name, tensor in tensors.items() if "wpe" not in name}, path, {"step": "3"})
    with pytest.raises(UsageError, match=r"lacks the weights 'transformer.wpe.weight'"):
        read_checkpoint(path, model, recipe, T, WHOLE)


def test_at_the_command_line(tmp_path: Path) -> None:
    """12 steps of two sentences in order, 6 of them made: the first 12 sentences have no part in the scores."""
    data, out, path = tmp_path / "data.txt", tmp_path / "scores.jsonl", tmp_path / "mine.safetensors"
    data.write_text("\n".join(world.sentences("train", "es", 24, seed=3)), encoding="utf-8")
    target = load("tiny", device=torch.device("cpu")).model
    save_file({f"weights/{name}": p.detach().clone() for name, p in target.named_parameters()}, path, {"step": "6"})
    answer = CliRunner().invoke(
        app,
        ["attribute", str(data), "--language", "es", "--set", "metric.documents=2", "--batch-size", "2", "--out", str(out),
         "--set", "inner.order=given", "--from-checkpoint", str(path), "--json", "--memory", "sqrt"],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert "6 of 12 steps are made" in answer.stderr
    assert json.loads(answer.stdout)["inner_steps"] == 6
    scores = torch.tensor([json.loads(line)["score"] for line in out.read_text(encoding="utf-8").splitlines()])
    assert scores.shape == (24,)
    assert bool((scores[:12] == 0).all()) and bool((scores[12:] != 0).all())
    record = json.loads((tmp_path / "scores.jsonl.json").read_text(encoding="utf-8"))
    assert (record["first_step"], record["inner_steps"]) == (6, 6)
    assert len(record["fingerprint"]["checkpoint"]) == 64


def test_a_run_of_trl_by_its_own_files(tmp_path: Path) -> None:
    """The embedded model trained by SFTTrainer; the arguments that it saved and its checkpoint are all that is given."""
    trl = pytest.importorskip("trl")
    data, out = tmp_path / "data.jsonl", tmp_path / "scores.parquet"
    texts = world.sentences("train", "es", 16, seed=3)
    rows = [{"prompt": text[:20], "completion": text[20:]} for text in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tiny = load("tiny", device=torch.device("cpu"))
    config = trl.SFTConfig(
        str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", save_steps=3, per_device_train_batch_size=4,
        num_train_epochs=2, learning_rate=1e-3, adam_epsilon=1e-4, weight_decay=0.1, max_length=64, disable_tqdm=True,
    )  # fmt: skip
    dataset = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(tiny.model, config, train_dataset=dataset, processing_class=tiny.tokenizer)
    trainer.train()
    (tmp_path / "recipe.json").write_text(config.to_json_string(), encoding="utf-8")
    given = ["--recipe", str(tmp_path / "recipe.json"), "--from-checkpoint", str(tmp_path / "run" / "checkpoint-3")]
    answer = CliRunner().invoke(
        app,
        [
            "attribute",
            str(data),
            "--language",
            "es",
            "--set",
            "metric.documents=4",
            "--out",
            str(out),
            "--json",
            *given,
        ],
    )
    assert answer.exit_code == 0, answer.output + str(answer.exception)
    assert "3 of 8 steps are made" in answer.stderr
    report = json.loads(answer.stdout)
    metric = build_metric(
        TextLossOptions(name="text-loss", language="es", documents=4), replace(tiny, model=trainer.model)
    )
    with torch.no_grad():
        expected = float(metric(dict(trainer.model.named_parameters()), trainer.model))
    assert report["inner_steps"] == 5
    assert abs(report["value"] - expected) < 1e-3 * abs(report["value"] - report["value_before"])
    answer = CliRunner().invoke(
        app, ["attribute", str(data), "--language", "es", "--out", str(out), "--overwrite", *given, "--lr", "2e-3"]
    )
    assert "the learning rate of" in str(answer.exception) and "0.001 there and 0.002 here" in str(answer.exception)
