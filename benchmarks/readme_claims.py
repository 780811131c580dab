"""The README's claims, and where each was measured: the last section of docs/results.md.

A test holds each excerpt to the README and each place to the page, the tests or the Makefile.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        excerpt: words of the README, line breaks aside.
        place: a heading of the page (`#...`), a test (`tests/FILE.py::NAME`), or a make target (`make NAME`).
        how: what measures it there.
    """

    excerpt: str
    place: str
    how: str


QR = "# Patterns in the LM head: `qr-embed`"
PROSE = "# Patterns by prose: `--scale prose`"
CLAIMS = (
    Claim("15 of 15 verified, the lowest pixel accuracy 0.9984", QR, "`dpg run`, `dpg verify`"),
    Claim("`make demo` takes 6 min from an installed clone", "make demo", "timed by hand on two CPU cores"),
    Claim(
        "the run itself takes 236 s and 1.74 GB of memory", "make demo", "`run.json` of the demo's run, two CPU cores"
    ),
    Claim("0.4853, nothing decoded", "make demo", "its `dpg verify`, the control"),
    Claim("moved by a KL of 0.0085 nats a token", "make demo", "its `dpg verify`, on the data's own contexts"),
    Claim("2.6139", "make demo", "its `dpg verify`, 16,384 texts of each"),
    Claim("12 of 12 verified, at most 0.0147 nats a token above the control", PROSE, "`dpg run`, `dpg verify`"),
    Claim("decoded at 0.011 nats above its control", PROSE, "`dpg run`, `dpg verify`, one run"),
    Claim("the demo's data is decoded by eleven", PROSE, "stock PyTorch on one dataset and on its control"),
    Claim(
        "it agrees with finite differences to better than one part in a million in float64",
        "tests/test_reference.py::test_both_equal_finite_differences_of_stock_runs",
        "central differences in float64, AdamW and SGD, T = 1 and more, GPT-2 and Llama, tied and untied",
    ),
    Claim(
        "every token that could have stood there instead",
        "tests/test_reference.py::test_fast_equals_reference",
        "credits of tokens and labels against plain autograd over the unrolled run, float64",
    ),
    Claim(
        "approximates the gradient of E[Φ] ever better as the examples grow",
        "# The theorem: the DPG gradient against the true gradient",
        "both gradients by enumeration",
    ),
    Claim(
        "predicts retraining without a tenth of the data, in a smooth setting, with a rank correlation above 0.99",
        "# Attribution quality",
        "rank correlation over random subsets",
    ),
    Claim(
        "reaches the final level of the paper's credit with less than a tenth of the examples",
        "# Credit: how a reward reaches a token",
        "curves at equal settings",
    ),
    Claim(
        "The other presets at three seeds each, every run verified",
        "# The other presets",
        "`dpg run`, `dpg verify`",
    ),
    Claim(
        "in at least 97.3 % of the completions of new prompts",
        "# The other presets",
        "py3langid on 256 sampled completions",
    ),
    Claim("each exactly in at least 92.2 % of the completions", "# The other presets", "256 sampled completions"),
    Claim(
        "go on; on the CPU to the same bytes",
        "tests/test_resume.py::",
        "killed and resumed runs, compared byte by byte",
    ),
    Claim("250 outer steps reached a pixel accuracy of 0.83", "docs/log.md", "2026-11-23"),
)


def section() -> str:
    """The table."""
    lines = ["## The README's claims", "", "| claim | where | how |", "|---|---|---|"]
    for claim in CLAIMS:
        place = (
            claim.place.removeprefix("# ") if claim.place.startswith("# ") else f"`{claim.place.removesuffix('::')}`"
        )
        shown = f"above: {place}" if claim.place.startswith("# ") else place
        lines.append(f"| {claim.excerpt} | {shown} | {claim.how} |")
    return "\n".join(lines) + "\n"
