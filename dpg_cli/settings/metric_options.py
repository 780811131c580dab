"""The settings of the target metrics, and what all sections of settings are made of. Free of torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0, le=2**31)]
NonNegative = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
FRESH = "fresh"  # in place of a UUID: a new one
FREQUENT = "frequent"  # in place of a patch's corner: the rows of frequent tokens
Index = Annotated[int, Field(ge=0, le=2**31)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0, le=2**31)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, no silent conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="after")
    def _without_nul(self) -> Self:
        for name in type(self).model_fields:
            if isinstance(value := getattr(self, name), str) and "\0" in value:
                raise ValueError(f"{name} holds a NUL character, which no file, model or device has in its name")
        return self


class PatternOptions(Section):
    """Φ = -mean softplus(-s · Y ⊙ (W_T - W_0)) over a patch of the LM head. Source: paper, QR and 67 experiments."""

    name: Literal["pattern"] = "pattern"
    image: str = Field("", description="picture of a QR code, or a black-and-white bitmap")
    text: str = Field("", description="payload from which a QR code is made")
    rows: tuple[str, ...] = Field((), description="a bitmap drawn in text: # is +1, . is -1", strict=False)
    version: Annotated[int, Field(ge=0, le=40)] = Field(0, description="QR version; 0 takes the smallest that fits")
    error_correction: Literal["L", "M", "Q", "H"] = "L"
    sharpness: Positive = Field(20.0, description="s in Φ, per unit of head change; per standard error with a margin")
    margin: NonNegative = Field(
        0.0,
        description="Φ = -mean softplus(s (margin - z)), z of a pixel in standard errors at `dataset.examples`; 0: noise is "
        "left out of Φ. With several inner steps four small drawn runs more an outer step measure it",
    )
    origin: Annotated[tuple[Index, Index], Field(strict=False)] | Literal["frequent"] = Field(
        (0, 0),
        description="row (token id) and column (hidden dimension) of the patch's upper-left corner; frequent: column 0, and "
        "the rows of the most frequent contiguous tokens that the generator writes, which a run's settings then name",
    )

    aim: Literal["gradient", "moments"] = Field(
        "gradient",
        description="what natural steps follow: Φ's gradient, or the change that brings every pixel to `margin` standard errors "
        "(relaxed Gauss-Newton); the latter needs inner.labels = 'soft' and credit.mode = 'expected'",
    )

    @property
    def corner(self) -> tuple[int, int]:
        """The patch's upper-left corner, once it is known."""
        if isinstance(self.origin, str):
            raise ValueError("the rows of frequent tokens are not known yet")
        return self.origin

    @model_validator(mode="after")
    def _one_source(self) -> PatternOptions:
        if bool(self.image) + bool(self.text) + bool(self.rows) > 1:
            raise ValueError("image, text and rows exclude each other; give one")
        return self


class NormOptions(Section):
    """Φ = -‖W_T‖ (l2) of one parameter. Source: paper, l2 norm experiment."""

    name: Literal["norm"]
    parameter: str = Field("", description="name of a target parameter; the LM head by default")


class TextLossOptions(Section):
    """Φ = minus the target's mean token loss on held-out text. Source: paper, language and UUID experiments."""

    name: Literal["text-loss"]
    language: Literal["", "en", "es", "de", "fr", "it"] = Field(
        "", description="held-out sentences of the embedded world"
    )
    file: str = Field(
        "",
        description="`prose`, a file of rows, datasets folder or hub dataset (docs/data.md), or lm-eval:TASK; with a language, "
        "{language} in it stands for that, and verification looks for that language",
    )
    text: str = Field("", description="one document")
    uuid: str = Field("", description="one document that is this UUID; `fresh` draws a new one when a run begins")
    documents: PositiveInt = Field(256, description="documents taken from the language or file")

    @field_validator("uuid")
    @classmethod
    def _canonical(cls, value: str) -> str:
        if value in ("", FRESH):
            return value
        try:
            return str(UUID(value))
        except ValueError:
            raise ValueError(
                f"{value[:60]!r} is no UUID; give 32 hexadecimal digits as 8-4-4-4-12, or leave it out for a fresh one"
            ) from None

    @model_validator(mode="after")
    def _one_source(self) -> TextLossOptions:
        if bool(self.language or self.file) + bool(self.text) + bool(self.uuid) != 1:
            raise ValueError("give exactly one of language (or file, or both), text and uuid")
        if "{language}" in self.file and not self.language:
            raise ValueError("file names {language}, and no language is given")
        return self

    @property
    def document(self) -> str:
        """The one document of `text` or `uuid`, else empty."""
        return self.text or self.uuid


class CustomOptions(Section):
    """A metric of the user's own, made as NAME(target, **options). docs/custom-metrics.md tells how to write one."""

    name: Literal["custom"]
    path: str = Field(
        "", description="FILE.py:Name, a record that only --metric turns into code; or the name of an installed metric"
    )
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = Field("", description="of the file")
    options: dict[str, Any] = Field({}, description="keyword arguments of the metric")

    @model_validator(mode="after")
    def _plain(self) -> CustomOptions:
        for key, value in self.options.items():
            if not key.isidentifier():
                raise ValueError(f"options: {key!r} is no name of a keyword argument")
            if not _is_plain(value):
                raise ValueError(f"options.{key}: give finite numbers, texts, booleans, lists or tables of them")
        return self


def _is_plain(value: object) -> bool:
    """Whether TOML can write a value and read it back equal (dates, which JSON lacks, are left out)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


METRIC_NAMES = ("pattern", "norm", "text-loss", "custom")
MetricOptions = Annotated[PatternOptions | NormOptions | TextLossOptions | CustomOptions, Field(discriminator="name")]
