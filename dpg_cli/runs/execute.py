"""A whole run: settings -> models and metric -> outer steps -> artefacts in the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dpg_cli.config import Config
from dpg_cli.engine.loop import StepReport, train
from dpg_cli.metrics.base import Pictured
from dpg_cli.metrics.pattern import PatternMetric
from dpg_cli.models import LanguageModel, load_generator, quiet_transformers
from dpg_cli.render import pattern_image, save_png
from dpg_cli.report import write_report
from dpg_cli.runs.build import Built, build
from dpg_cli.runs.dataset import Synthetic, draw, measure, write_card, write_parquet
from dpg_cli.runs.fluency import fluency
from dpg_cli.runs.folder import RunFolder, environment, peak_memory_mb, replacing, write_json
from dpg_cli.runs.tracking import Trackers


@dataclass(frozen=True)
class Outcome:
    """What a finished run reports.

    Attributes:
        measures: Φ and readable measures of a target trained on the final dataset.
        control: the same for the untrained generator's data, or None.
        seconds: of the whole run.
        peak_memory_mb: peak resident memory of the process.
    """

    measures: dict[str, float]
    control: dict[str, float] | None
    seconds: float
    peak_memory_mb: float | None


def execute(
    config: Config,
    folder: RunFolder,
    *,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_built: Callable[[Built], None] = lambda built: None,
    command: list[str] | None = None,
    trackers: Trackers | None = None,
) -> Outcome:
    """Run DPG and write every artefact of DESIGN §6.

    Args:
        config: the settings.
        folder: a free run folder; made once the settings have proved good.
        on_step: called after each outer step.
        on_stage: called with the name of each stage that begins.
        on_built: called once models and metric stand.
        command: the command line, for `run.json`.
        trackers: told of every outer step and of the outcome; opened here, closed by the caller.

    Raises:
        DpgError: for bad settings, or a training that became degenerate.
    """
    started = time.perf_counter()
    on_stage("loading models")
    torch.manual_seed(config.seed)
    built = build(config)
    on_built(built)
    folder.make()  # only now: what is refused above leaves nothing behind
    folder.write_config(config)
    if isinstance(built.players.metric, PatternMetric):
        save_png(pattern_image(built.players.metric.pattern), folder.pattern)
    info = environment(config, str(built.device), command or [])
    info["effect"] = built.players.metric.describe()
    write_json(folder.info, info)

    trackers = trackers or Trackers([])
    trackers.open(folder.path, config.model_dump(mode="json"))

    def log(report: StepReport) -> None:
        fluent = fluency(config, report.rollout, built.players.generator.tokenizer)
        report = replace(report, numbers={**report.numbers, **fluent})
        folder.append_metrics(report.numbers)
        trackers.log(report.numbers)
        on_step(report)

    on_stage("training the generator")
    train(built.players, built.spec, built.prompts.at, log)
    info["seconds_training"] = round(time.perf_counter() - started, 2)

    on_stage("writing the dataset")
    synthetic, control = final_data(config, built, folder)
    write_model(folder.generator, built.players.generator)
    on_stage("writing the target")
    write_target(folder, built, synthetic)

    outcome = Outcome(
        measures={"phi": synthetic.result.value, **synthetic.result.measures},
        control=None if control is None else {"phi": control.result.value, **control.result.measures},
        seconds=time.perf_counter() - started,
        peak_memory_mb=peak_memory_mb(),
    )
    info |= {
        "finished": True,
        "seconds": round(outcome.seconds, 2),
        "peak_memory_mb": outcome.peak_memory_mb,
        "measures": outcome.measures,
        "control": outcome.control,
    }
    write_json(folder.info, info)
    trackers.result(outcome.measures, outcome.control)
    try:
        write_report(folder)
    except (
        Exception
    ) as error:  # hours of work are safe on disk: whatever is wrong with the page must not end in a traceback
        on_stage(f"the report could not be written ({error}); try: dpg report {folder.path}")
    return outcome


def final_data(config: Config, built: Built, folder: RunFolder) -> tuple[Synthetic, Synthetic | None]:
    """Sample, attribute and write the final dataset and, if asked for, the untrained generator's."""
    players, spec, size = built.players, built.spec, config.dataset.examples
    folder.dataset.mkdir(exist_ok=True)
    rollout = draw(players.generator, spec, built.prompts, size, config.steps, config.seed + 2)
    synthetic = measure(players, spec, rollout, config.inner_steps)
    write_parquet(folder.dataset / "train.parquet", rollout, players.generator, players.target, synthetic.result)
    control = None
    if config.dataset.control:
        untrained = load_generator(config.models, built.device)
        rollout = draw(untrained, spec, built.prompts, size, config.steps, config.seed + 2)
        control = measure(players, spec, rollout, config.inner_steps)
        write_parquet(folder.dataset / "control.parquet", rollout, untrained, players.target, None)
    write_card(
        folder.dataset / "README.md",
        config,
        players.metric.describe(),
        {"phi": synthetic.result.value, **synthetic.result.measures},
        None if control is None else {"phi": control.result.value, **control.result.measures},
    )
    return synthetic, control


def write_model(path: Path, language_model: LanguageModel) -> None:
    """Save model and tokeniser so that AutoModelForCausalLM and AutoTokenizer load them."""
    with quiet_transformers(), replacing(path) as temporary:
        language_model.model.save_pretrained(temporary)
        language_model.tokenizer.save_pretrained(temporary)


def write_target(folder: RunFolder, built: Built, synthetic: Synthetic) -> None:
    """Save the fine-tuned target, the patch before and after, and its picture."""
    target, metric = built.players.target, built.players.metric
    final = synthetic.result.final
    before = {name: parameter.detach().clone() for name, parameter in target.model.named_parameters()}
    assign_parameters(target.model, final)
    write_model(folder.target, target)
    assign_parameters(target.model, before)
    if isinstance(metric, Pictured):
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in metric.tensors(final).items()}
        save_file(tensors, folder.target / "patch.safetensors")
        save_png(metric.picture(final), folder.image)


@torch.no_grad()
def assign_parameters(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copy values into a model's parameters by name."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)
