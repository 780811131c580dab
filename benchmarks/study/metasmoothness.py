"""Metasmoothness: what ε, ε_root, the inner learning rate and the inner batch do to learning, and whether `dpg check` foresees it.

Around one setting of pattern-67 in the small world (`expected` credit, γ = 0.5, 60 outer steps of 64 completions) each of the four is
swept alone. Before training `dpg check` gives its verdict on the same settings; afterwards the gain is the pixel accuracy of
the last tenth of the outer steps less that of the untrained generator's first step.
"""

from __future__ import annotations

from typing import Any

from benchmarks.study import world
from benchmarks.study.pages import Axes, pick, several, table
from benchmarks.study.statistics import interval
from dpg_cli.errors import DegenerateError
from dpg_cli.evidence.check import check

NAME = "metasmoothness"
PANELS = 2
CAPTION = "Pixel accuracy at the end over ε (left) and over the inner learning rate (right); colours are the verdict of dpg check"
SEEDS = (0, 1, 2)
STEPS, QUICK_STEPS = 60, 30
BASE = {"eps": 1e-2, "eps_root": 0.0, "lr": 2e-3, "batch_size": 64}
SWEPT: dict[str, tuple[float, ...]] = {
    "eps": (1e-10, 1e-8, 1e-6, 1e-4, 1e-3, 1e-1),
    "eps_root": (1e-10, 1e-8, 1e-6),  # with ε = 1e-8
    "lr": (2e-8, 2e-5, 2e-4, 2e-2, 2e-1, 2.0),
    "batch_size": (8, 16, 32),
}
QUICK = {"eps": (1e-8,), "lr": (2e-4, 2e-1)}


def cells(quick: bool) -> list[dict[str, Any]]:
    """The base, and each value of each setting."""
    made = []
    for seed in SEEDS[:1] if quick else SEEDS:
        common = {"seed": seed, "steps": QUICK_STEPS if quick else STEPS}
        made.append({**common, "swept": "base", **BASE})
        for name, values in (QUICK if quick else SWEPT).items():
            for value in values:
                over = {name: value} | ({"eps": 1e-8} if name == "eps_root" else {})
                made.append({**common, "swept": name, **BASE, **over})
    return made


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdict of the check, and what training came to."""
    inner = {name: settings[name] for name in BASE}
    config = world.resolve(
        world.settings(
            "pattern-67",
            settings["seed"],
            steps=settings["steps"],
            inner=inner,
            credit={"mode": "expected", "discount": 0.5},
        ),
        [],
    )
    report = check(config)
    found = {finding.name: finding for finding in report.findings}
    smooth, sign = found.get("metasmoothness"), found.get("epsilon")
    worst = max((finding.verdict for finding in report.findings), key=("ok", "warn", "fail").index)
    accuracies: list[float] = []
    phis: list[float] = []
    stopped = ""
    try:
        world.trained(
            config,
            lambda step: (
                accuracies.append(step.numbers["pixel_accuracy"]),
                phis.append(step.numbers["phi"]),
            ),
        )
    except DegenerateError as error:
        stopped = error.cause
    last = max(1, len(accuracies) // 10)
    return [
        {
            "verdict": worst,
            "blamed": ", ".join(f"{f.name} ({f.verdict})" for f in report.findings if f.verdict != "ok"),
            "r2": float(smooth.measured["r2"]) if smooth and "r2" in smooth.measured else None,
            "sign_share": float(sign.measured["sign_share"]) if sign and "sign_share" in sign.measured else None,
            "stopped": stopped,
            "first": accuracies[0] if accuracies else None,
            "last": sum(accuracies[-last:]) / last if accuracies and not stopped else None,
            "phi_first": phis[0] if phis else None,
            "phi_last": phis[-1] if phis and not stopped else None,
        }
    ]


LEARNT = 0.15  # gain in pixel accuracy that counts as learning


def gain(row: dict[str, Any]) -> float:
    """Pixel accuracy at the end less that of the first outer step; 0 where the run was stopped."""
    return 0.0 if row["last"] is None else row["last"] - row["first"]


def section(rows: list[dict[str, Any]]) -> str:
    """Metasmoothness's part of the page."""
    keys = sorted({(row["swept"], *(row[name] for name in BASE)) for row in rows})
    lines = []
    for key in keys:
        chosen = pick(rows, swept=key[0], **dict(zip(BASE, key[1:], strict=True)))
        verdicts = ", ".join(several(row["verdict"] for row in chosen))
        blamed = several(part for row in chosen for part in row["blamed"].split(", ") if part)
        ends = [row["last"] for row in chosen if row["last"] is not None]
        lines.append(
            [
                key[0], *(f"{value:g}" for value in key[1:]), verdicts, ", ".join(blamed) or "-",
                interval(ends).text() if ends else "stopped", f"{sum(map(gain, chosen)) / len(chosen):+.3f}",
            ]
        )  # fmt: skip
    by_verdict = {word: [gain(row) for row in rows if row["verdict"] == word] for word in ("ok", "warn", "fail")}
    counts = "; ".join(
        f"{word}: {sum(value >= LEARNT for value in values)} of {len(values)} runs learnt, mean gain {sum(values) / len(values):+.3f}"
        for word, values in by_verdict.items()
        if values
    )
    return "\n".join(
        [
            "## Metasmoothness, and whether `dpg check` foresees it",
            "",
            f"`python -m benchmarks.study --only metasmoothness`. pattern-67 in the small world, `expected` credit with γ = 0.5, {rows[0]['steps']} outer",
            f"steps of 64 completions, {len(several(row['seed'] for row in rows))} seeds; one setting swept at a time around ε = {BASE['eps']:g}, ε_root = 0, lr = {BASE['lr']:g}, B = {BASE['batch_size']}",
            "(ε_root with ε = 1e-8). `dpg check` runs on the same settings before training.",
            "",
            f"**Expected**: where the check fails nothing is learnt, where it is ok the pattern is. A run counts as having learnt from a gain of {LEARNT}.",
            f"**Came**: {counts}. So ok is to be relied on here, and fail means slower learning more often than none: `expected` credit",
            "needs only the direction of rewards, which a bent metric, or a sign regime at T = 1, often leaves.",
            "",
            table(
                ["swept", "ε", "ε_root", "lr", "B", "verdict", "by which check", "pixel accuracy at the end", "gain"],
                lines,
            ),
        ]
    )


def figure(rows: list[dict[str, Any]], axes: Axes) -> None:
    """The end over ε and over the learning rate."""
    colours = {"ok": "tab:green", "warn": "tab:orange", "fail": "tab:red"}
    base = pick(rows, swept="base")
    for panel, name in zip(axes, ("eps", "lr"), strict=True):
        for word, colour in colours.items():
            chosen = [row for row in base + pick(rows, swept=name) if row["verdict"] == word]
            heights = [row["first"] or 0.5 if row["last"] is None else row["last"] for row in chosen]
            panel.scatter([row[name] for row in chosen], heights, s=18, color=colour, label=word)
        panel.set_xscale("log")
        panel.set_xlabel({"eps": "ε", "lr": "inner learning rate"}[name])
        panel.set_ylabel("pixel accuracy at the end")
        panel.legend(fontsize=8)
