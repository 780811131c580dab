"""One outer step by TRL with credit of tokens, and the same by our own policy step on the rollout that TRL drew: how far apart.

python tests/trl_step.py WORLD OUT CREDIT...    by so many processes; a line of JSON for each credit, by rank 0
"""

from __future__ import annotations

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dpg_cli.driver.build import build
from dpg_cli.driver.trl import trainer as driver
from dpg_cli.engine import metagradient
from dpg_cli.engine.generator import policy
from dpg_cli.engine.generator.align import read_completions
from dpg_cli.engine.generator.credit import assign
from dpg_cli.engine.loop import StepReport
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Rollout
from dpg_cli.integrations import trl as reward
from dpg_cli.integrations.trl_credit import TokenCredit, rollout_of
from dpg_cli.settings.presets import find, resolve

SILENT = tuple(range(300, 330))
SETTINGS = [
    "steps=1", 'models.dtype="float64"', 'models.generator_init="pretrained"', 'metric.rows=["##.#",".#.#"]', "inner.batch_size=8",
    "prompts.source='tiny'", "prompts.per_step=4", "rollout.group_size=4", "rollout.max_tokens=20", "rollout.min_tokens=3",
    "rollout.temperature=1.3", "policy.minibatch=8", "policy.micro_batch=2", "policy.epochs=2", "policy.lr=0.1", "policy.kl=0.05",
    "policy.clip=0.001", "policy.max_grad_norm=0", "credit.discount=0.7", 'trainer="trl"',
]  # fmt: skip


def weights(model: nn.Module) -> Tensor:
    """All of them, (n,)."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def whole(seen: dict[str, Tensor], ranks: Ranks, group_size: int) -> Rollout:
    """The completions of all processes, of what each one's trainer saw."""

    def left(name: str) -> Tensor:
        return ranks.gather(seen[name].flip(1)).flip(1)

    ids, mask, old = (ranks.gather(seen[name]) for name in ("completion_ids", "completion_mask", "old_per_token_logps"))
    return replace(rollout_of(left("prompt_ids"), left("prompt_mask"), ids, mask, old), group_size=group_size)


def compared(credit: str, folder: Path, *more: str, ranks: Ranks = ALONE, factors: bool = False) -> dict[str, Any]:
    """An outer step by TRL with plain gradient descent, and by `policy_step`.

    Args:
        credit: its mode.
        folder: for TRL.
        more: settings.
        ranks: the processes that share it.
        factors: credits of labels are kept in factors by TRL's side; ours never does.

    Returns:
        What TRL's generator is off, relative to the change, and what else the step was.
    """
    config = resolve(find("pattern-67.tiny").data(), [*SETTINGS, f"credit.mode={credit!r}", *more])
    built = build(config, ranks=ranks)
    built.spec = replace(
        built.spec,
        sampling=replace(built.spec.sampling, silent_ids=SILENT),
        policy=replace(built.spec.policy, silent_ids=SILENT),
    )
    players, spec = built.players, built.spec
    model, before = players.generator.model, weights(players.generator.model)
    ours: Any = copy.deepcopy(model)
    players.policy_optimizer = torch.optim.SGD(model.parameters(), lr=config.policy.lr)
    seen: dict[str, Tensor] = {}
    order: list[Tensor] = []
    generate, loss = TokenCredit._generate_and_score_completions, TokenCredit._compute_loss

    def generated(self: Any, inputs: Any) -> dict[str, Tensor]:
        batch = generate(self, inputs)
        seen.update(batch, factored=torch.tensor(self._credit.factors is not None))
        return batch

    def computed(self: Any, model: Any, inputs: Any) -> Tensor:
        order.append(inputs["credit_rows"].clone())
        return loss(self, model, inputs)

    reports: list[StepReport] = []
    with (
        patch.object(TokenCredit, "_generate_and_score_completions", generated),
        patch.object(TokenCredit, "_compute_loss", computed),
        patch.object(reward, "form_of_labels", lambda *sizes: "factors" if factors else True),
    ):
        driver.train(config, built, folder, reports.append, lambda done: False, lambda: False)

    rollout = whole(seen, ranks, config.rollout.group_size)
    reading = read_completions(rollout, players.generator, players.target)
    inner = spec.inner
    result = metagradient(players.target.model, reading.examples, inner.recipe, players.metric, labels=True)
    token_N_K, label_N_K_V = reading.to_completions(result)
    made = assign(
        credit, token_N_K, label_N_K_V if credit == "expected" else None, rollout.mask_N_K, rollout.group_size,
        discount=config.credit.discount,
    )  # fmt: skip
    # of each optimiser step, the rows of all processes
    own, pieces = config.policy.minibatch // ranks.world, len(order) * order[0].numel()
    steps = ranks.gather(torch.cat(order).view(-1, own).T.contiguous()).T
    orders = iter(steps.reshape(config.policy.epochs, -1))
    optimizer = torch.optim.SGD(ours.parameters(), lr=spec.lr_at(0))
    with patch.object(policy, "order_of", lambda *a: next(orders)):
        told = policy.policy_step(
            ours, optimizer, rollout, made, spec.policy_at(0), torch.Generator(), players.reference
        )
    change, numbers = float((weights(ours) - before).norm()), reports[0].numbers
    return {
        "off": float((weights(model) - weights(ours)).norm()) / change,
        "change": change,
        "factors": bool(seen["factored"]),
        "lengths": sorted(set(rollout.mask_N_K.sum(1).tolist())),
        "silent": int(torch.isin(rollout.ids_N_K, torch.tensor(SILENT)).sum()),
        "rows": sorted(steps.flatten().tolist()) == sorted(list(range(len(rollout))) * config.policy.epochs),
        "steps": len(steps),
        "calls": pieces // order[0].numel(),
        "clipped": (numbers["policy_clipped"], told["clipped"]),
        "kl": (numbers.get("policy_kl"), told.get("kl")),
        "norm": (numbers["policy_grad_norm"], told["grad_norm"]),
        "entropy": numbers["entropy"],
    }


def shared(rank: int, world: int, port: int, out: Path, credits: list[str]) -> None:
    """One of `world` processes."""
    from accelerate import PartialState

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    PartialState(cpu=True)
    ranks = Ranks.joined()
    for credit in credits:
        found = compared(credit, out / credit, ranks=ranks, factors=True)
        if ranks.first:
            sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    from ranks_worker import forked, free_port
    from trl import GRPOTrainer as GRPOTrainer  # once, for all processes

    torch.set_num_threads(1)
    size, port = int(sys.argv[1]), free_port()
    children = [forked(lambda r=r: shared(r, size, port, Path(sys.argv[2]), sys.argv[3:])) for r in range(size)]  # type: ignore[misc]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
