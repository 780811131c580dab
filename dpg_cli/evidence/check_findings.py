"""What `dpg check` reports: findings with a verdict, the measured numbers, and the setting to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VerdictWord = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was measured.

    Attributes:
        name: what.
        verdict: "ok"; "warn", learning will be slow or doubtful; "fail", nothing can be learnt.
        says: the measurement in a sentence.
        measured: the numbers by name.
        setting: the one to change, and `suggested`, its value as `--set` takes it; empty when all is well.
    """

    name: str
    verdict: VerdictWord
    says: str
    measured: Mapping[str, float | str | bool] = field(default_factory=dict)
    setting: str = ""
    suggested: str = ""

    @property
    def remedy(self) -> str:
        """The change as a flag, or nothing."""
        return f"--set {self.setting}={self.suggested}" if self.setting else ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite become null."""
        measured = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in self.measured.items()
        }
        return {
            "name": self.name,
            "verdict": self.verdict,
            "says": self.says,
            "measured": measured,
            "setting": self.setting or None,
            "suggested": self.suggested or None,
        }


@dataclass(frozen=True)
class CheckReport:
    """All findings on a setting.

    Attributes:
        task: the task.
        completions: how many completions it was measured on.
        of: how many an outer step has.
        findings: in the order of an outer step.
    """

    task: str
    completions: int
    of: int
    findings: list[Finding]

    @property
    def learnable(self) -> bool:
        """No check fails."""
        return all(finding.verdict != "fail" for finding in self.findings)

    @property
    def failures(self) -> list[Finding]:
        """The checks that fail."""
        return [finding for finding in self.findings if finding.verdict == "fail"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.task,
            "learnable": self.learnable,
            "completions": self.completions,
            "completions_per_step": self.of,
            "checks": [finding.as_dict() for finding in self.findings],
        }

    def lines(self) -> list[str]:
        """For people."""
        width = max(len(finding.name) for finding in self.findings)
        rows = [f"measured on {self.completions:,} of an outer step's {self.of:,} completions"]
        for finding in self.findings:
            rows.append(f"{finding.verdict:<5} {finding.name:<{width}}  {finding.says}")
            if finding.remedy:
                rows.append(f"{'':<{width + 8}}try {finding.remedy}")
        return rows


def rounded(value: float) -> str:
    """A value to suggest, to one significant digit."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+") if value < 0.1 or value >= 1000 else f"{value:.2g}"
