"""Join the shortest expected delay: the replica that should finish this request first.

Formula: argmin TTFT + d·E·TPOT, the first of equals; d = 1: the whole delay; 0: that of the first token.
    TTFT, TPOT   predicted for this request on the replica, from its cost profile and the work in flight
    E            expected output tokens
Source: the shortest-expected-delay rule of queueing theory, which for equal servers is the shortest line
(Winston, "Optimality of the Shortest Line Discipline", 1977). The predictions are those of
`steersman.runtime.observation.predict`.
Inputs: predicted_ttft, predicted_tpot, expected_output.

    steersman evaluate --policy jsed
    steersman evaluate --policy 'jsed?decode_weight=0'
"""

from __future__ import annotations

from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

TTFT, TPOT, EXPECTED = COLUMN["predicted_ttft"], COLUMN["predicted_tpot"], COLUMN["expected_output"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    for c in range(replicas):
        scores[c] = -(rows[c, TTFT] + params[0] * rows[c, EXPECTED] * rows[c, TPOT])


POLICY = CompiledPolicy(
    "jsed",
    "Sends to the replica with the shortest predicted delay, first token and expected output together.",
    score,
    {"decode_weight": Param(1.0, 0.0, 1.0)},
)
