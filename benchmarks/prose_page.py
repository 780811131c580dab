"""The part of docs/results.md on patterns by fluent data, from the raw rows of `prose.py`, `prose_recipes.py`, `prose_best.py`."""

from __future__ import annotations

from typing import Any

from benchmarks import prose, prose_best, prose_recipes
from benchmarks.study.pages import table

PIXELS, KAPPA, LENGTH, MARGIN = 441, 2.0, 32, 4.5  # of the QR code and its preset
READERS = ("starting generator", "prose-reader")
HEADS = {
    "payloads": "32,768 examples (pattern-67: 4,096), the presets as they are:",
    "few": "8,192 examples, a budget of 0.1 nats a token:",
    "other": "Generator `prose-reader` (another width and seed), target `prose`, a budget of 0.06:",
}


def section() -> str:
    """All of it; empty without rows."""
    rows = prose.rows()
    if not rows:
        return ""
    own = [row for row in rows if row["group"] == "payloads"]
    read = sum(row["verified"] for row in own)
    worst = max(row["nats"][READERS[0]][0] for row in own)
    parts = [
        "## Patterns by prose: `--scale prose`",
        "",
        "`python benchmarks/prose.py`: `dpg run` and `dpg verify`. The shipped model of prose is generator and target; stock AdamW",
        "trains the target in one step on drawn completions of 32 tokens. Nats a token are above the control's, by the starting",
        "generator and by `prose-reader` (where that is the generator, by `prose`); KL is that of the trained generator from the",
        "starting one, on the data. Told apart: the",
        "area under the curve from one example and from a hundred, by token and bigram counts. One thread, other work beside it:",
        "the seconds are no measurement of speed.",
        "",
        f"**{read} of {len(own)} runs of the presets verified; at most {worst:.4f} nats a token above the control.**",
        "",
    ]
    for group, head in HEADS.items():
        if chosen := [row for row in rows if row["group"] == group]:
            parts += [head, "", runs(chosen), ""]
    return "\n".join([*parts, *frontier(rows), *recipes(), ""])


def runs(rows: list[dict[str, Any]]) -> str:
    """A table of runs."""
    columns = [
        "case",
        "seed",
        "pixels",
        "read",
        "control",
        "+ nats, start",
        "+ nats, reader",
        "KL",
        "told apart",
        "outer steps x completions",
        "verified",
    ]
    return table(columns, [line(row) for row in sorted(rows, key=lambda row: (row["case"], row["seed"]))])


def line(row: dict[str, Any]) -> list[str]:
    """A row of that table."""
    data, control = row["data"], row["control"]
    other = next((reader for reader in row["nats"] if reader != READERS[0]), READERS[1])
    nats = [row["nats"].get(reader) for reader in (READERS[0], other)]
    one, many = row["telling"]["token and bigram counts"]
    each = row["completions"] // row["outer_steps"]
    return [
        row["case"],
        str(row["seed"]),
        f"{data['pixel_accuracy']:.4f}",
        f"`{data['payload']}`" if data["payload"] else "-",
        f"{control['pixel_accuracy']:.4f}" + (f", `{control['payload']}`" if control["payload"] else ""),
        *("-" if value is None else f"{value[0]:.4f} ± {value[1]:.4f}" for value in nats),
        f"{row['kl']:.4f}",
        f"{one:.3f}, {many:.3f}",
        f"{row['outer_steps']} x {each:,}",
        "yes" if row["verified"] else "**no**",
    ]


def law(examples: int) -> float:
    """The least KL a token that puts every pixel the preset's margin from its wrong side, DESIGN §9."""
    return MARGIN**2 * PIXELS * KAPPA / (2 * examples * LENGTH)


def frontier(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy against nats: natural steps, AdamW, and the best of the starting generator's samples."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["data"]["examples"], row["case"], row["seed"])):
        if not row["case"].startswith("qr DPG") or "other" in row["case"]:
            continue
        examples, start = row["data"]["examples"], row["nats"][READERS[0]]
        how = row["case"].split("AdamW, ")[-1].join(("AdamW, ", "")) if "AdamW" in row["case"] else "natural"
        lines.append(
            [
                how,
                f"{examples:,}",
                str(row["seed"]),
                f"{row['data']['pixel_accuracy']:.4f}",
                f"`{row['data']['payload']}`" if row["data"]["payload"] else "-",
                f"{start[0]:.4f} ± {start[1]:.4f}",
                f"{row['kl']:.4f}",
                f"{law(examples):.4f}" if how == "natural" else "-",
            ]
        )
    for row in prose_best.rows():
        lines.append(
            [
                f"best of {row['pool'] / row['examples']:.3g}",
                f"{row['examples']:,}",
                "0",
                f"{row['pixel_accuracy']:.4f}",
                f"`{row['payload']}`" if row["payload"] else "-",
                f"{row['nats'][0]:.4f} ± {row['nats'][1]:.4f}",
                "-",
                "-",
            ]
        )
    if not lines:
        return []
    return [
        "The frontier. Law: z² · pixels · κ / (2 · tokens) with κ = 2 and the preset's z = 4.5, the least KL. Best of n:",
        "`python benchmarks/prose_best.py`, the samples of the starting generator with the largest exact credit.",
        "",
        table(["method", "examples", "seed", "pixels", "read", "+ nats, start", "KL", "law"], lines),
        "",
    ]


def recipes() -> list[str]:
    """What other recipes read back from the same data."""
    rows = prose_recipes.rows()
    if not rows:
        return []
    lines = [
        [
            row["recipe"],
            str(row["steps"]),
            *(f"{row[side]['pixel_accuracy']:.4f}" for side in ("train", "control")),
            "yes" if row["read"] else "no",
        ]
        for row in rows
    ]
    return [
        "One dataset under recipes that it was not made for, `python benchmarks/prose_recipes.py`, stock PyTorch: signs of the head's",
        f"change after training. **{sum(row['read'] for row in rows)} of {len(rows)} decoded, no control.**"
        if not any(row["control"]["payload"] for row in rows)
        else "change after training.",
        "",
        table(["recipe", "steps", "pixels", "control", "decoded"], lines),
        "",
    ]
