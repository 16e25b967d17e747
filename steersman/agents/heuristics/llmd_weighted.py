"""llm-d's default profile: a weighted sum of scorers for queue, KV use and prefix match.

Formula: argmax wq·(max Q − Q)/(max Q − min Q) + wk·(1 − U) + wp·h, ties at random; wq : wk : wp = 2 : 2 : 3.
The first term is wq where all Q are equal.
    Q   requests waiting inside the engine; max and min over the allowed replicas
    U   share of its KV cache in use
    h   share of the prompt in the replica's prefix cache
Source: llm-d inference scheduler (`queue-scorer`, `kv-cache-utilization-scorer`, `prefix-cache-scorer`,
`max-score-picker`).
Inputs: waiting, kv_use, matched_tokens, prompt_tokens.

    steersman evaluate --policy llmd-weighted
    steersman evaluate --policy 'llmd-weighted?prefix_weight=5'
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.agents.heuristics._ties import break_ties
from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

WAITING, KV_USE = COLUMN["waiting"], COLUMN["kv_use"]
MATCHED, PROMPT = COLUMN["matched_tokens"], COLUMN["prompt_tokens"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    queue_weight, kv_weight, prefix_weight = params
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    low, high = np.inf, -np.inf
    for c in range(replicas):
        if mask[c]:
            low, high = min(low, rows[c, WAITING]), max(high, rows[c, WAITING])
    for c in range(replicas):
        if not mask[c]:
            scores[c] = NEVER
            continue
        queue = (high - rows[c, WAITING]) / (high - low) if high > low else 1.0
        prefix = rows[c, MATCHED] / max(1.0, rows[c, PROMPT])
        scores[c] = queue_weight * queue + kv_weight * (1.0 - rows[c, KV_USE]) + prefix_weight * prefix
    break_ties(mask, memory, scores)


POLICY = CompiledPolicy(
    "llmd-weighted",
    "Sends to the best weighted sum of a short queue, free KV memory and prefix match, as llm-d by default.",
    score,
    {
        "queue_weight": Param(2.0, 0.0, 10.0),
        "kv_weight": Param(2.0, 0.0, 10.0),
        "prefix_weight": Param(3.0, 0.0, 10.0),
    },
)
