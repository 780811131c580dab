"""From a metric's options to the metric: the one place that knows them all."""

from __future__ import annotations

from pathlib import Path

from dpg_cli import prose
from dpg_cli.data.harness import PREFIX, task_documents
from dpg_cli.data.sources import open_texts
from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.metrics.norm import NormMetric
from dpg_cli.metrics.pattern import PatternMetric
from dpg_cli.metrics.text_loss import TextLossMetric
from dpg_cli.metrics.trial import build_custom
from dpg_cli.models.loading import LanguageModel
from dpg_cli.patterns.pattern import Pattern, pattern_from_image, pattern_from_rows, pattern_from_text
from dpg_cli.settings.config import FRESH, CustomOptions, MetricOptions, NormOptions, PatternOptions, TextLossOptions
from dpg_cli.tiny import world

KEYS = ("text", "prompt")  # columns of held-out texts to look for where a source names none


def build_metric(options: MetricOptions, target: LanguageModel, named: str | None = None) -> TargetMetric:
    """The metric that the options describe.

    Args:
        options: of the settings.
        target: before fine-tuning.
        named: what the user gave as --metric; without it no file of a custom metric is run.

    Raises:
        UsageError: if what the options name is not there or does not fit.
    """
    if isinstance(options, PatternOptions):
        pattern = make_pattern(options, (target.head.shape[0], target.head.shape[1]))
        return PatternMetric(target.model, pattern, options.sharpness, options.corner, options.margin)
    if isinstance(options, NormOptions):
        return NormMetric(target.model, options.parameter)
    if isinstance(options, CustomOptions):
        return build_custom(options, target, named)
    texts, about = held_out(options)
    return TextLossMetric(target.model, encode(texts, target), about)


def make_pattern(options: PatternOptions, head: tuple[int, int]) -> Pattern:
    """The pattern of the settings, from its picture, its text or its rows.

    Args:
        options: of the metric.
        head: shape of the target's LM head.
    """
    if options.image:
        return pattern_from_image(Path(options.image), max_rows=head[0], max_cols=head[1])
    if options.rows:
        return pattern_from_rows(options.rows)
    if not options.text:
        raise UsageError(
            "There is nothing to embed: neither an image nor a text is given.", "Give --image FILE or --text '...'."
        )
    return pattern_from_text(options.text, version=options.version, error_correction=options.error_correction)


def held_out(options: TextLossOptions) -> tuple[list[str], str]:
    """The documents of a text-loss metric, and what they are in words.

    Raises:
        UsageError: if they cannot be read, or a fresh UUID has not been drawn yet.
    """
    if options.uuid == FRESH:
        raise UsageError("metric.uuid = 'fresh' stands for no UUID yet.", "`dpg run` draws one; or give it.")
    if options.document:
        return [options.document], f"the document {options.document[:60]!r}"
    if not options.file:
        texts = world.sentences("eval", options.language, options.documents, seed=1)
        return texts, f"{len(texts)} held-out sentences ({options.language})"
    if options.file == "prose":
        texts = prose.heldout(min(options.documents, len(prose.heldout())))
        return texts, f"{len(texts)} held-out passages of prose"
    source = options.file.replace("{language}", options.language)
    if source.startswith(PREFIX):
        texts = task_documents(source.removeprefix(PREFIX), options.documents)
    else:
        pool = open_texts(source, KEYS, split="test", what="texts", flag="--eval-text", limit=options.documents)
        texts = [text for text in pool if text.strip()]
    if not texts:
        raise UsageError(f"The texts {source} are all blank.", "Give at least one document.")
    return texts, f"{len(texts)} documents of {source.rstrip('/').rpartition('/')[2]}"


def encode(texts: list[str], target: LanguageModel) -> Examples:
    """Documents as the target reads them: beginning-of-sequence token where it has one, text, end of sequence.

    Raises:
        UsageError: if a document is longer than the target's context.
    """
    bos = [] if target.bos_id is None else [target.bos_id]
    rows = [[*bos, *target.tokenizer(text, add_special_tokens=False)["input_ids"], target.eos_id] for text in texts]
    limit = target.context
    longest = max(len(row) for row in rows)
    if limit is not None and longest > limit:
        raise UsageError(
            f"A held-out document has {longest} tokens; the target {target.name!r} reads {limit}.", "Give shorter ones."
        )
    return Examples.from_sequences(rows).to(target.head.device)
