"""What several heuristics need: an offset that demotes candidates, and a random choice among equals."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.policy import uniform

DEMOTED = -1e9  # added to a score: behind every candidate without it, and in the same order among each other


@njit
def break_ties(mask: ndarray, memory: ndarray, scores: ndarray) -> None:
    """Raise one of the best allowed scores, drawn uniformly, by the smallest possible amount.

    mask: bool (C,); memory: float64 (M,), its first number the random state; scores: float64 (C,), changed.
    """
    best, chosen, equals = -np.inf, -1, 0
    for c in range(len(scores)):
        if not mask[c]:
            continue
        if scores[c] > best:
            best, chosen, equals = scores[c], c, 1
        elif scores[c] == best:
            equals += 1
            if uniform(memory) * equals < 1.0:  # keeps each of the equals with probability 1/equals
                chosen = c
    if equals > 1:
        scores[chosen] = np.nextafter(best, np.inf)
