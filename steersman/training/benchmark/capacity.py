"""The SLO capacity, with bootstrap intervals over workload seeds and training seeds.

Resampled seeds are given as weights: how often each of S seeds was drawn, (R, S) for R resamples. The same weights
serve all policies of a scenario, so that what is common to two of them (a hard seed) cancels in their ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steersman.training.benchmark.counts import Curve, shares
from steersman.training.sizing import EACH_TENANT, OVERALL

RESAMPLES = 2000


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def margins(curve: Curve, weights: np.ndarray) -> np.ndarray:
    """By how much attainment is above what the capacity demands, (R, L): the tightest of overall and each tenant.

    weights: (R, S). Requests are pooled over the seeds drawn.
    """
    # Products of matrices: einsum takes several times as long.
    attained, arrived = (np.moveaxis(weights @ counts, 0, 1) for counts in (curve.attained, curve.arrived))
    overall = shares(attained.sum(-1), arrived.sum(-1)) - OVERALL
    return np.minimum(overall, shares(attained, arrived).min(-1) - EACH_TENANT)


def crossings(loads: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """The load at which `margin` (R, L) first falls below 0, linear between loads (L,) that rise; (R,).

    0 where it is below at the lowest load, and the highest load where it never is.
    """
    below = margin < 0
    after = below.argmax(axis=1)
    before = np.maximum(after - 1, 0)
    rows = np.arange(len(margin))
    high, low = margin[rows, before], margin[rows, after]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossed = loads[before] + (loads[after] - loads[before]) * high / (high - low)
    return np.where(below.any(axis=1), np.where(after == 0, 0.0, crossed), loads[-1])


def resampled(count: int, seed: int) -> np.ndarray:
    """Weights of `count` seeds, (1 + RESAMPLES, count): first the seeds as they are, then the resamples."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return np.vstack([np.ones(count), drawn])


def capacities(curves: Sequence[Curve], weights: np.ndarray, seed: int) -> np.ndarray:
    """The capacity of a policy for each row of `weights`, (R,): the mean over its members, which are resampled too."""
    each = np.array([crossings(curve.loads, margins(curve, weights)) for curve in curves])
    return np.asarray((each * member_weights(len(curves), len(weights), seed)).sum(axis=0))


def member_weights(members: int, rows: int, seed: int) -> np.ndarray:
    """Shares of the members in each row, (members, rows): equal in the first row, resampled in the others."""
    drawn = np.random.default_rng([seed, members]).multinomial(members, np.full(members, 1 / members), rows - 1)
    return np.vstack([np.ones(members), drawn]).T / members


def interval(values: np.ndarray) -> Interval:
    """The first value, with the percentiles of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975], method="nearest")
    return Interval(float(values[0]), float(low), float(high))
