"""Everything that outer steps change, as named tensors: the generator, its policy's state, and the RNGs.

An optimiser has moments, natural steps a trust region and Φ before the last step.

The target and its optimiser start afresh at every outer step, so they have no state between two of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpg_cli.engine.generator.optimizer import moments_of, put, step_of
from dpg_cli.engine.loop import Players

State = dict[str, dict[str, Tensor]]  # part -> name -> tensor
PartLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and dtype
NATURAL = ("trust", "phi")  # of natural steps, float64 scalars


def trained(players: Players) -> dict[str, nn.Parameter]:
    """The generator's trainable parameters by name, tied ones once."""
    return {name: p for name, p in players.generator.model.named_parameters() if p.requires_grad}


def capture(players: Players) -> State:
    """The state between two outer steps.

    Returns:
        Parts "generator" (parameters), "optimizer" (step and moments of each parameter, see `moments_of`; or the
        trust region and Φ of natural steps) and "rng" (uint8 states of sampling, of the order of mini-batches, and of torch's
        own generators). Tensors are views where that is possible: use or copy them before the next outer step.
    """
    optimizer: dict[str, Tensor] = {}
    for name, parameter in trained(players).items() if players.natural is None else ():
        optimizer[f"step/{name}"] = step_of(players.policy, parameter)
        for moment, tensor in moments_of(players.policy, parameter).items():
            optimizer[f"{moment}/{name}"] = tensor
    if players.natural is not None:
        optimizer = {name: torch.tensor(getattr(players.natural, name), dtype=torch.float64) for name in NATURAL}
    return {
        "generator": {name: parameter.detach() for name, parameter in trained(players).items()},
        "optimizer": optimizer,
        "rng": _rng_states(players),
    }


def layout(players: Players) -> dict[str, PartLayout]:
    """Names, shapes and dtypes that a state of these players has."""
    parameters = trained(players)
    shapes: PartLayout = {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}
    optimizer: PartLayout = dict.fromkeys(NATURAL, ((), torch.float64))
    if players.natural is None:
        optimizer = {f"step/{name}": ((), torch.float32) for name in shapes} | {
            f"{moment}/{name}": (tuple(tensor.shape), tensor.dtype)
            for name, parameter in parameters.items()
            for moment, tensor in moments_of(players.policy, parameter).items()
        }
    rng: PartLayout = {name: (tuple(state.shape), state.dtype) for name, state in _rng_states(players).items()}
    return {"generator": shapes, "optimizer": optimizer, "rng": rng}


def check(players: Players, state: State) -> None:
    """Refuse values that no training leaves behind. Names, shapes and dtypes must already be those of `layout`.

    Raises:
        ValueError: naming the first tensor that cannot be.
    """
    for part in ("generator", "optimizer"):
        for name, tensor in state[part].items():
            if not torch.isfinite(tensor).all() and not (name == "phi" and tensor.isnan()):  # nan: no step yet
                raise ValueError(f"{name} is not finite")
            if name == "trust" and not tensor > 0:
                raise ValueError("the trust region is not positive")
            if name.startswith(("step/", "exp_avg_sq/", "absmax")) and bool((tensor < 0).any()):
                raise ValueError(f"{name} is negative")
    for name, tensor in state["rng"].items():
        device = players.rng.device if name in ("sampling", "device") else torch.device("cpu")
        try:
            torch.Generator(device).set_state(tensor)
        except RuntimeError:
            raise ValueError(f"the state of the RNG {name!r} is no valid one") from None


@torch.no_grad()
def restore(players: Players, state: State) -> None:
    """Put players into a captured state, which `check` has passed."""
    for name, parameter in trained(players).items():
        parameter.copy_(state["generator"][name])
        if players.natural is None:
            known = state["optimizer"]
            moments = {moment: known[f"{moment}/{name}"] for moment in moments_of(players.policy, parameter)}
            put(players.policy, parameter, known[f"step/{name}"], moments)
    if players.natural is not None:
        for name in NATURAL:
            setattr(players.natural, name, float(state["optimizer"][name]))
    _set_rng_states(players, state["rng"])


@torch.no_grad()
def follow_first(players: Players) -> None:
    """Give every rank the state of rank 0, whatever each had.

    The optimiser's moments come along; on ranks whose optimiser has none yet, zeros are what it would begin with.
    """
    ranks = players.ranks
    if ranks.world == 1:
        return
    for parameter in trained(players).values():
        ranks.copy_from_first_(parameter)
        if players.natural is not None:
            continue
        step, moments = step_of(players.policy, parameter), moments_of(players.policy, parameter)
        for tensor in (step, *moments.values()):
            ranks.copy_from_first_(tensor)
        put(players.policy, parameter, step, moments)
    if players.natural is not None:
        for name in NATURAL:
            number = torch.tensor(getattr(players.natural, name), dtype=torch.float64)
            setattr(players.natural, name, float(ranks.copy_from_first_(number)))
    rng = {name: ranks.copy_from_first_(state) for name, state in _rng_states(players).items()}
    _set_rng_states(players, rng)


def _set_rng_states(players: Players, states: dict[str, Tensor]) -> None:
    """Put the sources of randomness into these states."""
    players.rng.set_state(states["sampling"])
    players.order_rng.set_state(states["order"])
    torch.set_rng_state(states["torch"])
    if "device" in states:
        torch.cuda.set_rng_state(states["device"], players.rng.device)


def _rng_states(players: Players) -> dict[str, Tensor]:
    """The states of all sources of randomness, uint8."""
    states = {
        "sampling": players.rng.get_state(),
        "order": players.order_rng.get_state(),
        "torch": torch.get_rng_state(),
    }
    if players.rng.device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(players.rng.device)
    return states
