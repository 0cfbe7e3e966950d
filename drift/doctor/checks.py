"""What the doctor found: one line a check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "unsure", "failed"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check.

    Args:
        name: what was looked at.
        status: `unsure` where the policy gives no evidence either way, as a fresh one.
        found: what was seen, with numbers.
        fix: what is likely wrong and what to do; empty unless failed.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def failures(checks: Sequence[Check]) -> str:
    """What failed and the likely fixes, in one text; empty where nothing did."""
    return "; ".join(f"{c.name}: {c.found}: {c.fix}" for c in checks if c.status == "failed")


def table(checks: Sequence[Check]) -> str:
    """The checks as a table for the screen."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<7} {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<7} {'':<{width}}  -> {check.fix}")
    return "\n".join(lines)
