"""AIBrix's prefix-cache router: the best match that is not overloaded.

Formula:
    if max R − min R > g: argmin R
    else: the best h > 0 among replicas with R ≤ mean(R) + k·σ(R), of equals the one with the lower R
    if there is none: argmin R
ties at random; g = 8, k = 1; mean and σ over the allowed replicas.
    R   requests that the gateway has sent and that have not ended
    h   share of the prompt in the replica's prefix cache
Source: AIBrix, `pkg/plugins/gateway/algorithms/prefix_cache.go`
(`AIBRIX_PREFIX_CACHE_POD_RUNNING_REQUEST_IMBALANCE_ABS_COUNT`,
`AIBRIX_PREFIX_CACHE_STANDARD_DEVIATION_FACTOR`). Its R is the metric `RealtimeNumRequestsRunning`, which
the gateway counts itself, hence `inflight` here.
Inputs: inflight, matched_tokens.

    steersman evaluate --policy aibrix-prefix
    steersman evaluate --policy 'aibrix-prefix?imbalance=16&deviations=2'
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.agents.heuristics._ties import DEMOTED, break_ties
from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

INFLIGHT, MATCHED = COLUMN["inflight"], COLUMN["matched_tokens"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    imbalance, deviations = params
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    low, high, total, squares, allowed = np.inf, -np.inf, 0.0, 0.0, 0
    for c in range(replicas):
        if mask[c]:
            load = float(rows[c, INFLIGHT])
            low, high = min(low, load), max(high, load)
            total += load
            squares += load * load
            allowed += 1
    mean = total / max(1, allowed)
    limit = mean + deviations * np.sqrt(max(0.0, squares / max(1, allowed) - mean * mean))
    best = 0.0
    if high - low <= imbalance:
        for c in range(replicas):
            if mask[c] and rows[c, INFLIGHT] <= limit:
                best = max(best, rows[c, MATCHED])
    for c in range(replicas):
        scores[c] = -rows[c, INFLIGHT]
        if best > 0.0 and (rows[c, MATCHED] < best or rows[c, INFLIGHT] > limit):
            scores[c] += DEMOTED
    break_ties(mask, memory, scores)


POLICY = CompiledPolicy(
    "aibrix-prefix",
    "Sends to the best prefix match that is not overloaded, else to the fewest requests in flight.",
    score,
    {"imbalance": Param(8.0, 0.0, 64.0), "deviations": Param(1.0, 0.0, 4.0)},
)
