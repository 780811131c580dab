"""Processes that share work, for `test_ranks.py`: a script, so that torch is loaded once and every process is a fork of it.

python tests/ranks_worker.py engine OUT    the engine's stages by one, two and four processes; what each rank got, in OUT
python tests/ranks_worker.py kill OUT      runs whose processes are killed one at a time; figures on stdout as JSON
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from builders import HeldOutLoss, make_examples, make_target

from dpg_cli.cli import main as dpg
from dpg_cli.driver.assist import assist
from dpg_cli.driver.execute import StopRequest, execute
from dpg_cli.engine import OptimizerSpec, metagradient
from dpg_cli.engine.attribution import AttributionSpec, InnerSettings, attribute_examples
from dpg_cli.engine.generator.credit import assign
from dpg_cli.engine.generator.policy import PolicySpec, policy_step
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.ranks import Ranks
from dpg_cli.errors import InterruptedRunError
from dpg_cli.integrations import trl as reward
from dpg_cli.models.loading import load_generator
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import ModelsConfig
from dpg_cli.settings.presets import find, resolve
from dpg_cli.tiny import world

WORLDS = (1, 2, 4)
ADAMW = OptimizerSpec("adamw", lr=3e-3, beta2=0.95, eps=1e-3, eps_root=1e-6, weight_decay=0.01)
RUN = [
    "steps=2", "prompts.per_step=5", "rollout.group_size=2", "rollout.max_tokens=6", "rollout.min_tokens=2",
    "rollout.portable=true", "inner.batch_size=4", "policy.minibatch=3", "dataset.examples=7", "checkpoint.every_steps=1",
]  # fmt: skip
KILLED = [
    "run", "pattern-67", "--set", "steps=2000", "--set", "checkpoint.every_steps=1", "--set", "prompts.per_step=8",
    "--set", "inner.batch_size=8", "--set", "dataset.examples=8", "--set", "rollout.max_tokens=8", "--set",
    "rollout.min_tokens=8", "--resume",
]  # fmt: skip

BY_TRL = [
    "steps=16", 'metric.rows=["##.#",".#.#"]', "prompts.per_step=16", "rollout.group_size=8", "rollout.max_tokens=4",
    "rollout.min_tokens=4", "policy.minibatch=64", "policy.lr=0.01", "inner.batch_size=128", "dataset.examples=16",
    "dataset.control=false", 'trainer="trl"', 'credit.mode="sequence"',
]  # fmt: skip


def forked(act: Callable[[], None], log: Path | None = None) -> int:
    """The id of a new process that does `act` and ends; its output goes to `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if log is not None:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
        act()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def metagradients(ranks: Ranks, *, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Rewards of ragged batches: 11 examples in batches of 4, so that the last has fewer rows than four ranks."""
    found = {}
    for name, architecture, tied, normalization, memory in (
        ("gpt2", "gpt2", True, "token", "keep"),
        ("llama", "llama", False, "example", "sqrt"),
    ):
        examples = make_examples(11, seed=3)
        weights = torch.linspace(0.5, 1.5, 11, dtype=dtype)
        result = metagradient(
            make_target(architecture, tied=tied, dtype=dtype), examples, ADAMW, HeldOutLoss(make_examples(5, seed=9)),
            batch_size=4, weights_N=weights, normalization=normalization, micro_batch=1, labels=True, memory=memory,
            ranks=ranks,
        )  # fmt: skip
        found |= {
            f"{name} value": torch.tensor(result.value),
            f"{name} token": result.token_N_S,
            f"{name} label": result.label_N_S_V,
            f"{name} final": torch.cat([value.reshape(-1) for value in result.final.values()]),
        }
    return found


def controls(ranks: Ranks) -> dict[str, Any]:
    """SGD and naive attribution over several inner runs."""
    found = {}
    for method in ("sgd", "naive"):
        result = attribute_examples(
            make_target("llama", tied=True), make_examples(10, seed=5), HeldOutLoss(make_examples(4, seed=6)),
            AttributionSpec(method, runs=2), InnerSettings(ADAMW, 3, ranks=ranks), group_size=2,
        )  # fmt: skip
        found |= {f"{method} value": torch.tensor(result.value), f"{method} example": result.example_N}
    return found


def generation(ranks: Ranks) -> dict[str, Any]:
    """Three prompts (fewer than four ranks), and a policy step in mini-batches of four and two completions."""
    generator = load_generator(ModelsConfig(dtype="float64"), torch.device("cpu"))
    reference = load_generator(ModelsConfig(dtype="float64"), torch.device("cpu")).model.requires_grad_(False)
    sampling = Sampling(2, 9, 2, 1.0, generator.eos_id, generator.pad_id, batch_size=4, portable=True)
    prompts = world.prompts("train", 3, seed=1)
    rng = torch.Generator().manual_seed(11)
    first, rollout = (sample(generator.model, generator.tokenizer, prompts, sampling, rng, ranks=ranks) for _ in "12")
    token = torch.linspace(-1, 1, rollout.ids_N_K.numel(), dtype=torch.float64).view_as(rollout.ids_N_K).sin()
    labels = token[..., None] * torch.linspace(0, 3, generator.head.shape[0], dtype=torch.float64).cos()
    credit = assign("expected", token, labels, rollout.mask_N_K, 2)
    optimizer = torch.optim.AdamW(generator.model.parameters(), lr=1e-3)
    spec = PolicySpec(kl=0.1, epochs=2, minibatch=4, micro_batch=1 if ranks.world > 1 else 0, max_grad_norm=0.5)
    order = torch.Generator().manual_seed(2)
    stats = policy_step(generator.model, optimizer, rollout, credit, spec, order, reference, ranks)
    return {
        "first ids": first.ids_N_K,
        "prompt": rollout.prompt_ids_N_Q * rollout.prompt_mask_N_Q,
        "ids": rollout.ids_N_K,
        "mask": rollout.mask_N_K,
        "logprobs": rollout.logprobs_N_K,
        "entropy": torch.tensor(rollout.entropy, dtype=torch.float64),
        "stats": torch.tensor([stats[name] for name in sorted(stats)], dtype=torch.float64),
        "generator": torch.cat([p.detach().reshape(-1) for p in generator.model.parameters()]),
    }


def whole_run(ranks: Ranks, folder: Path) -> None:
    """A run of two outer steps in float64."""
    config = resolve(find("pattern-67.tiny").data(), [*RUN, 'models.dtype="float64"'])
    if ranks.first:
        execute(config, RunFolder(folder), ranks=ranks)
    else:
        assist(config, str(folder), ranks, StopRequest())


def engine(out: Path) -> None:
    """All stages by every number of processes."""
    for size in WORLDS:

        def share(rank: int, size: int = size) -> None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{out}/store-{size}",
                rank=rank,
                world_size=size,
                timeout=timedelta(minutes=2),
            )
            ranks = Ranks.joined()
            assert ranks.world == size
            found = metagradients(ranks) | controls(ranks) | generation(ranks)
            found |= {f"f32 {k}": v for k, v in metagradients(ranks, dtype=torch.float32).items()}
            torch.save(found, out / f"world-{size}-rank-{rank}.pt")
            whole_run(ranks, out / f"run-{size}")
            ranks.wait()

        children = [forked(lambda rank=rank: share(rank), out / f"log-{size}") for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise SystemExit(f"{size} processes ended with {codes}: {(out / f'log-{size}').read_text()[-3000:]}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def started(size: int, folder: Path, log: Path, *more: str) -> list[int]:
    """The processes of a run, as a launcher starts them."""
    port = free_port()

    def act(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
        sys.argv = ["dpg", *KILLED, "--out", str(folder), *more]
        dpg()

    return [forked(lambda rank=rank: act(rank), log) for rank in range(size)]


def kill(out: Path) -> None:
    """Kill one process of each run once it has made two outer steps more; the folder goes on with another number of them."""
    figures = []
    for size, victim in ((2, 1), (3, 0), (4, 2)):
        log = out / f"log-{size}"
        metrics = out / "run" / "metrics.jsonl"
        before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        children = started(size, out / "run", log)
        deadline = time.monotonic() + 90
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < before + 3:
            if time.monotonic() > deadline or os.waitpid(-1, os.WNOHANG)[0]:
                raise SystemExit(f"no outer step: {log.read_text()}")
            time.sleep(0.02)
        os.kill(children[victim], signal.SIGKILL)
        began = time.monotonic()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        lines = [line for line in log.read_text().splitlines() if line.startswith("dpg:") or "Traceback" in line]
        seconds = round(time.monotonic() - began, 2)
        figures.append({"size": size, "victim": victim, "codes": codes, "seconds": seconds, "lines": lines})
    sys.stdout.write(json.dumps(figures))


def by_trl(ranks: Ranks, folder: Path, *, shuffled: bool = False, resume: bool = False, stop_after: int = 0) -> None:
    """One run by TRL; shuffled rewards are those of other completions, the same on every rank."""
    config, stop = resolve(find("pattern-67.tiny").data(), BY_TRL), StopRequest()
    if shuffled:
        plain, order = reward.unit_spread, torch.Generator().manual_seed(0)
        reward.unit_spread = lambda values: plain(values)[torch.randperm(len(values), generator=order)]

    def on_step(report: Any) -> None:
        stop.asked = report.step + 1 == stop_after

    try:
        if ranks.first:
            execute(config, RunFolder(folder), ranks=ranks, on_step=on_step, stop=stop, resume=resume)
        else:
            assist(config, str(folder), ranks, stop)
    except InterruptedRunError:
        assert stop_after


def trl(out: Path) -> None:
    """Runs by one and two processes, with and without shuffled rewards; one that two begin and one goes on with."""

    def share(rank: int, size: int, port: int, options: dict[str, Any], folder: Path) -> None:
        if size > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
            PartialState(cpu=True)
        by_trl(Ranks.joined(), folder, **options)

    for size, options, name in (
        (1, {}, "one"),
        (1, {"shuffled": True}, "one-shuffled"),
        (2, {}, "two"),
        (2, {"shuffled": True}, "two-shuffled"),
        (2, {"stop_after": 5}, "resumed"),
        (1, {"resume": True}, "resumed"),
    ):
        port = free_port()
        acts = [partial(share, rank, size, port, options, out / name) for rank in range(size)]
        children = [forked(act, out / "log") for act in acts]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise SystemExit(f"{name} ended with {codes}: {(out / 'log').read_text()[-4000:]}")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    {"engine": engine, "kill": kill, "trl": trl}[sys.argv[1]](Path(sys.argv[2]))
