"""Least requests: the replica with the fewest requests in flight.

Formula: argmin L, the first of equals.
    L   requests in flight that this router counts
Source: least connections of most load balancers; AIBrix (`least-request`), llm-d (`active-request-scorer`).
Inputs: inflight.

    steersman evaluate --policy least-requests
"""

from __future__ import annotations

from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy

INFLIGHT = COLUMN["inflight"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    for c in range(replicas):
        scores[c] = -rows[c, INFLIGHT]


POLICY = CompiledPolicy("least-requests", "Sends to the replica with the fewest requests in flight.", score)
