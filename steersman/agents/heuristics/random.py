"""Random: any allowed replica with equal probability.

Formula: the argmax of independent uniform numbers, one for each replica.
Source: sglang-router and vLLM's router (`random`), Envoy (`RANDOM`).
Inputs: none but the guard's mask.

    steersman evaluate --policy random
"""

from __future__ import annotations

from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, uniform


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    for c in range(replicas):
        scores[c] = uniform(memory) if mask[c] else NEVER


POLICY = CompiledPolicy("random", "Sends to any allowed replica with equal probability.", score)
