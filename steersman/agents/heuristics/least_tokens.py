"""Least tokens: the replica with the least prompt work before and with this request.

Formula: argmin T + I·(1 − h), the first of equals.
    T   uncached prompt tokens that the replica still has to compute
    I   prompt tokens of the request
    h   share of them in the replica's prefix cache
Source: llm-d (`token-load-scorer`).
Inputs: prefill_ahead (T), uncached_tokens (I·(1 − h)).

    steersman evaluate --policy least-tokens
"""

from __future__ import annotations

from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy

AHEAD, UNCACHED = COLUMN["prefill_ahead"], COLUMN["uncached_tokens"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    for c in range(replicas):
        scores[c] = -(rows[c, AHEAD] + rows[c, UNCACHED])


POLICY = CompiledPolicy(
    "least-tokens",
    "Sends to the replica with the fewest uncached prompt tokens to compute, this request's included.",
    score,
)
