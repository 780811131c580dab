"""The LM head and its cross-entropy in closed form, over chunks of tokens.

For M labelled tokens with hidden states h (M, D), labels y and factors c (weight × mask / Z), head W (V, D) and bias a:

    z = h Wᵀ + a        p = softmax z        L = Σ c (log Σ exp z - z_y)
    h̄ = c (p - e_y) W        W̄ = (p - e_y)ᵀ (c h)        ā = Σ c (p - e_y)

With soft labels a distribution q stands for e_y, and L = Σ c Σ_u q_u (log Σ exp z - z_u).

Only labelled tokens have logits, and only those of a chunk of tokens exist at a time: memory does not grow with vocabulary × tokens.
The second order is `reverse/head.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpg_cli.engine.inner.cuts import trying
from dpg_cli.engine.inner.product import times
from dpg_cli.engine.soft import Rows

CHUNK = 1 << 22  # logits at a time; 16 MB in float32
CHUNK_TOKENS = 256  # but no fewer tokens at a time: below, the products with a large vocabulary's head are slow

_TOUCHED_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


@dataclass(frozen=True)
class Head:
    """A standard LM head: logits are one linear map of the backbone's last hidden state.

    Attributes:
        base: the backbone.
        prefix: of the backbone's parameters among the model's, with its dot.
        weight, bias: names of the head's parameters among the model's; bias may be None. A tied head has the
            embedding's name.
        layer: the head itself, for parameters that are frozen.
    """

    base: nn.Module
    prefix: str
    weight: str
    bias: str | None
    layer: nn.Linear

    def parameters(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W and a among the given parameters; the module's own where they are frozen."""
        weight = given.get(self.weight, self.layer.weight.detach())
        bias = None if self.bias is None or self.layer.bias is None else given.get(self.bias, self.layer.bias.detach())
        return weight, bias

    def base_parameters(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The backbone's parameters by their names within it."""
        cut = len(self.prefix)
        return {name[cut:]: value for name, value in given.items() if name.startswith(self.prefix)}


@torch.no_grad()
def find_head(model: nn.Module) -> Head | None:
    """The head of a causal LM if it is a standard one, else None: then logits must come from the model itself.

    What the attributes promise is tried on two tokens: logits that are scaled, capped or cut differ from the linear map.
    """
    causal, outside = within(model)
    layer: Any = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    layer = _saved(layer)
    base: Any = getattr(causal, "base_model", causal)
    prefix = getattr(causal, "base_model_prefix", "")
    named: Any = getattr(causal, prefix, None)
    if type(layer) is not nn.Linear or base is causal or named is not base:
        return None
    if any(getattr(getattr(causal, "config", None), key, None) not in (None, 0, 1, 1.0) for key in _TOUCHED_LOGITS):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if id(layer.weight) not in names:
        return None
    seen: list[Any] = []
    handle = base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        ids = torch.arange(min(2, layer.out_features), device=layer.weight.device)[None]
        with trying():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    hidden = getattr(seen[0], "last_hidden_state", None) if len(seen) == 1 else None
    if hidden is None or hidden.shape[:-1] != ids.shape:
        return None
    expected = nn.functional.linear(hidden, layer.weight, layer.bias)  # not layer(hidden): it may have hooks
    if expected.shape != logits.shape or not torch.allclose(expected, logits, rtol=1e-5, atol=1e-6):
        return None
    bias = None if layer.bias is None else names.get(id(layer.bias))
    return Head(base, f"{outside}{prefix}.", names[id(layer.weight)], bias, layer)


def within(model: nn.Module) -> tuple[Any, str]:
    """The causal LM itself, and what its parameters' names begin with: within a PEFT wrapper, the model with its adapters."""
    if any(kind.__name__ == "PeftModel" for kind in type(model).__mro__):
        wrapper: Any = model
        causal = wrapper.get_base_model()
        return causal, next(f"{name}." for name, module in model.named_modules() if module is causal)
    return model, ""


def _saved(layer: Any) -> Any:
    """A head that PEFT trains whole, beside its adapters: the copy that is trained."""
    if type(layer).__name__ != "ModulesToSaveWrapper" or len(layer.active_adapters) != 1:
        return layer
    return layer.modules_to_save[layer.active_adapters[0]]


def chunk_logits(vocabulary: int) -> int:
    """Most logits that exist at a time."""
    return max(CHUNK, CHUNK_TOKENS * vocabulary)


def chunks(tokens: int, vocabulary: int) -> list[slice]:
    """The tokens in chunks of about equal size, at most `chunk_logits` each."""
    count = max(1, -(-tokens * vocabulary // chunk_logits(vocabulary)))
    size = max(1, -(-tokens // count))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def logits_at(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = times(hidden, weight.mT)
    return logits if bias is None else logits.add_(bias)


@torch.no_grad()
def first_order(
    hidden_M_D: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels_M: Tensor,
    factors_M: Tensor,
    weight_into: Tensor | None,
    bias_into: Tensor | None,
    expected: Rows | None = None,
    losses_into: Tensor | None = None,
) -> tuple[float, Tensor]:
    """Loss and gradient of Σ c ℓ.

    Args:
        hidden_M_D: h of the labelled tokens.
        weight, bias: W (V, D) and a (V,) or None.
        labels_M: y.
        factors_M: c.
        weight_into, bias_into: W̄ and ā are added here; None leaves them out.
        expected: gives q of a chunk of the tokens, (m, V), in place of the labels.
        losses_into: (M,), float64; takes ℓ of each token.

    Returns:
        The loss, and h̄ (M, D).
    """
    total, hidden_bar = 0.0, torch.empty_like(hidden_M_D)
    tiny = torch.finfo(hidden_M_D.dtype).tiny
    for part in chunks(len(labels_M), weight.shape[0]):
        hidden, labels, factors = hidden_M_D[part], labels_M[part, None], factors_M[part, None]
        logits = logits_at(hidden, weight, bias)
        if expected is not None:
            q = expected(part)
            logs = torch.log_softmax(logits, -1)
            losses = -torch.linalg.vecdot(q, logs)
            total += float(losses @ factors[:, 0])
            error = logs.exp_().sub_(q)
            del logits, logs, q
        else:
            probs = torch.softmax(logits, -1)
            chosen = probs.gather(-1, labels)
            losses = -chosen.log()
            if bool((chosen < tiny).any()):  # p_y underflows: take the loss from the logits
                losses = torch.logsumexp(logits, -1, keepdim=True) - logits.gather(-1, labels)
            total += float((losses * factors).sum())
            losses = losses[:, 0] if losses_into is None else _fine(logits, chosen, labels)
            del logits
            error = probs.scatter_add_(-1, labels, -torch.ones_like(factors))
        if losses_into is not None:
            losses_into[part] = losses
        hidden_bar[part] = times(error, weight).mul_(factors)
        if weight_into is not None:
            weight_into.addmm_(error.mT, hidden * factors)
        if bias_into is not None:
            bias_into.addmv_(error.mT, factors[:, 0])
    return total, hidden_bar


@torch.no_grad()
def losses_of(
    hidden_M_D: Tensor, weight: Tensor, bias: Tensor | None, labels_M: Tensor, expected: Rows | None = None
) -> Tensor:
    """ℓ of each token, (M,), float64; arguments as `first_order`."""
    found = hidden_M_D.new_empty(len(labels_M), dtype=torch.float64)
    for part in chunks(len(labels_M), weight.shape[0]):
        labels, logits = labels_M[part, None], logits_at(hidden_M_D[part], weight, bias)
        if expected is not None:
            found[part] = -torch.linalg.vecdot(expected(part), torch.log_softmax(logits, -1))
        else:
            found[part] = _fine(logits, torch.softmax(logits, -1).gather(-1, labels), labels)
    return found


def _fine(logits: Tensor, chosen: Tensor, labels: Tensor) -> Tensor:
    """-log p_y in float64, (m,): the logarithm adds no rounding to that of p."""
    losses = -chosen.double().log()
    if bool((chosen < torch.finfo(chosen.dtype).tiny).any()):
        losses = torch.logsumexp(logits.double(), -1, keepdim=True) - logits.gather(-1, labels).double()
    return losses[:, 0]


class MeanLoss(torch.autograd.Function):
    """(h (M, D), W, a, labels (M,)) -> mean cross-entropy, by `first_order`: the gradient is taken along with the value."""

    @staticmethod
    def forward(ctx: Any, hidden_M_D: Tensor, weight: Tensor, bias: Tensor | None, labels_M: Tensor) -> Tensor:
        factors = hidden_M_D.new_full((len(labels_M),), 1 / max(1, len(labels_M)))
        weight_bar = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        bias_bar = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        value, hidden_bar = first_order(hidden_M_D, weight, bias, labels_M, factors, weight_bar, bias_bar)
        ctx.save_for_backward(hidden_bar, weight_bar, bias_bar)
        return hidden_M_D.new_tensor(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        # in place: nobody else holds them, and a second reverse, which would scale them twice, is refused by autograd
        return *(None if saved is None else saved.mul_(bar) for saved in ctx.saved_tensors), None
