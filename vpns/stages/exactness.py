"""Are the kernels' gradients as exact as the reference's? Judged over all iterations of a check.

A ReLU or a maximum that a rounding turns the other way moves the gradients before it by a thousandth and
more: at 224 px in every other iteration, of the kernels' network or of the reference's. So an error of the
kernels is not held against the reference's in the same iteration: of each tensor, the kernels' lower quartile
may be a few times the reference's upper one, and their largest error a few times the largest of all of the
reference's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vpns.complaint import CheckError

# The reference's error is one sample of what roundings do: ours may be this many times as large, more where
# the gradient is zero but for roundings (of a bias before a batch norm).
_TIMES, _TIMES_OF_NOISE = 4, 10


@dataclass(frozen=True)
class _Error:
    """How far a gradient is off, as shares of its size: by the kernels and by the reference."""

    iteration: int
    ours: float
    theirs: float


class Exactness:
    """Errors of all gradients of a stage.

    Args:
        floor: share of its size that a gradient may be off even where the reference is right by luck.
    """

    def __init__(self, stage: str, floor: float) -> None:
        self._stage, self._floor = stage, floor
        self._errors: dict[str, list[_Error]] = {}

    def add(self, name: str, iteration: int, ours: float, theirs: float, size: float) -> None:
        """Norms of a gradient's errors and of itself, in float64.

        Raises:
            CheckError: where ours is not a number.
        """
        if not math.isfinite(ours):
            raise CheckError(
                f"{self._stage}, iteration {iteration}: expected a finite gradient of {name}, got {ours}"
            )
        size = max(size, 1e-300)
        self._errors.setdefault(name, []).append(_Error(iteration, ours / size, theirs / size))

    def judge(self) -> float:
        """The largest share of its bound that any gradient is off.

        Raises:
            CheckError: naming stage, iteration and tensor, where it is more than the bound.
        """
        known = [error.theirs for errors in self._errors.values() for error in errors if error.theirs < 0.5]
        largest = max(known, default=0.0)
        worst = 0.0
        for name, errors in self._errors.items():
            by_size = sorted(error.theirs for error in errors)
            quarter = (len(errors) - 1) // 4
            upper, most = by_size[-1 - quarter], max(by_size[-1], largest)
            if by_size[-1] >= 0.5:
                upper, most = (_TIMES_OF_NOISE / _TIMES * size for size in (upper, by_size[-1]))
            for found, theirs in (
                (sorted(errors, key=lambda error: error.ours)[quarter], upper),
                (max(errors, key=lambda error: error.ours), most),
            ):
                bound = _TIMES * theirs + self._floor
                if found.ours > bound:
                    first = next(error for error in errors if error.ours > bound)
                    raise CheckError(
                        f"{self._stage}, iteration {first.iteration}: expected the gradient of {name} within "
                        f"{bound:.3g} of float64, as a share of it, got {first.ours:.3g} "
                        f"(the reference: {first.theirs:.3g}; --backend reference trains by it)"
                    )
                worst = max(worst, found.ours / bound)
        return worst
