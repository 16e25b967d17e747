"""Power of two choices: the less loaded of two random replicas.

Formula: draw two different allowed replicas; take the one with the lower L, the first of equals.
    L   requests in flight that this router counts
Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001; sglang-router
(`power_of_two`), Envoy's LEAST_REQUEST.
Inputs: inflight.

    steersman evaluate --policy power-of-two
"""

from __future__ import annotations

from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, uniform

INFLIGHT = COLUMN["inflight"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    replicas, allowed = len(scores) - 2, 0
    scores[:] = NEVER
    for c in range(replicas):
        if mask[c]:
            allowed += 1
    if allowed == 0:
        return
    one = int(uniform(memory) * allowed)
    two = one
    if allowed > 1:
        two = int(uniform(memory) * (allowed - 1))
        if two >= one:
            two += 1
    first, second, seen = 0, 0, 0
    for c in range(replicas):
        if mask[c]:
            if seen == one:
                first = c
            if seen == two:
                second = c
            seen += 1
            scores[c] = -1.0
    winner = first if rows[first, INFLIGHT] <= rows[second, INFLIGHT] else second
    scores[first] = scores[second] = 0.0
    scores[winner] = 1.0


POLICY = CompiledPolicy("power-of-two", "Sends to the replica with fewer requests in flight of two random ones.", score)
