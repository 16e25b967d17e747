"""Quantile tables from observed lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steersman.runtime.errors import UserError

POINTS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1)


def fit_quantiles(values: Sequence[int] | np.ndarray, points: Sequence[float] = POINTS) -> dict[float, int]:
    """The `quantiles` of a length distribution in a workload file: the observed length at each of `points`.

    Observed values, not interpolated ones (the smallest that at least that share does not exceed).

    Raises:
        UserError: there are no values, or some are below 1.
    """
    lengths = np.asarray(values)
    if not len(lengths) or lengths.min() < 1:
        raise UserError("quantiles need at least one length, and every length must be at least 1 token")
    found = np.quantile(lengths, points, method="inverted_cdf")
    return {float(p): int(v) for p, v in zip(points, found, strict=True)}
