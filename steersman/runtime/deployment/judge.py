"""What makes a choice valid: the policy can have been trained for what it is shown, and its scores are finite."""

from __future__ import annotations

import numpy as np
from numba import types

from steersman.runtime.compiled import njit
from steersman.runtime.observation import CANDIDATE_FEATURES, HIGH, LOW
from steersman.runtime.policy import pick

NOT_FINITE, OUT_OF_RANGE = -1, -2

_ROWS = types.Array(types.float32, 2, "C")
_MASK = types.boolean[::1]
_SCORES = types.float64[::1]


@njit(types.int64(_SCORES, _MASK))
def choose(scores: np.ndarray, mask: np.ndarray) -> int:
    """`pick`, or NOT_FINITE where the score of an allowed candidate is NaN or infinite."""
    for c in range(len(scores)):
        if mask[c] and not np.isfinite(scores[c]):
            return NOT_FINITE
    return int(pick(scores, mask))


_CANDIDATE = (LOW[:CANDIDATE_FEATURES].copy(), HIGH[:CANDIDATE_FEATURES].copy())
_REQUEST = (LOW[CANDIDATE_FEATURES:].copy(), HIGH[CANDIDATE_FEATURES:].copy())


@njit
def _outside(row: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.int32:
    """How many values are outside of their range, or NaN. Counts in int32: it becomes vector instructions."""
    count = np.int32(0)
    for k in range(len(row)):
        count += np.int32(0) if (row[k] >= low[k] and row[k] <= high[k]) else np.int32(1)
    return count


@njit(types.boolean(_ROWS, _MASK))
def in_range(rows: np.ndarray, mask: np.ndarray) -> bool:
    """Whether every feature of the allowed candidates lies in the range of the schema, and none is NaN.

    The columns of the request are equal on all rows and are looked at once.
    """
    last = len(mask) - 1
    outside = _outside(rows[last, CANDIDATE_FEATURES:], _REQUEST[0], _REQUEST[1])
    for c in range(last):
        if mask[c]:
            outside += _outside(rows[c, :CANDIDATE_FEATURES], _CANDIDATE[0], _CANDIDATE[1])
    return bool(outside == 0)


@njit(types.int64(_ROWS, _MASK, _SCORES))
def judge(rows: np.ndarray, mask: np.ndarray, scores: np.ndarray) -> int:
    """The candidate that `scores` float64 (C,) choose, or OUT_OF_RANGE or NOT_FINITE."""
    if not in_range(rows, mask):
        return OUT_OF_RANGE
    return int(choose(scores, mask))
