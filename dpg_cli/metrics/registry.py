"""From a metric's options to the metric: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpg_cli import prose
from dpg_cli.data.examples import Encoding, RowEncoder
from dpg_cli.data.harness import PREFIX, task_documents
from dpg_cli.data.prepared import Prepared, gather, gathered_items, prepare
from dpg_cli.data.shapes import Text, trained_text
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

HELD_OUT = {"split": "test", "what": "texts", "flag": "--eval-text"}


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
        return PatternMetric(
            target.model, pattern, options.sharpness, options.corner, options.margin, options.aim == "moments"
        )
    if isinstance(options, NormOptions):
        return NormMetric(target.model, options.parameter)
    if isinstance(options, CustomOptions):
        return build_custom(options, target, named)
    return text_loss(options, target)


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


def text_loss(options: TextLossOptions, target: LanguageModel) -> TextLossMetric:
    """The metric of held-out documents: the user's own as stock fine-tuning reads them, others after a beginning of sequence.

    Raises:
        UsageError: if they cannot be read, have nothing that counts, or are longer than the target's context.
    """
    if options.file in ("", "prose"):
        texts, about = held_out(options)
        return TextLossMetric(target.model, encode(texts, target), about)
    source, encoder = _source(options), RowEncoder(target)
    if source.startswith(PREFIX):
        items = [Text(text) for text in task_documents(source.removeprefix(PREFIX), options.documents)]
        gathered = gathered_items(items, source)
    else:
        gathered = gather(source, limit=options.documents, **HELD_OUT)
    found = prepare(gathered, encoder)
    require_room(found, target)
    metric = TextLossMetric(target.model, Examples(*found.tensors(encoder)), _about(len(found.rows), source))
    metric.notes = (found.understood.line(), *found.understood.notes())
    return metric


def held_out(options: TextLossOptions) -> tuple[list[str], str]:
    """The documents of a text-loss metric as texts (of rows, what is trained on), and what they are in words.

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
    source = _source(options)
    if source.startswith(PREFIX):
        texts = task_documents(source.removeprefix(PREFIX), options.documents)
    else:
        found = gather(source, limit=options.documents, **HELD_OUT)
        texts = [trained_text(item) for _, item in found.items]
        texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"The texts {source} are all blank.", "Give at least one document.")
    return texts, _about(len(texts), source)


def texts_of(given: str | Sequence[str], default: Sequence[str]) -> list[str]:
    """Texts that a metric's option holds: a list of them, or a source of rows (docs/data.md); else the default.

    Raises:
        UsageError: if the source cannot be read.
    """
    if isinstance(given, str) and given:
        return held_out(TextLossOptions(name="text-loss", file=given))[0]
    return list(given) or list(default)


def _source(options: TextLossOptions) -> str:
    return options.file.replace("{language}", options.language)


def _about(count: int, source: str) -> str:
    return f"{count} documents of {source.rstrip('/').rpartition('/')[2]}"


def encode(texts: list[str], target: LanguageModel) -> Examples:
    """Texts of ours as the target reads them: beginning-of-sequence token where it has one, text, end of sequence.

    Raises:
        UsageError: if one is longer than the target's context.
    """
    encoder = RowEncoder(target, Encoding(begin=True))
    found = prepare(gathered_items([Text(text) for text in texts], "the texts"), encoder)
    require_room(found, target)
    return Examples(*found.tensors(encoder))


def require_room(found: Prepared, target: LanguageModel) -> None:
    """Refuse held-out documents that the target cannot read whole.

    Raises:
        UsageError: naming the longest and the context.
    """
    longest = found.rows.longest
    if longest > (target.context or longest):
        raise UsageError(
            f"A held-out document has {longest} tokens; the target {target.name!r} reads {target.context}.",
            "Give shorter ones.",
        )
