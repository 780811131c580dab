"""Fluency against effect: l2-shrink on the embedded pretrained model, with a KL penalty to the starting generator swept.

The effect is the fall of the head's norm by fresh completions, less the control's. Fluency is the perplexity of those
completions under the starting generator (given their prompts), and the share that is one well-formed sentence of the
embedded world.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.study import world
from benchmarks.study.pages import Axes, pick, several, table
from benchmarks.study.statistics import geometric, interval
from dpg_cli.driver.build import Built, build
from dpg_cli.engine.generator.policy import completion_logits
from dpg_cli.engine.records import Rollout
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find_task, resolve
from dpg_cli.tiny.world import language_of

NAME = "fluency"
PANELS = 1
CAPTION = "Fall of the norm beyond the control's, against perplexity under the starting generator, by KL coefficient"
SEEDS = (0, 1, 2)
KL = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
STEPS, QUICK_STEPS = 30, 8
JUDGED = 256


def cells(quick: bool) -> list[dict[str, Any]]:
    """Each coefficient at each seed."""
    seeds, steps = (SEEDS[:1], QUICK_STEPS) if quick else (SEEDS, STEPS)
    return [{"kl": kl, "seed": seed, "steps": steps} for seed in seeds for kl in (KL[::3] if quick else KL)]


def settings_of(kl: float, seed: int, steps: int) -> Config:
    """The preset l2-shrink.tiny with half as many completions an outer step, free to end, and the penalty."""
    over = [f"policy.kl={kl}", f"seed={seed}", f"steps={steps}", "prompts.per_step=16", "inner.batch_size=64",
            "policy.minibatch=64", "rollout.min_tokens=1", "inner.normalization=example"]  # fmt: skip
    return resolve(find_task("l2-shrink", "tiny").data(), over)


@torch.no_grad()
def perplexity(start: Built, rollout: Rollout) -> float:
    """exp of the mean loss of the completions' tokens under the starting generator."""
    log_pi = torch.log_softmax(completion_logits(start.players.generator.model, rollout), -1)
    chosen = log_pi.gather(-1, rollout.ids_N_K[..., None])[..., 0]
    return math.exp(-float((chosen * rollout.mask_N_K).sum() / rollout.mask_N_K.sum()))


def well_formed(start: Built, rollout: Rollout) -> float:
    """Share of completions that are a sentence of the embedded world in any language."""
    rows = [row[keep].tolist() for row, keep in zip(rollout.ids_N_K, rollout.mask_N_K, strict=True)]
    texts = start.players.generator.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return sum(language_of(text.strip()) is not None for text in texts) / len(texts)


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Effect and fluency of the trained generator and of the untrained one."""
    config = settings_of(**settings)
    built, start = world.trained(config), build(config)
    row: dict[str, Any] = {}
    for side, players in (("", built), ("start_", start)):
        rollout = world.fresh(players, JUDGED, 33 + settings["seed"])
        result = world.outcome(players, world.examples_of(players, rollout), batch_size=JUDGED)
        row |= {
            f"{side}norm_change": result.measures["norm_change"],
            f"{side}perplexity": perplexity(start, rollout),
            f"{side}well_formed": well_formed(start, rollout),
            f"{side}entropy": rollout.entropy,
        }
    return [row]


def section(rows: list[dict[str, Any]]) -> str:
    """Fluency's part of the page."""

    def column(chosen: list[dict[str, Any]], key: str, form: str) -> str:
        return interval([row[key] for row in chosen]).text(form)

    def spread(chosen: list[dict[str, Any]], key: str) -> str:
        mean, low, high = geometric([row[key] for row in chosen])
        return f"{mean:.3g} ({low:.3g}-{high:.3g})"

    start = list({row["seed"]: row for row in rows}.values())  # the same for every coefficient
    lines = []
    for kl in several(row["kl"] for row in rows):
        chosen = pick(rows, kl=kl)
        beyond = interval([row["norm_change"] - row["start_norm_change"] for row in chosen]).text(".4f")
        lines.append(
            [f"{kl:g}", str(len(chosen)), column(chosen, "norm_change", ".4f"), beyond, spread(chosen, "perplexity"),
             column(chosen, "well_formed", ".3f")]
        )  # fmt: skip
    lines.append(
        ["untrained", str(len(start)), column(start, "start_norm_change", ".4f"), "-", spread(start, "start_perplexity"),
         column(start, "start_well_formed", ".3f")]
    )  # fmt: skip
    return "\n".join(
        [
            "## Fluency against effect",
            "",
            "`python -m benchmarks.study --only fluency`. l2-shrink on the embedded pretrained model, "
            f"{rows[0]['steps']} outer steps of 64 completions that may end",
            f"freely, `expected` credit with γ = 0.5; {JUDGED} fresh completions, one inner step. Perplexity is that of the completions under the",
            "starting generator; well-formed: one sentence of the embedded world in any language.",
            "",
            "**Expected**: the KL penalty buys fluency with effect. **Came**: "
            f"without it nothing fluent is left: perplexity {spread(pick(rows, kl=0.0), 'perplexity')}, untrained {spread(start, 'start_perplexity')}. ",
            "A coefficient that keeps the sentences well-formed takes most of the effect. Perplexities: geometric mean and range over seeds.",
            "",
            table(
                ["KL coefficient", "seeds", "change of the norm", "beyond the control", "perplexity", "well-formed"],
                lines,
            ),
        ]
    )


def figure(rows: list[dict[str, Any]], axes: Axes) -> None:
    """Effect against perplexity."""
    for kl in several(row["kl"] for row in rows):
        chosen = pick(rows, kl=kl)
        axes[0].scatter(
            [row["perplexity"] for row in chosen],
            [row["start_norm_change"] - row["norm_change"] for row in chosen],
            s=20, label=f"KL {kl:g}",
        )  # fmt: skip
    axes[0].set_xscale("log")
    axes[0].set_xlabel("perplexity under the starting generator")
    axes[0].set_ylabel("fall of the norm beyond the control's")
    axes[0].legend(fontsize=8)
