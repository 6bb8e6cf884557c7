"""What is a finding? One thing that was looked at, with its verdict, likely cause and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "unclear", "failed", "absent"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        value: what was found; None where the run has nothing to look at.
        limit: what separates good from bad.
        verdict: "unclear" is within the limit, yet not by more than chance; "absent" has no value.
        cause: the likely cause and what to try; where all is well, what was seen.
    """

    name: str
    value: float | None
    limit: float | None
    verdict: Verdict
    cause: str
