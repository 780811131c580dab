"""The paper's five experiments, and a 70B target, laid out on 1, 8 and 64 GPUs by the cost model `dpg_cli/planning/scaling.py`.

    python benchmarks/scaling.py            print the tables as Markdown
    python benchmarks/scaling.py --write    put them into docs/scaling.md, between its markers

Nothing is measured here. Device rates are the maker's data sheet for an H100 SXM; the efficiency is an assumption, stated in
the table's heading. A test holds docs/scaling.md to what this prints.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dpg_cli.planning.job import Device, Job, Size, job_of
from dpg_cli.planning.scaling import Prediction, predict
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find, resolve

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- begin: benchmarks/scaling.py -->", "<!-- end: benchmarks/scaling.py -->"
WORLDS = (1, 8, 64)
EFFICIENCY = 0.4  # assumed
# Data sheet, H100 SXM: 67 TFLOP/s float32, 989 bfloat16, 80 GB at 3.35 TB/s; 450 GB/s a direction by NVLink, 50 GB/s by a 400 Gbit/s adapter.
H100 = Device("H100 SXM", 80e9, 67e12, EFFICIENCY, 3.35e12, 450e9, 50e9)
H100_BF16 = replace(H100, name="H100 SXM, bfloat16", rate=989e12)
GPT2 = Size(124_439_808, 12, 768, 12, 50_257, 768).untied()  # sizes from the models' published configurations
LLAMA_1B = Size(1_235_814_400, 16, 2048, 32, 128_256, 512)
LLAMA_70B = Size(70_553_706_496, 80, 8192, 64, 128_256, 1024)
TARGETS = {"openai-community/gpt2": GPT2, "meta-llama/Llama-3.2-1B-Instruct": LLAMA_1B.untied()}
TASKS = ("qr-embed", "pattern-67", "l2-shrink", "language-rephrase", "uuid-emit")


def job(task: str, states: str = "sqrt") -> tuple[Config, Job]:
    """A paper preset, with few states kept where T is large."""
    config = resolve(find(f"{task}.paper").data(), [f'inner.states="{states}"', "inner.micro_batch=8"])
    return config, job_of(config, LLAMA_1B, TARGETS[config.models.target])


def row(name: str, work: Job, predictions: list[Prediction]) -> str:
    """One line of the table."""
    cells = [f"{p.seconds:,.0f} s, {p.bytes / 1e9:,.0f} GB" for p in predictions]
    hours = [f"{p.seconds * work.steps / 3600:,.0f}" for p in predictions]
    last = predictions[-1].largest()
    return f"| {name} | {work.inner_steps} | {' | '.join(cells)} | {' / '.join(hours)} h | {last[0]}; {last[1]} |"


def experiments() -> list[str]:
    """The five experiments."""
    lines = [
        "| experiment | T | 1 GPU: an outer step, a rank | 8 GPUs | 64 GPUs | whole run, 1 / 8 / 64 | most time; most memory at 64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        _, work = job(task)
        lines.append(row(task, work, [predict(work, H100, world) for world in WORLDS]))
    return lines


def seventy() -> list[str]:
    """What a 70B target would hold: language-rephrase's other sizes, T = 1 and 8, on 64 GPUs."""
    lines = [
        "| T | vectors | a rank, as built | vectors sharded over 64 ranks (not built) | operations | an outer step, 64 GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for steps in (1, 8):
        _, work = job("language-rephrase")
        work = replace(work, target=LLAMA_70B, inner_batch=work.examples // steps, element=2, micro_batch=1)
        found = predict(work, H100_BF16, 64)
        states = found.bytes_by_part["states"]
        lines.append(
            f"| {steps} | {states / LLAMA_70B.parameters / work.element:.0f} | {states / 1e9:,.0f} GB | {states / 64e9:,.0f} GB "
            f"| {found.flops / 1e15:,.0f} PFLOP | {found.seconds - found.seconds_by_part['own vectors']:,.0f} s |"
        )
    return lines


def parts() -> list[str]:
    """Where an outer step's time goes."""
    lines = ["| experiment | GPUs | rollout | inner run | reverse | policy | own vectors | sending |", "|---" * 8 + "|"]
    for task in ("qr-embed", "language-rephrase"):
        _, work = job(task)
        for world in WORLDS:
            times = predict(work, H100, world).seconds_by_part
            cells = [
                f"{times[name]:,.1f}"
                for name in ("rollout", "inner run", "reverse", "policy", "own vectors", "sending")
            ]
            lines.append(f"| {task} | {world} | {' | '.join(cells)} |")
    return lines


def text() -> str:
    """All tables."""
    heading = (
        f"Predicted, not measured: H100 SXM by its data sheet (float32 at 67 TFLOP/s), {EFFICIENCY:.0%} of it assumed to be reached, "
        '`inner.states = "sqrt"`, prompts at their longest, rollouts by dpg\'s own sampler.'
    )
    return "\n".join(
        [
            heading, "", *experiments(), "", "Seconds of an outer step by part:", "", *parts(), "",
            "A 70B target, language-rephrase's other sizes, bfloat16:", "", *seventy(),
        ]
    )  # fmt: skip


def main() -> None:
    """Print, or write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(text())
        return
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n\n{text()}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
