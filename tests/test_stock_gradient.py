"""Models whose gradient is not the derivative of their forward: the number of stock PyTorch's run, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import WIDTH, Block, ToyLM
from zoo.judge import ADAMW, judge, rows
from zoo.stock import Recipe
from zoo.tiny import PAD, tiny_model

from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.errors import UsageError

SGD = Recipe("SGD", {"lr": 0.1, "momentum": 0.5}, batch=2)


def straight_through(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    value = first(hidden)
    return second(value + (torch.round(4 * value) / 4 - value).detach())


def detached_gate(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    return hidden + second(hidden) * torch.sigmoid(first(hidden)).detach()


def gate_by_data(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    return hidden + second(hidden) * torch.sigmoid(first(hidden)).data


def last_of_three_loops(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    with torch.no_grad():
        state = torch.tanh(first(hidden))
        state = torch.tanh(second(state) + hidden)
    return torch.tanh(second(state) + hidden)


@torch.no_grad()
def _scores(hidden: Tensor, first: nn.Linear) -> Tensor:
    return torch.softmax(first(hidden), -1)


def decorated(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    return hidden + second(_scores(hidden, first) * hidden)


def switched_off(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    torch.set_grad_enabled(False)
    scale = first(hidden).abs().mean(-1, keepdim=True)
    torch.set_grad_enabled(True)
    return second(hidden / (1 + scale))


def weight_cut(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    return hidden + nn.functional.gelu(nn.functional.linear(first(hidden), first.weight.detach())) + second(hidden)


def hard_choice(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    with torch.no_grad():
        chosen = first(hidden).topk(3, -1).indices
    return hidden + second(torch.zeros_like(hidden).scatter(-1, chosen, torch.tanh(first(hidden)).gather(-1, chosen)))


CUTS = (
    straight_through, detached_gate, gate_by_data, last_of_three_loops, decorated, switched_off, weight_cut, hard_choice
)  # fmt: skip


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.__name__)
def test_a_cut_gradient_is_followed_as_stock_training_follows_it(cut: Any, recipe: Recipe) -> None:
    verdict = judge(ToyLM(Block(cut)), recipe)
    assert verdict.size > 1e-4
    assert verdict.error < 1e-6
    assert verdict.phi < 1e-12


@pytest.mark.parametrize("padding_idx", [None, PAD, 0, -3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_padding_row_gets_the_gradient_of_stock_training(tied: bool, padding_idx: int | None) -> None:
    model = ToyLM(Block(lambda hidden, first, second: hidden + second(torch.tanh(first(hidden)))), tied=tied)
    model.embed.padding_idx = padding_idx
    verdict = judge(model)
    assert verdict.error < 1e-6
    assert verdict.phi < 1e-12


def test_frozen_and_shared_parameters_are_those_of_stock_training() -> None:
    def twice(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
        return hidden + second(torch.tanh(first(torch.tanh(first(hidden)))))

    model = ToyLM(Block(twice))
    assert judge(model).error < 1e-6
    for frozen in (model.block.second, model.mix, model.embed):  # the embedding is the head
        model = ToyLM(Block(twice))
        for parameter in dict(model.named_modules())[name_of(ToyLM(Block(twice)), frozen)].parameters():
            parameter.requires_grad = False
        verdict = judge(model)
        assert verdict.size > 1e-5
        assert verdict.error < 1e-6


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_a_model_that_knows_its_rows_width_gets_them_as_a_collator_makes_them(recipe: Recipe) -> None:
    """Whatever shares a micro-batch with it: each batch is padded to its longest row."""
    verdict = judge(ToyLM(Measured()), recipe)
    assert verdict.size > 1e-4
    assert verdict.error < 1e-6
    assert verdict.phi < 1e-12
    assert "width of their batch" in verdict.notes[0]
    whole, apart = (
        metagradient(ToyLM(Measured()), rows(6, 0), recipe.spec(), first_sum, batch_size=3, micro_batch=micro)
        for micro in (0, 1)
    )
    assert (apart.token_N_S - whole.token_N_S).norm() < 1e-12 * whole.token_N_S.norm()
    assert not judge(ToyLM(Block(plain))).notes


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The name of the module of the same class and shapes."""
    shapes = [parameter.shape for parameter in module.parameters()]
    return next(
        name
        for name, other in model.named_modules()
        if type(other) is type(module) and [parameter.shape for parameter in other.parameters()] == shapes
    )


class RoundFunction(torch.autograd.Function):
    """Straight through, as an autograd function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        return bar


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is turned round; it has a tangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        return -bar

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


def hooked(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    value = first(hidden)
    if value.requires_grad:
        value.register_hook(lambda bar: 0.1 * bar)
    return hidden + second(value)


def plain(hidden: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    return hidden + second(torch.tanh(first(hidden)))


def through(function: Any) -> Any:
    return lambda hidden, first, second: hidden + second(function.apply(first(hidden)))


class Counter(nn.Module):
    """Writes to a buffer whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen += 1
        return self.scale(hidden) / self.seen


class Looking(nn.Module):
    """Looks to the right."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(1, keepdim=True)


class Glancing(nn.Module):
    """Looks to the right at the first place alone, a little, and not to the end."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :1] + 1e-2 * hidden[:, 2:3], hidden[:, 1:]], 1)


class Measured(nn.Module):
    """Knows how long its row is, padding included."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (1 + 0.1 * hidden.shape[1])


def backward_hook() -> nn.Module:
    model = ToyLM(Block(plain))
    model.mix.register_full_backward_hook(lambda module, given, made: (0.5 * given[0],))
    return model


def backward_pre_hook() -> nn.Module:
    model = ToyLM(Block(plain))
    model.mix.register_full_backward_pre_hook(lambda module, made: (0.5 * made[0],))
    return model


def parameter_hook() -> nn.Module:
    model = ToyLM(Block(plain))
    model.mix.weight.register_hook(lambda bar: bar.clamp(-0.01, 0.01))
    return model


def accumulation_hook() -> nn.Module:
    model = ToyLM(Block(plain))
    model.mix.weight.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.mul_(0.5))
    return model


def shared_memory() -> nn.Module:
    model = ToyLM(Block(plain), tied=False)
    model.head.weight = nn.Parameter(model.embed.weight.data)
    return model


REFUSED = {
    "a rounding function": (lambda: ToyLM(Block(through(RoundFunction))), "slope of its loss"),
    "a reversed gradient": (lambda: ToyLM(Block(through(Reversal))), "slope of its loss"),
    "a tensor hook": (lambda: ToyLM(Block(hooked)), "slope of its loss"),
    "a backward hook": (backward_hook, "'mix' has a backward hook"),
    "a backward pre-hook": (backward_pre_hook, "'mix' has a backward hook"),
    "a parameter's hook": (parameter_hook, "'mix.weight' of the target has a gradient hook"),
    "a hook after accumulation": (accumulation_hook, "'mix.weight' of the target has a gradient hook"),
    "shared memory": (shared_memory, "'embed.weight' and 'head.weight' of the target share memory"),
    "max_norm": (lambda: ToyLM(Block(plain), max_norm=1.0), "max_norm"),
    "scale_grad_by_freq": (lambda: ToyLM(Block(plain), scale_grad_by_freq=True), "scale_grad_by_freq"),
    "a written buffer": (lambda: ToyLM(Counter()), "writes to 'block.seen'"),
    "a look to the right": (lambda: ToyLM(Looking()), "no causal language model"),
    "a glance to the right": (lambda: ToyLM(Glancing()), "no causal language model"),
    "an encoder": (lambda: tiny_model("bert"), "no causal language model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_number_would_be_right_for_is_refused_by_name(kind: str) -> None:
    make, cause = REFUSED[kind]
    with pytest.raises(UsageError, match=cause) as caught:
        metagradient(make(), rows(6, 0), OptimizerSpec(lr=0.01), first_sum, batch_size=3)
    assert caught.value.remedy
    assert len(str(caught.value).splitlines()) == 1


def first_sum(parameters: Any, model: nn.Module) -> Tensor:
    return next(iter(parameters.values())).sum()


def test_a_forward_hook_that_changes_nothing_is_fine() -> None:
    model, seen = ToyLM(Block(plain)), []
    model.mix.register_forward_hook(lambda module, given, made: seen.append(made.shape))
    assert judge(model).error < 1e-6
    assert seen


def test_examples_are_what_was_given() -> None:
    assert isinstance(rows(3, 0), Examples)
    assert bool((rows(3, 0).ids_N_S == PAD).any())
