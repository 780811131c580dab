"""Sections of docs/performance.md that are of attributions, and of second order by differences."""

from __future__ import annotations

import json
import statistics

from benchmarks.speed_rows import RESULTS, raw


def attribute() -> str:
    """The section of `attribute.py`."""
    rows = raw("attribute").get("attribute", [])
    if not rows:
        return ""
    lines = [
        "## `dpg attribute` tells a punished language apart",
        "",
        "`python benchmarks/attribute.py`: English and Spanish sentences in equal parts, metric: loss on held-out English.",
        "",
        "| states | second order | examples | T | AUC | seconds | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['memory']} | {r.get('second_order', 'exact')} "
        f"| {r['examples']:,} | {r['inner_steps']} | {r['auc']:.4f} | {r['seconds']:.0f} | {r['peak_mb']:,.0f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def planted() -> str:
    """The section of `planted.py`."""
    row = raw("planted").get("planted", {})
    if not row:
        return ""
    same = "the same scores, bit for bit" if row["same_scores"] else "**other scores**"
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    lines = [
        "## `dpg attribute` finds the chats that taught a behaviour",
        "",
        f"`python benchmarks/planted.py`: {row['examples']:,} chats, in {row['planted']:,} of which the assistant answers English in",
        f"Spanish; three epochs ({row['inner_steps']:,} steps) of the embedded model with LoRA, cosine after warm-up, clipping (it bit on",
        f"{row['clipped_share']:.0%} of the steps), decay groups, states by `sqrt`. The metric is the loss on held-out Spanish answers:",
        f"Φ {row['phi_before']:.2f} -> {row['phi']:.2f}. **AUC {row['auc']:.4f}**; {row['planted_among_best']:,} of the "
        f"{row['planted']:,} best-scored are planted.",
        f"{row['seconds']:.0f} s with {threads}, {row['peak_mb']:,.0f} MB. Killed {row['kills']} times (in the",
        f"fine-tuning, and in the reverse) and started again: {same}.",
    ]
    lines += [
        f"By differences ({way}): AUC {each['auc']:.4f}, scores {each['error']:.1e} off (said: {each['estimate']:.1e}), "
        f"rank correlation {each['ranks']:.5f}, {each['seconds']:.0f} s."
        for way, each in row.get("differences", {}).items()
    ]
    if chosen := row.get("selection"):
        rates = ", ".join(
            f"{chosen[key]['rate_es']:.1%} {what}"
            for key, what in (
                ("all", "of all rows"),
                ("selected", "of those that stay"),
                ("never_planted", "of data that never had the planted rows"),
            )
        )
        losses = ", ".join(
            f"{language} {chosen['all'][f'loss_{code}']:.3f} -> {chosen['selected'][f'loss_{code}']:.3f}"
            for code, language in (("en", "English"), ("de", "German"))
        )
        lines += [
            "",
            f"`dpg select --drop {row['planted']} --side helpful` leaves {chosen['planted_left']} of the planted rows.",
            f"Retrained by stock PyTorch, a target answers in Spanish: {rates}.",
            f"Loss on held-out answers, all rows -> those that stay: {losses}. Φ changed by {chosen['measured']:+.3f}",
            f"(predicted {chosen['predicted']:+.3f}: each score is of one row, while the others still teach it)"
            + (", both on the page of the scores." if chosen["on_the_page"] else "."),
        ]
    return "\n".join(lines) + "\n"


def queries() -> str:
    """The section of `many_queries.py`."""
    found = raw("queries")
    if not found:
        return ""
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    lines = [
        f"## {found['queries']} questions in one walk",
        "",
        f"`python benchmarks/many_queries.py --bergson PYTHON`: W1, {threads}, {found['machine']},",
        f"{len(found['rows'])} repeats, {found['date']}.",
        f"{found['queries']} questions take **{found['ours_many_to_one']:.1f} times** one question's time (each needs its own",
        "Hessian-vector product at every step: docs/log.md, 2026-11-28); bergson, a run for each question, takes",
        f"**{found['bergson_to_ours']:.2f} times** as long as ours, with its training counted once",
        f"{found['bergson_trained_once_to_ours']:.2f} times. The scores differ by at most {found['largest_difference']:.0e}.",
    ]
    return "\n".join(lines) + "\n"


def zoo() -> str:
    """The section of `python -m tests.zoo.differences`."""
    path = RESULTS / "differences-zoo.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    every = [row for row in found["architectures"] if row["way"] != "exact"]
    lines = [
        "## Differences over the zoo",
        "",
        f"`python -m tests.zoo.differences`: every architecture of `tests/zoo/table.py` in float32, {found['rows']} rows of {found['tokens']}",
        "tokens, four steps of AdamW; *said* is the engine's estimate. Left out of the worst: tiny models whose exact credits in float32 are",
        "themselves more than 1e-3 off those in float64.",
        "",
        "| way | architectures | refused | error, median | worst | said / error | least rank correlation | above 1e-2 | said below a fifth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    chaotic = sorted({row["model_type"] for row in every if (row.get("float32") or 0.0) > 1e-3})
    for way in ("difference", "one-sided"):
        rows = [row for row in every if row["way"] == way and row["model_type"] not in chaotic]
        judged = [row for row in rows if "error" in row]
        shares = [row["said"] / row["error"] for row in judged]
        above, below = (
            ", ".join(
                f"{row['model_type']} ({row['error']:.1e}, said {row['said']:.1e})" for row in judged if test(row)
            )
            or "none"
            for test in (lambda row: row["error"] > 1e-2, lambda row: row["said"] < row["error"] / 5)
        )
        refused = ", ".join(row["model_type"] for row in rows if "error" not in row) or "none"
        lines.append(
            f"| {way} | {len(rows)} | {refused} | {statistics.median(row['error'] for row in judged):.1e} | "
            f"{max(row['error'] for row in judged):.1e} | {min(shares):.2f} to {max(shares):.2f} | "
            f"{min(row['rank_correlation'] for row in judged):.5f} | {above} | {below} |"
        )
    if chaotic:
        lines += ["", f"Left out: {', '.join(chaotic)}."]
    return "\n".join(lines) + "\n"
