"""llm-d's prefix affinity: stick to warm replicas until they are saturated.

Formula:
    A = {replicas with h ≥ s}; TTFT ≈ T / V
    keep A unless its best TTFT exceeds the best TTFT of the others by more than P; otherwise all replicas
    of those kept: argmin T + I·(1 − h)  (prefill-bound, the default) or argmin L (decode_bound = 1)
    T   uncached prompt tokens that the replica still has to compute, without this request
    I   prompt tokens of the request; h share of them in the replica's prefix cache
    L   requests in flight that this router counts
    s = 0.8, P = 18 s, V = 15,928 tokens/s (Qwen3-32B on two H100; calibrate for others)
Source: llm-d (`prefix-cache-affinity-filter` with `peakPrefillThroughput` and `maxTTFTPenaltyMs`, then
`token-load-scorer` or `active-request-scorer`).
Inputs: matched_tokens, prompt_tokens, prefill_ahead, uncached_tokens, inflight.

    steersman evaluate --policy llmd-sticky
    steersman evaluate --policy 'llmd-sticky?max_ttft_penalty_s=2&peak_prefill_tokens_per_s=30000'
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.agents.heuristics._ties import DEMOTED, break_ties
from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

INFLIGHT, AHEAD, UNCACHED = COLUMN["inflight"], COLUMN["prefill_ahead"], COLUMN["uncached_tokens"]
MATCHED, PROMPT = COLUMN["matched_tokens"], COLUMN["prompt_tokens"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    affinity, peak_tokens_per_s, penalty_s, decode_bound = params
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    enough = affinity * rows[-1, PROMPT]
    warm, cold = np.inf, np.inf
    for c in range(replicas):
        if mask[c]:
            if rows[c, MATCHED] >= enough:
                warm = min(warm, rows[c, AHEAD])
            else:
                cold = min(cold, rows[c, AHEAD])
    stick = warm < np.inf and warm <= cold + penalty_s * peak_tokens_per_s
    for c in range(replicas):
        load = rows[c, INFLIGHT] if decode_bound >= 0.5 else rows[c, AHEAD] + rows[c, UNCACHED]
        scores[c] = -load
        if stick and rows[c, MATCHED] < enough:
            scores[c] += DEMOTED
    break_ties(mask, memory, scores)


POLICY = CompiledPolicy(
    "llmd-sticky",
    "Keeps to replicas with most of the prompt cached until they saturate, and takes the least loaded.",
    score,
    {
        "affinity": Param(0.8, 0.0, 1.0),
        "peak_prefill_tokens_per_s": Param(15928.0, 500.0, 60000.0),
        "max_ttft_penalty_s": Param(18.0, 0.0, 30.0),
        "decode_bound": Param(0.0, 0.0, 1.0),
    },
)
