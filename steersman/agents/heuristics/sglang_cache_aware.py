"""SGLang's cache-aware router: follow the cache while the load is balanced.

Formula:
    if max L − min L > a and max L > r·min L: argmin L
    else if max h > m:                        the replica with the best h, of equals the one with the lower L
    else:                                     argmin L
    L   requests in flight that this router counts
    h   share of the prompt in the replica's prefix cache
    a = 64, r = 1.5, m = 0.3
Source: SGLang, sgl-router, `src/policies/cache_aware.rs` (`balance_abs_threshold`, `balance_rel_threshold`,
`cache_threshold`).
Inputs: inflight, matched_tokens, prompt_tokens.

    steersman evaluate --policy sglang-cache-aware
    steersman evaluate --policy 'sglang-cache-aware?abs_threshold=8&cache_threshold=0.5'
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.agents.heuristics._ties import DEMOTED
from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

INFLIGHT, MATCHED, PROMPT = COLUMN["inflight"], COLUMN["matched_tokens"], COLUMN["prompt_tokens"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    abs_threshold, rel_threshold, cache_threshold = params
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    low, high, best = np.inf, -np.inf, 0.0
    for c in range(replicas):
        if mask[c]:
            low, high = min(low, rows[c, INFLIGHT]), max(high, rows[c, INFLIGHT])
            best = max(best, rows[c, MATCHED])
    balanced = not (high - low > abs_threshold and high > rel_threshold * low)
    follow = balanced and best > cache_threshold * rows[-1, PROMPT]
    for c in range(replicas):
        scores[c] = -rows[c, INFLIGHT]
        if follow and rows[c, MATCHED] < best:
            scores[c] += DEMOTED


POLICY = CompiledPolicy(
    "sglang-cache-aware",
    "Follows the best prefix match while the load is balanced, else sends to the fewest requests in flight.",
    score,
    {
        "abs_threshold": Param(64.0, 0.0, 128.0),
        "rel_threshold": Param(1.5, 1.0, 4.0),
        "cache_threshold": Param(0.3, 0.0, 1.0),
    },
)
