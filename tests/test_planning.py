"""Plans for cards that are not at hand: sizes from shapes, operations as counted, refusals before anything is loaded, the `gpu` presets."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpg_cli.driver.build import build
from dpg_cli.engine import loop
from dpg_cli.errors import UsageError
from dpg_cli.models.loading import load, untie_head
from dpg_cli.models.lora import Lora, adapt
from dpg_cli.planning.asked import KAPPA, asked
from dpg_cli.planning.cards import CARDS, FREE, card_of
from dpg_cli.planning.job import Size, job_of
from dpg_cli.planning.outlook import outlook
from dpg_cli.planning.scaling import operations, predict
from dpg_cli.planning.shapes import size_of
from dpg_cli.settings.presets import all_presets, find, resolve

GPU = ("qr-embed", "pattern-67", "l2-shrink", "language-rephrase", "uuid-emit")
GPT2 = size_of("openai-community/gpt2", untied=True)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("openai-community/gpt2", 124_439_808),
        ("openai-community/gpt2-medium", 354_823_168),
        ("openai-community/gpt2-large", 774_030_080),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
    ],
)
def test_shapes_of_the_table_are_the_published_models(name: str, parameters: int) -> None:
    assert size_of(name).parameters == parameters


def test_a_size_from_its_shape_is_that_of_the_loaded_model() -> None:
    for name in ("prose", "prose-reader"):
        model = load(name, device=torch.device("cpu"))
        assert size_of(name) == Size.of(model)
        untie_head(model.model)
        assert size_of(name, untied=True) == Size.of(model) == size_of(name).untied()
        adapted = replace(model, model=adapt(model.model, Lora(2, 16.0, ("all-linear",)), 0))  # type: ignore[arg-type]
        assert size_of(name, untied=True, lora=Lora(2, 16.0, ("all-linear",))) == Size.of(adapted)


def test_a_model_of_unknown_shape_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"is not known: its config\.json is not on this machine"):
        size_of("nobody/nothing")


@pytest.mark.parametrize("name", ["h100", "NVIDIA H100", "RTX 4090", "nvidia rtx-4090", "L40S"])
def test_cards_are_known_however_they_are_written(name: str) -> None:
    assert card_of(name).name in name.upper()


def test_operations_of_a_natural_step_on_the_head_are_those_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage by stage; attention, which the model leaves out, is small at 32 tokens."""
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, *rest, **kw: 2 * left[0] * left[1] * right[1]}
    counted: dict[str, float] = {}

    def count(name: str, stage: str) -> None:
        original = getattr(loop, name)

        def counting(*arguments: object, **named: object) -> object:
            with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
                result = original(*arguments, **named)
            counted[stage] = counted.get(stage, 0) + counter.get_total_flops()
            return result

        monkeypatch.setattr(loop, name, counting)

    for name, stage in (
        ("sample", "rollout"), ("labels_of", "contexts"), ("tell_noise", "contexts"), ("attribute_examples", "metagradient"),
        ("improve", "policy"),
    ):  # fmt: skip
        count(name, stage)
    for preset, sets in (
        ("l2-shrink.prose", ["inner.batch_size=64"]),
        ("l2-shrink.prose", ["inner.batch_size=16"]),
        ("qr-embed.prose", ["inner.batch_size=64", "policy.fisher_tokens=512"]),
    ):
        config = resolve(find(preset).data(), ["models.dtype=float64", "prompts.per_step=64", *sets])
        built = build(config)
        loop.outer_step(built.players, built.spec, built.prompts.at(0), 0)  # with the self-check of the engine
        counted.clear()
        report = loop.outer_step(built.players, built.spec, built.prompts.at(1), 1)
        job = job_of(config, Size.of(built.players.generator), Size.of(built.players.target), 1)
        job = replace(job, products=int(report.numbers["policy_iterations"]))
        work = operations(job)
        predicted = {**work, "metagradient": work["inner run"] + work["reverse"]}
        if (
            preset == "qr-embed.prose"
        ):  # a pattern's step begins at a solve within the patch, which at this size is a tenth
            assert predicted["policy"] < counted.pop("policy") < 1.3 * predicted["policy"]
        for stage, flops in counted.items():
            assert predicted[stage] == pytest.approx(flops, rel=0.12), (preset, sets, stage)


@pytest.mark.parametrize("task", GPU)
def test_a_gpu_preset_says_what_the_law_asks_as_the_code_computes_it(task: str) -> None:
    preset = find(f"{task}.gpu")
    config = resolve(preset.data(), [])
    size = size_of(config.models.target)
    head = preset.path.read_text(encoding="utf-8").partition("\ntask =")[0]
    for sentence in asked(config, size.vocabulary, size.width).line().replace(" The law", "\nThe law").split("\n"):
        assert f"# {sentence}" in head
    paper = resolve(find(f"{task}.paper").data(), [])
    assert 10 * config.steps * config.examples_per_step < paper.steps * paper.examples_per_step
    assert (config.scale, config.trainer) == ("gpu", "dpg")


def test_the_laws_demand_for_a_qr_code() -> None:
    """z² · pixels · κ / 2N by hand; and beyond the budget it is said to be."""
    config = resolve(find("qr-embed.gpu").data(), [])
    assert asked(config).nats == pytest.approx(4.5**2 * 441 * KAPPA / (2 * 32_768 * 128), rel=1e-12)
    assert asked(config).nats < config.policy.kl_budget


def test_scale_gpu_is_there_for_every_task() -> None:
    found = [preset.name for preset in all_presets() if preset.scale == "gpu"]
    assert found == sorted(f"{task}.gpu" for task in (*GPU, "subliminal-trait"))


@pytest.mark.parametrize("task", (*GPU, "subliminal-trait"))
def test_every_gpu_preset_fits_a_card_of_48_gb(task: str) -> None:
    found = outlook(resolve(find(f"{task}.gpu").data(), []), "L40S")
    assert 0 < found.bytes < FREE * CARDS["L40S"].memory
    assert 0 < found.hours < 12  # a night
    assert found.as_dict()["phases"].keys() == {"rollout", "contexts", "metagradient", "policy", "dataset"}
    assert found.as_text().count("assumed") == 1


def test_what_grows_with_what() -> None:
    """A faster card is no slower, fewer rows at once take no more, credits of labels are not held by natural steps and are
    kept in factors by others: two hidden states a token, and two heads."""
    config = resolve(find("qr-embed.gpu").data(), [])
    slow, fast = outlook(config, "A100"), outlook(config, "H100")
    assert fast.hours < slow.hours
    job = job_of(config, GPT2, GPT2, 1)
    device = CARDS["H100"].device()
    narrow = predict(replace(job, at_once=64), device)
    assert narrow.bytes_by_phase["rollout"] < predict(job, device).bytes_by_phase["rollout"]
    without, held = (predict(replace(job, labels=labels), device).bytes_by_part["labels"] for labels in (False, True))
    tokens = job.examples * job.target_tokens
    assert held - without == 4 * 2 * 768 * (tokens + job.inner_steps * 50_257)
    few = replace(job, target_tokens=1)
    without, held = (predict(replace(few, labels=labels), device).bytes_by_part["labels"] for labels in (False, True))
    assert held - without == 4 * few.examples * 50_257 < 4 * (1 << 26)
    leaner = predict(replace(job, step="adamw", moves="all", checkpointing=True), device)
    assert (
        leaner.bytes_by_part["policy"]
        < predict(replace(job, step="adamw", moves="all"), device).bytes_by_part["policy"]
    )


def test_too_little_memory_names_a_change_that_fits() -> None:
    config = resolve(find("uuid-emit.gpu").data(), ["inner.micro_batch=64"])
    with pytest.raises(UsageError, match=r"needs about \d+ GB in the \w+, and the 4090 has 24") as refused:
        outlook(config, "4090")
    remedy = refused.value.remedy
    assert remedy.startswith("--set inner.micro_batch=4 takes ")
    assert outlook(
        resolve(config.model_dump(mode="json"), ["inner.micro_batch=4"]), "4090"
    ).bytes / 1e9 == pytest.approx(float(remedy.split()[-2]), abs=0.06)


WATCHED = """
import sys
def refuse(*arguments, **named):
    raise SystemExit("something was loaded")
import transformers, torch
transformers.PreTrainedModel.from_pretrained = classmethod(refuse)
transformers.AutoTokenizer.from_pretrained = refuse
from dpg_cli.cli import main
sys.argv = ["dpg", *sys.argv[1:]]
main()
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`dpg run` in a process in which no model and no tokeniser can be loaded."""
    return subprocess.run([sys.executable, "-c", WATCHED, "run", *arguments], capture_output=True, text=True)


def test_the_command_loads_nothing_and_refuses_in_one_line() -> None:
    shown = command("qr-embed", "--scale", "gpu", "--card", "H100", "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)["outlook"]
    assert found["card"] == "H100" and found["hours"] > 0 and found["law"]["paper"] == 23_592_960
    for arguments, words in (
        (("qr-embed", "--scale", "gpu", "--card", "B300", "--dry-run"), "No card 'B300' is known. "),
        (("qr-embed", "--scale", "paper", "--card", "4090", "--dry-run"), "GB in the dataset, and the 4090 has 24"),
        (("qr-embed", "--scale", "gpu", "--card", "H100"), "--card predicts and runs nothing. Add --dry-run"),
    ):
        refused = command(*arguments)
        assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
        assert refused.stderr.count("\n") == 1 and words in refused.stderr
