"""llm-d's predicted-latency scheduler: affinity while it is cheap, then a draw by headroom to the SLO.

Formula:
    TTFT = b₀ + b₁·U + b₂·I + b₃·Q + b₄·R + b₅·h + b₆·T, TPOT likewise with D for T; at least 0
    A = {replicas with h ≥ s}; keep A unless its best TTFT exceeds the best of all by more than P
    H = TTFT target − waited − TTFT, G = TPOT target − TPOT; of those kept, only replicas with H, G ≥ 0 if there are any
    x = (v·H' + w·G') / (v + w); ' scales to [0, 1] over those left, and who is equal on all of them does not count
    draw with weight 0.01 + x; where H, G ≥ 0 and pack ≥ 0.5 with weight 0.01 + 1 − x
    U   share of the KV cache in use             Q   requests waiting inside the engine
    I   prompt tokens                            R   sequences in its batch
    h   share of the prompt in its prefix cache
    T   uncached prompt tokens in flight         D   tokens in flight behind decoding requests
    s = 0.8, P = 5 s, v = 0.8, w = 0.2, pack = 1: as llm-d by default, fill the replica with the least headroom first
Source: llm-d (`latency-scorer` with `ttftWeight`, `tpotWeight` and `headroomSelectionStrategy`,
`prefix-cache-affinity-filter`, `slo-headroom-tier-filter`, `weighted-random-picker`). llm-d fits XGBoost online, to
what it observes; it also explores: 1 % of the requests pass the filters by, which is left out here.
A policy sees no outcomes, so the coefficients are fitted beforehand. The defaults come from the default workload and
fleet, which is the favourable case: no time is lost with learning, and nothing has changed since.

    python -m steersman.training.latency_fit --workload default --fleet default

Inputs: kv_use, prompt_tokens, waiting, running, matched_tokens, prefill_ahead, context_tokens, ttft_slo, tpot_slo,
waited.

    steersman evaluate --policy llmd-latency
    steersman evaluate --policy 'llmd-latency?pack=0'
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param, uniform

KV_USE, PROMPT, WAITING, RUNNING = (
    COLUMN["kv_use"],
    COLUMN["prompt_tokens"],
    COLUMN["waiting"],
    COLUMN["running"],
)
MATCHED, AHEAD, CONTEXT = COLUMN["matched_tokens"], COLUMN["prefill_ahead"], COLUMN["context_tokens"]
TTFT_SLO, TPOT_SLO, WAITED = COLUMN["ttft_slo"], COLUMN["tpot_slo"], COLUMN["waited"]

TERMS = ("base", "kv_use", "prompt", "waiting", "running", "match", "tokens")
LEAST = 0.01  # weight of the candidate that is liked least


@njit
def latency(row: ndarray, coefficients: ndarray, tokens: float) -> float:
    """Seconds that a linear regression predicts; `coefficients` float64 (7,) in the order of `TERMS`."""
    b = coefficients
    match = row[MATCHED] / max(1.0, row[PROMPT])
    time = b[0] + b[1] * row[KV_USE] + b[2] * row[PROMPT] + b[3] * row[WAITING] + b[4] * row[RUNNING]
    return max(0.0, time + b[5] * match + b[6] * tokens)


@njit
def scaled(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.0


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    replicas = len(scores) - 2
    affinity, penalty_s, ttft_weight, tpot_weight, pack = params[14:19]
    request = rows[-1]
    enough = affinity * request[PROMPT]
    ttft_room, tpot_room = np.empty(replicas), np.empty(replicas)
    best, warm = -np.inf, -np.inf
    for c in range(replicas):
        ttft = latency(rows[c], params[0:7], rows[c, AHEAD])
        ttft_room[c] = request[TTFT_SLO] - request[WAITED] - ttft
        tpot_room[c] = request[TPOT_SLO] - latency(rows[c], params[7:14], rows[c, CONTEXT])
        if mask[c]:
            best = max(best, ttft_room[c])
            if rows[c, MATCHED] >= enough:
                warm = max(warm, ttft_room[c])
    stick = warm > -np.inf and best - warm <= penalty_s

    scores[:] = NEVER
    in_time = False
    for c in range(replicas):
        if mask[c] and not (stick and rows[c, MATCHED] < enough):
            scores[c] = 0.0
            in_time = in_time or min(ttft_room[c], tpot_room[c]) >= 0.0
    ttft_low, ttft_high, tpot_low, tpot_high = np.inf, -np.inf, np.inf, -np.inf
    for c in range(replicas):
        if in_time and scores[c] == 0.0 and min(ttft_room[c], tpot_room[c]) < 0.0:
            scores[c] = NEVER
        if scores[c] == 0.0:
            ttft_low, ttft_high = min(ttft_low, ttft_room[c]), max(ttft_high, ttft_room[c])
            tpot_low, tpot_high = min(tpot_low, tpot_room[c]), max(tpot_high, tpot_room[c])
    v = ttft_weight if ttft_high > ttft_low else 0.0
    w = tpot_weight if tpot_high > tpot_low else 0.0
    total, chosen = 0.0, -1
    for c in range(replicas):
        if scores[c] == 0.0:
            liked = v * scaled(ttft_room[c], ttft_low, ttft_high) + w * scaled(tpot_room[c], tpot_low, tpot_high)
            liked = liked / max(1e-9, v + w)
            if in_time and pack >= 0.5:
                liked = 1.0 - liked
            scores[c] = LEAST + liked
            total += scores[c]
            if uniform(memory) * total < scores[c]:  # keeps each with probability weight/total
                chosen = c
    if chosen >= 0:
        scores[chosen] = 2.0


# Fitted by the command above.
TTFT = (0.1581, -2.585, 5.827e-05, 0.06807, 0.008634, -0.2483, 0.0001849)
TPOT = (0.01214, 0.03842, 1.965e-07, 0.0003492, 0.0002514, -0.001994, -8.3e-08)


def _params(name: str, values: tuple[float, ...]) -> dict[str, Param]:
    """With ranges to four times the fitted effect, of either sign."""
    return {
        f"{name}_{term}": Param(value, -4.0 * abs(value) - 1e-9, 4.0 * abs(value) + 1e-9)
        for term, value in zip(TERMS, values, strict=True)
    }


POLICY = CompiledPolicy(
    "llmd-latency",
    "Draws a replica by its headroom to the SLO, as a regression predicts it, after a gate for cached prompts.",
    score,
    _params("ttft", TTFT)
    | _params("tpot", TPOT)
    | {
        "affinity": Param(0.8, 0.0, 1.0),
        "max_ttft_penalty_s": Param(5.0, 0.0, 30.0),
        "ttft_weight": Param(0.8, 0.0, 1.0),
        "tpot_weight": Param(0.2, 0.0, 1.0),
        "pack": Param(1.0, 0.0, 1.0),
    },
)
