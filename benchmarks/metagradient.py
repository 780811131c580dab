"""Time and memory of the exact metagradient against plain training and against bergson, in one interleaved run.

    python benchmarks/metagradient.py [--repeats 5] [--workloads W1,T1] [--bergson PYTHON] [--no-memory] [--json] [--out FILE] [--device cuda]

Workloads: GPT-2 architecture from a random init, no dropout, random tokens, AdamW lr 1e-3, β (0.95, 0.975), ε 1e-8, ε_root
1e-8, weight decay 0.01, metric = mean loss of one query batch. "Plain" is the same training by torch.optim.AdamW. The floor
counts matrix products: a plain step is 3F; the reverse costs 2F at t = 0 and 6F at every other step, since it takes 2F from the
step itself. `difference` and `one_sided` are our metagradient with its second order by differences (`second_order`): its time
over plain, bergson's time over it, the error of its token credits against the exact ones and what it estimated of it, the rank
correlation of the examples' credits. W1-MoE is W1 with a mixture of eight experts in place of each MLP (Mixtral), whose experts
run by their own kernels with differences. Ratios are medians over the repeats of the ratio within each. Peak memory is of a
process of its own. PYTHON is one of an environment with bergson 0.26.1 in it; it then takes part in every repeat, and in
float64 its scores are compared with ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("DPG_BENCH_HUGE_PAGES", os.environ.get("THP_MEM_ALLOC_ENABLE", ""))  # our engine sets it

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.engine.inner.head import find_head
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.text_loss import in_pieces, mean_loss

DIFFERENCES = {"difference": "difference", "one_sided": "one-sided"}  # keys of a row, and `second_order`
DEVICE = torch.device(os.environ.get("DPG_BENCH_DEVICE", "cpu"))  # --device, also for the processes that this starts
STATES = "keep"  # --states
SPEC = OptimizerSpec("adamw", lr=1e-3, beta1=0.95, beta2=0.975, eps=1e-8, eps_root=1e-8, weight_decay=0.01)


@dataclass(frozen=True)
class Workload:
    """Width, layers, heads, vocabulary, sequence length, inner steps, batch."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    steps: int
    batch: int
    experts: int = 0


WORKLOADS = {
    "W1": Workload(128, 2, 4, 1024, 64, 8, 32),
    "W1-T32": Workload(128, 2, 4, 1024, 64, 32, 32),
    "W1-MoE": Workload(128, 2, 4, 1024, 64, 8, 32, 8),
    "T1": Workload(128, 2, 4, 1024, 64, 1, 256),
    "T16": Workload(128, 2, 4, 1024, 64, 16, 32),
    "T256": Workload(128, 2, 4, 1024, 64, 256, 32),
    "W3": Workload(768, 12, 12, 50257, 64, 2, 8),
    "G8": Workload(768, 12, 12, 50257, 128, 8, 128),  # for a GPU, as the next
    "G96": Workload(768, 12, 12, 50257, 128, 96, 1024),
    "G96S": Workload(768, 12, 12, 50257, 128, 96, 16),  # as many steps, for minutes
    "D8": Workload(32, 2, 2, 512, 16, 8, 4),  # rehearsals of the two
    "D24": Workload(32, 2, 2, 512, 16, 24, 2),
}


class QueryLoss:
    """Minus the mean loss of one batch, by the library's own closed form of the LM head.

    Args:
        model: the target.
        ids: the batch, (B, S).
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.head, self.pieces = find_head(model), in_pieces(Examples.from_sequences(ids.tolist()).to(ids.device))

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        return -mean_loss(self.head, parameters, model, self.pieces)

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        return {}


def config_of(work: Workload) -> dict[str, Any]:
    """Arguments of `GPT2Config`."""
    return {
        "vocab_size": work.vocabulary, "n_positions": work.length, "n_embd": work.width, "n_layer": work.layers,
        "n_head": work.heads, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def build(work: Workload) -> PreTrainedModel:
    """The target, always the same."""
    torch.manual_seed(0)
    if work.experts:
        config = MixtralConfig(
            vocab_size=work.vocabulary, max_position_embeddings=work.length, hidden_size=work.width,
            intermediate_size=2 * work.width, num_hidden_layers=work.layers, num_attention_heads=work.heads,
            num_key_value_heads=work.heads, num_local_experts=work.experts, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return MixtralForCausalLM(config).eval()
    return GPT2LMHeadModel(GPT2Config(**config_of(work))).eval()


def tokens(work: Workload) -> tuple[Tensor, Tensor]:
    """Training and query tokens, always the same."""
    generator = torch.Generator().manual_seed(1)
    train = torch.randint(0, work.vocabulary, (work.steps * work.batch, work.length), generator=generator)
    return train, torch.randint(0, work.vocabulary, (work.batch, work.length), generator=generator)


def plain(model: PreTrainedModel, work: Workload, ids: Tensor) -> None:
    """Ordinary training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=SPEC.lr, betas=(SPEC.beta1, SPEC.beta2), weight_decay=0.01)
    for start in range(0, len(ids), work.batch):
        batch = ids[start : start + work.batch]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def processor() -> str:
    """What computes."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def floor(steps: int) -> float:
    """Least possible multiple of plain training, by matrix products."""
    return (3 * steps + 2 + 6 * (steps - 1)) / (3 * steps)


class Local:
    """Plain training and our metagradient in this process.

    Args:
        work: the workload.
        dtype: "float32" or "float64".
    """

    def __init__(self, work: Workload, dtype: str = "float32") -> None:
        self.work = work
        self.model = build(work).to(device=DEVICE, dtype=getattr(torch, dtype))
        self.train, query = (part.to(DEVICE) for part in tokens(work))
        self.metric = QueryLoss(self.model, query)
        self.examples = Examples.from_sequences(self.train.tolist()).to(DEVICE)
        self.scores: Tensor | None = None
        self.tokens: Tensor | None = None
        self.stats: dict[str, float] = {}

    def plain(self, bf16: bool = False) -> float:
        """Seconds of plain training; the model's copy is made before. `bf16`: under autocast."""
        model = copy.deepcopy(self.model)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            return timed(lambda: plain(model, self.work, self.train))

    def ours(self, memory: str = "", precision: str = "float32", second_order: str = "exact") -> float:
        """Seconds of our metagradient."""

        def call() -> None:
            result = metagradient(
                self.model, self.examples, SPEC, self.metric, batch_size=self.work.batch,
                memory=memory or STATES, precision=precision, micro_batch=0 if DEVICE.type == "cpu" else 64,
                second_order=second_order,
            )  # type: ignore[arg-type]  # fmt: skip
            self.scores, self.tokens, self.stats = result.example_N.cpu(), result.token_N_S.cpu(), result.stats

        return timed(call)


class Bergson:
    """bergson in a process of its own, one run for each line that it is sent.

    Args:
        python: of its environment.
        work: the workload.
        folder: for the model, the tokens, the scores and its checkpoints.
        dtype: "float32" or "float64".
        queries: of `run(count)`, int64 (Q, rows, length).
    """

    def __init__(
        self, python: str, work: Workload, folder: Path, dtype: str = "float32", queries: Tensor | None = None
    ) -> None:
        train, query = tokens(work)
        self.scores = folder / f"scores-{dtype}.npy"
        spec = {
            "lr": SPEC.lr, "betas": [SPEC.beta1, SPEC.beta2], "eps": SPEC.eps, "eps_root": SPEC.eps_root,
            "weight_decay": SPEC.weight_decay, "batch": work.batch, "config": config_of(work), "dtype": dtype,
            "threads": torch.get_num_threads(), "folder": str(folder), "scores": str(self.scores),
            "weights": str(folder / "model.safetensors"),
            "train": str(folder / "train.npy"), "query": str(folder / "query.npy"),
            "queries": str(folder / "queries.npy"),
        }  # fmt: skip
        if queries is not None:
            np.save(spec["queries"], queries.numpy())
        save_model(build(work), spec["weights"])
        np.save(spec["train"], train.numpy())
        np.save(spec["query"], query.numpy())
        (folder / f"spec-{dtype}.json").write_text(json.dumps(spec))
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "THP_MEM_ALLOC_ENABLE")}
        if os.environ["DPG_BENCH_HUGE_PAGES"]:
            environment["THP_MEM_ALLOC_ENABLE"] = os.environ["DPG_BENCH_HUGE_PAGES"]
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("bergson_adapter.py")), str(folder / f"spec-{dtype}.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "bergson.log").open("w"), text=True,
            env=environment,
        )  # fmt: skip
        self.log = folder / "bergson.log"
        self.peak_bytes = self.training = 0.0

    def run(self, count: int = 0) -> float:
        """Seconds of one metagradient; of those of `count` questions, one after the other."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count or 'run'}\n")
        self.process.stdin.flush()
        line = next((line for line in self.process.stdout if line.startswith("{")), "")  # its imports may print
        if not line:
            raise SystemExit(f"bergson stopped:\n{self.log.read_text()[-2000:]}")
        answer = json.loads(line)
        self.peak_bytes, self.training = answer["peak_bytes"], answer["training"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)
    return time.perf_counter() - started


def peak_bytes(name: str, what: str, memory: str = "keep") -> tuple[float, float]:
    """Peak resident memory of one run in a process of its own, and its seconds."""
    command = [sys.executable, __file__, "--child", json.dumps({"workload": name, "what": what, "memory": memory})]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return answer["peak_bytes"], answer["seconds"]


def child(text: str) -> None:
    """What `peak_bytes` starts."""
    spec = json.loads(text)
    custom = spec["workload"]
    local = Local(Workload(**custom) if isinstance(custom, dict) else WORKLOADS[custom])
    seconds = 0.0
    if spec["what"] != "nothing":
        seconds = local.plain() if spec["what"] == "plain" else local.ours(spec["memory"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated(DEVICE)
    print(json.dumps({"peak_bytes": peak, "seconds": seconds}))


def measure(name: str, repeats: int, bergson: str | None, memory: bool, plain_bf16: bool = False) -> dict[str, Any]:
    """Medians of interleaved timings of one workload."""
    work = WORKLOADS[name]
    row: dict[str, Any] = {"workload": name}
    local = Local(work)
    times: dict[str, list[float]] = {"plain": [], "difference": [], "one_sided": [], "ours": [], "bergson": []}
    near: dict[str, tuple[Tensor, Tensor, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        other = Bergson(bergson, work, Path(folder)) if bergson and not work.experts else None
        for repeat in range(repeats + 1):
            found = {"plain": local.plain()}
            for key, way in DIFFERENCES.items():
                if f"{key}_refused" in row:
                    continue
                try:
                    found[key] = local.ours(second_order=way)
                except DegenerateError as error:  # a mixture's router at a tie
                    row[f"{key}_refused"] = str(error)
                    near.pop(key, None)
                    continue
                assert local.scores is not None
                assert local.tokens is not None
                near[key] = local.scores, local.tokens, local.stats
            found["ours"] = local.ours()
            if other is not None:
                found["bergson"] = other.run()
            print(name, repeat, {key: round(seconds, 3) for key, seconds in found.items()}, file=sys.stderr)
            for key, seconds in found.items():
                if repeat or repeats == 0:  # the first round warms up
                    times[key].append(seconds)
        row |= {f"{key}_s": statistics.median(values) for key, values in times.items() if values}
        row["ratio"] = median_ratio(times["ours"], times["plain"])
        row["floor"] = floor(work.steps)
        row["times"] = times
        if plain_bf16:
            row["plain_bf16_s"] = local.plain(bf16=True)
        exact = local.scores
        assert exact is not None
        assert local.tokens is not None
        for key, (scores, each, stats) in near.items():
            row[f"{key}_ratio"] = median_ratio(times[key], times["plain"])
            row[f"{key}_error"] = float((each - local.tokens).norm() / local.tokens.norm())
            row[f"{key}_estimate"] = stats["difference_error"]
            row[f"{key}_ranks"] = rank_correlation(scores, exact)
            if other is not None:
                row[f"{key}_speedup"] = median_ratio(times["bergson"], times[key])
        try:
            if not work.experts:
                row["bf16_s"] = local.ours(precision="bf16")
                assert local.scores is not None
                row["bf16_error"] = float((local.scores - exact).norm() / exact.norm())
        except DegenerateError as error:
            row["bf16_refused"] = str(error)
        local.scores = exact
        if other is not None:
            other.close()
            row["bergson_ratio"] = median_ratio(times["bergson"], times["plain"])
            row["speedup"] = median_ratio(times["bergson"], times["ours"])
            row["bergson_peak_mb"] = other.peak_bytes / 1e6
            assert local.scores is not None
            theirs = -torch.from_numpy(np.load(other.scores))
            row["agreement_float32"] = float((local.scores.double() - theirs).norm() / theirs.norm())
    if memory:
        for what in ("plain", "ours"):
            row[f"{what}_peak_mb"] = peak_bytes(name, what)[0] / 1e6
    return row


def agreement(name: str, bergson: str) -> float:
    """Relative difference of our scores from bergson's in float64."""
    with tempfile.TemporaryDirectory() as folder:
        other = Bergson(bergson, WORKLOADS[name], Path(folder), "float64")
        other.run()
        other.close()
        local = Local(WORKLOADS[name], "float64")
        local.ours()
        theirs = -torch.from_numpy(np.load(other.scores))  # its metric is the loss, ours minus the loss
        assert local.scores is not None
        return float((local.scores - theirs).norm() / theirs.norm())


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, without ties."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios within each repeat: what disturbs one repeat disturbs both of its runs."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


COLUMNS = {
    "workload": ("workload", "{:<9}"), "plain_s": ("plain s", "{:>9.3f}"), "ours_s": ("ours s", "{:>9.3f}"),
    "ratio": ("ours/plain", "{:>11.2f}"), "floor": ("floor", "{:>6.2f}"), "plain_peak_mb": ("plain MB", "{:>9.0f}"),
    "ours_peak_mb": ("ours MB", "{:>8.0f}"), "bergson_s": ("bergson s", "{:>10.3f}"),
    "bergson_ratio": ("bergson/plain", "{:>14.2f}"), "speedup": ("bergson/ours", "{:>13.2f}"),
    "bergson_peak_mb": ("bergson MB", "{:>11.0f}"), "agreement_float32": ("difference", "{:>11.1e}"),
    "bf16_error": ("bf16 error", "{:>11.1e}"),
} | {
    f"{key}_{what}": (f"{title}{name}", form)
    for key, name in (("difference", "differences"), ("one_sided", "one-sided"))
    for what, title, form in (
        ("ratio", "plain x ", "{:>20.2f}"), ("speedup", "bergson/", "{:>20.2f}"), ("error", "error of ", "{:>21.1e}"),
        ("estimate", "said of ", "{:>20.1e}"), ("ranks", "ranks of ", "{:>21.5f}"),
    )
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows with the columns that any of them has."""
    shown = {key: value for key, value in COLUMNS.items() if any(key in row for row in rows)}
    blank = {key: len(form.format(0 if key != "workload" else "")) for key, (_, form) in shown.items()}
    lines = [
        "".join(
            title.ljust(blank[key]) if key == "workload" else title.rjust(blank[key])
            for key, (title, _) in shown.items()
        )
    ]
    for row in rows:
        lines.append(
            "".join(form.format(row[key]) if key in row else " " * blank[key] for key, (_, form) in shown.items())
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    transformers_logging.set_verbosity_error()
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workloads", default="W1,T1")
    parser.add_argument("--bergson", metavar="PYTHON", help="python of an environment with bergson 0.26.1")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with the workloads G8 and G96")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--no-agreement", action="store_true", help="leave the comparison in float64 out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--states", choices=("keep", "sqrt", "offload"), default="keep", help="of our inner run")
    parser.add_argument("--plain-bf16", action="store_true", help="also plain training under autocast")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    global DEVICE, STATES
    DEVICE, STATES = torch.device(options.device), options.states
    os.environ["DPG_BENCH_DEVICE"] = options.device
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "processor": processor(), "repeats": options.repeats,
    }  # fmt: skip

    def text() -> str:
        sizes = {row["workload"]: asdict(WORKLOADS[row["workload"]]) for row in rows}
        return json.dumps(about | {"rows": rows, "sizes": sizes}, indent=2)

    for name in options.workloads.split(","):
        rows.append(measure(name, options.repeats, options.bergson, not options.no_memory, options.plain_bf16))
        print(f"{name} done", file=sys.stderr)
        if options.out:  # as it goes: a long run may be cut off
            options.out.write_text(text() + "\n", encoding="utf-8")
    if options.bergson and not options.no_agreement:
        about["agreement_float64"] = agreement(rows[0]["workload"], options.bergson)
        if options.out:
            options.out.write_text(text() + "\n", encoding="utf-8")
    if options.json:
        print(text())
        return
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows))


if __name__ == "__main__":
    main()
