"""How far two tokenisers agree on a text: what credits lose on their way from target tokens to generator tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dpg_cli.engine.generator.align import completion_texts, encode_with_ends
from dpg_cli.models.loading import LanguageModel, same_tokenizer


@dataclass(frozen=True)
class Agreement:
    """Two tokenisers compared on some texts.

    Attributes:
        shared: one tokeniser: every credit keeps its token.
        vocabulary: share of the target's tokens that the generator's vocabulary holds, as spelt.
        tokens_ratio: target tokens for each generator token.
        aligned: share of target tokens that end where a generator token ends; the credit of the others goes to a token
            that also holds the beginning of the next one.
        lossless: share of texts that the target's tokeniser gives back unchanged.
    """

    shared: bool
    vocabulary: float
    tokens_ratio: float
    aligned: float
    lossless: float

    def as_dict(self) -> dict[str, float | bool]:
        """For JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """For people."""
        if self.shared:
            return "one tokeniser"
        return (
            f"two tokenisers: {self.tokens_ratio:.2f} target tokens for each generator token, {self.aligned:.0%} of them end "
            f"where one of those ends, {self.vocabulary:.0%} of the vocabulary is shared"
            + ("" if self.lossless == 1 else f"; the target's changes {1 - self.lossless:.0%} of the texts")
        )


def agreement(generator: LanguageModel, target: LanguageModel, texts: list[str]) -> Agreement:
    """Compare the tokenisers of generator and target.

    Args:
        generator, target: the models.
        texts: such as the generator writes; at least one that is not empty.
    """
    if same_tokenizer(generator, target):
        return Agreement(True, 1.0, 1.0, 1.0, 1.0)
    ours, theirs = (encode_with_ends(model.tokenizer, texts) for model in (generator, target))
    ends = [set(last) for _, last in ours]
    aligned = sum(place in known for known, (_, last) in zip(ends, theirs, strict=True) for place in last)
    count = max(1, sum(len(ids) for ids, _ in theirs))
    vocabulary = target.tokenizer.get_vocab().keys()
    back = completion_texts(target.tokenizer, [ids for ids, _ in theirs])
    return Agreement(
        shared=False,
        vocabulary=len(vocabulary & generator.tokenizer.get_vocab().keys()) / max(1, len(vocabulary)),
        tokens_ratio=count / max(1, sum(len(ids) for ids, _ in ours)),
        aligned=aligned / count,
        lossless=sum(text == other for text, other in zip(texts, back, strict=True)) / max(1, len(texts)),
    )
