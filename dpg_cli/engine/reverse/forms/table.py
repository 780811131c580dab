"""Which torch functions the dual pass computes by which closed form. A new form is a file here and a row below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpg_cli.engine.reverse.forms import activation, attention, embedding, layer_norm, linear, logsumexp, softmax
from dpg_cli.engine.reverse.forms.base import Form

FORMS: dict[str, Form] = {
    "linear": linear.FORM,
    "embedding": embedding.FORM,
    "softmax": softmax.FORM,
    "logsumexp": logsumexp.FORM,
    "attention": attention.FORM,
    "layer_norm": layer_norm.FORM,
    "activation": activation.FORM,
}

REPLACED: dict[Callable[..., Any], tuple[Callable[..., Any], bool]] = {  # with whether it takes products
    function: (dual, form.with_products) for form in FORMS.values() for function, dual in form.calls.items()
}
