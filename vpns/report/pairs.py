"""Do two networks err on the same images? Counts per image, and how sure their difference is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Two networks on the same images.

    Args:
        difference: accuracy of the second minus that of the first, in points.
        standard_error: of the difference, in points.
        p_value: how often chance alone would split the images that one network gets right at least this
            unevenly (exact two-sided sign test).
    """

    first: str
    second: str
    images: int
    both_right: int
    only_first: int
    only_second: int
    both_wrong: int
    difference: float
    standard_error: float
    p_value: float


def compare(first: str, first_right: Tensor, second: str, second_right: Tensor) -> Pair:
    """Compare two networks by which images [N] each gets right."""
    images = len(first_right)
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    both = int((first_right & second_right).sum())
    return Pair(
        first=first,
        second=second,
        images=images,
        both_right=both,
        only_first=only_first,
        only_second=only_second,
        both_wrong=images - both - only_first - only_second,
        difference=100 * (only_second - only_first) / images,
        standard_error=_paired_error(only_first, only_second, images),
        p_value=sign_test(only_first, only_second),
    )


def accuracy_error(accuracy: float, images: int) -> float:
    """Standard error, in points, of an accuracy (0-100) measured on so many images.

    One right and one wrong image are added, so that a few images that are all right do not count as certain.
    """
    share = (accuracy / 100 * images + 1) / (images + 2)
    return 100 * math.sqrt(share * (1 - share) / (images + 2))


def sign_test(first: int, second: int) -> float:
    """Exact two-sided p-value of so many images for one side and so many for the other."""
    total = first + second
    # Logarithms, since the binomial coefficients of a large test set do not fit a float.
    whole = math.lgamma(total + 1) - total * math.log(2)
    terms = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(total - k + 1))
        for k in range(min(first, second) + 1)
    )
    return min(1.0, 2 * math.fsum(terms))


def _paired_error(only_first: int, only_second: int, images: int) -> float:
    """Of the difference of two shares of the same images; half an image is added to each side, as above."""
    first, second, total = only_first + 0.5, only_second + 0.5, images + 2
    return 100 * math.sqrt(first + second - (first - second) ** 2 / total) / total
