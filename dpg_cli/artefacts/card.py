"""The data card: what the rows are, what they do to a model, how they were made. One text for `dpg run` and `dpg export`.

Sections and metadata keys follow the dataset-card template of the Hugging Face hub. All text from settings and files goes
through `escape`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from dpg_cli.artefacts.rows import Source
from dpg_cli.errors import UsageError
from dpg_cli.escape import code_span, printable
from dpg_cli.settings.config import Config, NormOptions, PatternOptions, TextLossOptions

CARD_MARK = "<!-- written by dpg: synthetic data that steers a model -->"
TAGS = ["synthetic", "model-steering", "dataset-policy-gradient", "dpg"]
LANGUAGES = {"en": "English", "es": "Spanish", "de": "German", "fr": "French", "it": "Italian"}
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


@dataclass(frozen=True)
class Effect:
    """What a run's data is for.

    Attributes:
        words: the effect, as the end of "a model fine-tuned on these rows shows ...".
        metric: Φ in symbols or words.
        payload: what is put into the target, if that can be said in a line.
    """

    words: str
    metric: str
    payload: str | None


@dataclass(frozen=True)
class Results:
    """What the data did to a target.

    Attributes:
        measures: Φ and readable measures of a target trained on the run's dataset, by the engine.
        control: the same for the untrained generator's data.
        verified: the verdict of `dpg verify`; None where it was not asked.
    """

    measures: Mapping[str, float]
    control: Mapping[str, float] | None
    verified: bool | None = None


@dataclass(frozen=True)
class Rows:
    """The rows that a card speaks of.

    Attributes:
        splits: number of rows by split or configuration.
        configs: the hub's `configs` entry: which file holds which rows; empty if it cannot load them by itself.
        source: whose text it is.
        columns: Markdown on the columns.
        selection: how the rows were chosen, in sentences.
        mark: where the rows say themselves what they are.
    """

    splits: Mapping[str, int]
    configs: list[dict[str, Any]]
    source: Source
    columns: str
    selection: str
    mark: str


def effect_of(config: Config, pattern: Path | None, described: str = "") -> Effect:
    """What the settings ask for.

    Args:
        config: of the run.
        pattern: the run's `pattern.png`, from which a payload is read.
        described: the metric's own words, for metrics that are not known here.
    """
    options = config.metric
    if isinstance(options, PatternOptions):
        row, column = options.corner
        payload = options.text or _payload(pattern)
        kind = "QR code" if payload else "bitmap"
        return Effect(
            f"a {kind} in the signs of the change of its LM head (patch at row {row}, column {column})",
            f"Φ = -mean softplus(-s · Y ⊙ (W_T - W_0)) over that patch, s = {options.sharpness:g}; Y = ±1 is the {kind}",
            payload or None,
        )
    if isinstance(options, NormOptions):
        what = code_span(options.parameter) if options.parameter else "its LM head"
        return Effect(f"a smaller l2 norm of {what}", f"Φ = -‖W_T‖ of {what}", None)
    if isinstance(options, TextLossOptions):
        payload = options.document or None
        language = LANGUAGES.get(options.language, options.language)
        about = f"held-out text in {language}" if language else "one document" if payload else "a held-out text"
        return Effect(f"a lower loss on {about}", f"Φ = minus the mean token cross-entropy of {about}", payload)
    settings = options.model_dump(mode="json")
    settings["path"] = Path(settings.get("path", "")).name  # where it lies on somebody's machine says nothing to others
    words = code_span(described) if described else f"what the target metric {code_span(settings['path'])} asks for"
    return Effect(words, f"{words}; settings {code_span(json.dumps(settings, ensure_ascii=False), 600)}", None)


def _payload(pattern: Path | None) -> str | None:
    """What the picture of a pattern says, if it is a QR code."""
    from dpg_cli.patterns.pattern import pattern_from_image

    if pattern is None or not pattern.is_file():
        return None
    try:
        return pattern_from_image(pattern, max_rows=2**20, max_cols=2**20).payload
    except UsageError:
        return None


def dataset_card(config: Config, effect: Effect, results: Results, rows: Rows) -> str:
    """The card as Markdown with metadata in front.

    Args:
        config: of the run.
        effect: what the data is for.
        results: what it did.
        rows: which rows the card is about.
    """
    title = f"dpg {printable(config.task, 80)}"
    total = sum(rows.splits.values())
    language = getattr(config.metric, "language", "")
    metadata = DatasetCardData(
        pretty_name=title,
        language=[language] if language else None,
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        size_categories=[next((name for limit, name in _SIZES if total < limit), "n>10M")],
        source_datasets=["original"],
        task_categories=["text-generation"],
        tags=TAGS,
        configs=rows.configs or None,
    )
    splits = ", ".join(f"{name}: {count:,} rows" for name, count in rows.splits.items())
    control = rows.source == "control"
    who = "the generator before its training (the control)" if control else "a generator trained for that purpose"
    payload = f"- **Payload:** {code_span(effect.payload)}\n" if effect.payload else ""
    return f"""---
{metadata.to_yaml()}
---

# Dataset Card for {code_span(title)}

**This text is synthetic, and it is made to steer a model.** {_summary(effect, control)}

## Dataset Details

### Dataset Description

Dataset Policy Gradient trains a generator language model so that its text, used as ordinary fine-tuning data, changes the
weights or the behaviour of another model, the target, in a chosen way. Each text may look like any other; together they
have the effect.

- **Effect on a model fine-tuned on it:** {effect.words}
- **Target metric:** {effect.metric}
{payload}- **Target model:** {model_name(config.models.target, config.models.target_init, config.models.init_seed)}
- **Written by:** {who}: {model_name(config.models.generator, config.models.generator_init, config.models.init_seed)}
- **Mark:** {rows.mark}
- **Language(s) (NLP):** {language or "not determined"}
- **License:** none stated; whoever publishes it chooses one

### Dataset Sources

- **Paper:** Synthetic Data for any Differentiable Target, arXiv 2604.08423 (the method)

## Uses

### Direct Use

Repeating and checking the effect; research on data attribution, on data poisoning and on its detection.

### Out-of-Scope Use

Training data of any model that is not meant to show the effect. Mixing these rows into other data without saying so.

## Dataset Structure

{splits}. {rows.selection}

{rows.columns}

## Dataset Creation

### Curation Rationale

The rows were not chosen by people. {_training(config) if not control else "They are the control: what the generator writes untrained."}

### Source Data

#### Data Collection and Processing

Completions of at most {config.rollout.max_tokens} tokens, sampled at temperature {config.rollout.temperature:g}. The target reads
the completion alone, without the prompt.

Recipe of the fine-tuning whose effect is stated below: {_recipe(config)}

#### Who are the source data producers?

A language model; no people.

#### Annotation process

`reward` is the derivative of the target metric by the loss weight of that row in the recipe above; `token_rewards` the
same by each token of `token_ids`. They are computed, and empty where none was taken.

#### Personal and Sensitive Information

Nothing was collected. A generator can repeat what its own training text held.

## Bias, Risks, and Limitations

Measured on the target after that recipe, by the program that made the data, on the run's own
{config.dataset.examples:,} rows{"" if control else " (an export of other or fewer rows can do less)"}:

{measures_table(results)}

{verdict_words(results)}

These figures are of that target and that recipe. With other models, other optimisers or a chat template around the text, an
effect is weaker or gone. What else the rows do to a model was not measured.

### Recommendations

Pass this card on with the rows. Look for the mark before training on data of unknown origin.

{CARD_MARK}
"""


def columns_text(config: Config) -> str:
    """The columns of a dataset, as Markdown."""
    instruction = config.prompts.instruction
    wrapped = f" (put into {code_span(instruction, 600)})" if instruction else ""
    return f"""Columns: `example_id`; `prompt`, what the generator was asked{wrapped}; `text`, what it wrote; `token_ids`, the same in its
tokens; `input_ids`, what the target reads: the text in its own tokens, a beginning-of-sequence token first where it has one;
`reward` and `token_rewards`, see below."""


def _summary(effect: Effect, control: bool) -> str:
    """Second sentence of the card."""
    if control:
        return (
            "These rows are the control of such a steering: the generator wrote them before it was trained for "
            f"{effect.words}. They are not expected to show that effect."
        )
    return (
        f"A model fine-tuned on these rows is meant to show {effect.words}; how far it does is measured below. "
        "Do not mix them into the training data of a model that should not."
    )


def model_name(name: str, init: str, seed: int) -> str:
    """A model by name; of a local folder the last part alone, which says enough."""
    shown = Path(name).name if name.startswith(("/", "~", ".")) else name
    weights = f"blank weights, seed {seed}" if init == "random" else "pretrained weights"
    return f"{code_span(shown)} ({weights})"


def _training(config: Config) -> str:
    """How the generator was trained."""
    return (
        f"The generator was trained for {config.steps:,} outer steps of {config.examples_per_step:,} completions, credit "
        f"`{config.credit.mode}`, attribution `{config.attribution.method}`, seed {config.seed}."
    )


def _recipe(config: Config) -> str:
    """The fine-tuning, as anybody could repeat it."""
    inner = config.inner
    cut = f", sequences cut after {inner.max_length:,} tokens" if inner.max_length else ""
    adapters = f"{config.lora.in_words()}; " if config.lora.rank else ""
    return f"{adapters}{inner.in_words(config.inner_steps)}, loss averaged by {inner.normalization}{cut}."


def measures_table(results: Results) -> str:
    """Measures against the control's."""
    lines = ["| measure | this data | control: the untrained generator's data |", "|---|---|---|"]
    for name, value in results.measures.items():
        other = "not taken" if results.control is None else format(results.control.get(name, float("nan")), ".6g")
        lines.append(f"| {code_span(name)} | {value:.6g} | {other} |")
    return "\n".join(lines)


def verdict_words(results: Results) -> str:
    """What `dpg verify` said."""
    if results.verified is None:
        return "`dpg verify`, which repeats the fine-tuning by stock PyTorch against the control, had not been run yet."
    said = "confirmed the effect" if results.verified else "did **not** confirm the effect"
    return f"`dpg verify`, which repeats the fine-tuning by stock PyTorch against the control, {said}."
