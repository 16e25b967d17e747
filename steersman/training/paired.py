"""Paired statistics: two policies on the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Paired(NamedTuple):
    """One policy against another on the same episodes."""

    name: str
    against: str
    metric: str
    difference: float  # of means, in the metric's unit
    ratio: float  # of means
    low: float  # the ratio's 95 % interval
    high: float

    @classmethod
    def of(cls, name: str, against: str, metric: str, a: Sequence[float], b: Sequence[float], seed: int) -> Paired:
        """Compare `a` of `name` with `b` of `against`, one value of `metric` an episode."""
        ratio, low, high = paired(a, b, seed)
        return cls(name, against, metric, float(np.mean(a) - np.mean(b)), ratio, low, high)


def paired(a: Sequence[float], b: Sequence[float], seed: int) -> tuple[float, float, float]:
    """The ratio of means a/b with its 95 % interval (percentile bootstrap over episodes, 2,000 resamples).

    a, b: one value an episode, of two policies on the same episodes in the same order: an episode is drawn
    for both at once, so that what is common to both (a hard seed) does not widen the interval. The ratio is 1
    where both means are 0, and infinite where only b's is. One episode gives an interval of no width.

    Raises:
        ValueError: lengths differ, or there are no episodes.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired statistics need equally many episodes of both, at least one; got {len(a)}, {len(b)}")
    x, y = np.asarray(a, float), np.asarray(b, float)
    drawn = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    ratios = np.sort(ratio(x[drawn].mean(axis=1), y[drawn].mean(axis=1)))
    low, high = ratios[round(0.025 * (RESAMPLES - 1))], ratios[round(0.975 * (RESAMPLES - 1))]
    return float(ratio(x.mean(), y.mean())), float(low), float(high)


def ratio(a: np.ndarray | np.floating, b: np.ndarray | np.floating) -> np.ndarray:
    """a / b; 1 where both are 0, infinite where only b is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((a == 0) & (b == 0), 1.0, np.asarray(a) / b)
