"""Round robin: the allowed replicas in turn.

Formula: the first allowed replica after the one that was chosen last, in the order of the fleet.
Source: the default of most load balancers, and of sglang-router and vLLM's router as `round_robin`.
Inputs: none but the guard's mask.

    steersman evaluate --policy round-robin
"""

from __future__ import annotations

from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy

NEXT = 1  # place in the memory: the replica whose turn it is


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    turn, chosen = int(memory[NEXT]), -1
    for step in range(replicas):
        c = (turn + step) % replicas
        scores[c] = -float(step)
        if chosen < 0 and mask[c]:
            chosen = c
    if chosen >= 0:
        memory[NEXT] = (chosen + 1) % replicas


POLICY = CompiledPolicy("round-robin", "Sends to the allowed replicas in turn.", score, memory_size=2)
