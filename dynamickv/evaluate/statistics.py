"""How sure a mean is: Wilson's interval for shares, the bootstrap for scores. 95 % throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]

RESAMPLES = 2000
SLICE = 200


def wilson(hits: float, count: int) -> Interval:
    """Wilson's score interval of the share hits / count.

    Source: Wilson 1927, as in Brown, Cai and DasGupta 2001.
    """
    if count < 1:
        raise ValueError(f"a share needs at least 1 trial, got {count}")
    z = 1.959964
    middle = (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(max(hits * (count - hits), 0) / count + z * z / 4)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Percentile interval of the mean of the groups' means, resampled within each group.

    One group gives the interval of a plain mean.
    """
    if not groups or not all(groups):
        raise ValueError("a mean needs at least 1 value in every group")
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for group in groups:
        values = np.asarray(group, float)
        # In slices: all resamples of some thousand values at once would take much memory.
        for start in range(0, RESAMPLES, SLICE):
            drawn = rng.integers(0, len(values), (SLICE, len(values)))
            means[start : start + SLICE] += values[drawn].mean(axis=1)
    low, high = np.percentile(means / len(groups), [2.5, 97.5])
    return float(low), float(high)
