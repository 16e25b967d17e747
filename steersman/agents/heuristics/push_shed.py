"""SLO-aware push with predictive shedding: the cheapest replica that keeps the promises, or none.

A request is pushed to the viable replica of least cost. A replica is viable while its predicted times stay
within thresholds relative to the targets and few others are harmed; where no replica is viable, the request
would miss its targets anyway and delay others, and is shed.

Formula:
    u = (waited + TTFT) / TTFT target, v = TPOT / TPOT target
    z = log(TPOT target / strict) / log(loose / strict), clipped to [0, 1]: 0 for a strict class, 1 loose
    x(z) = x_strict + z·(x_loose − x_strict)
    viable ⇔ u ≤ f·shed_ttft(z) and v ≤ f·shed_tpot(z) and H ≤ shed_harm
    f = max(0.1, 1 − fairness·(attainment of the tenant − that of the worst tenant))
    cost = ttft(z)·u + tpot(z)·v + miss·(soft(u − ttft_margin) + soft(v − tpot_margin)) + harm·H − lost·G
         + prefill·S + load·B + kv·max(0, kv_reserve − K) − match·h
    soft(x) = (x + √(x² + sharpness⁻²)) / 2, a hinge with a round corner
    shed if no allowed replica is viable; else the viable replica of least cost, the first of equals
    TTFT, TPOT   predicted for this request on the replica
    H, G         others in flight whose TPOT target this request would break; that miss it anyway
    S, B         seconds to prefill this request; share of the replica's time that recent prompts take
    K, h         KV share left after this request and its output; share of the prompt in the prefix cache
Source: this project. It has the shape of the strongest tuned heuristic of its prototype: a push cost relative
to the SLO, and shed thresholds for each class.
Inputs: ttft_slack (1 − u), tpot_slack (1 − v), tpot_slo, others_harmed, others_lost, prefill_time,
prefill_load, kv_headroom, matched_tokens, prompt_tokens, tenant_attainment, worst_attainment.

    steersman evaluate --policy push-shed
    steersman evaluate --policy 'push-shed?shed_ttft_strict=1.2&harm=0.5'
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

TTFT_SLACK, TPOT_SLACK, TPOT_SLO = COLUMN["ttft_slack"], COLUMN["tpot_slack"], COLUMN["tpot_slo"]
HARMED, LOST = COLUMN["others_harmed"], COLUMN["others_lost"]
PREFILL_TIME, PREFILL_LOAD = COLUMN["prefill_time"], COLUMN["prefill_load"]
HEADROOM, MATCHED, PROMPT = COLUMN["kv_headroom"], COLUMN["matched_tokens"], COLUMN["prompt_tokens"]
ATTAINMENT, WORST = COLUMN["tenant_attainment"], COLUMN["worst_attainment"]

MOST = 1e5  # no cost is higher, so that a viable replica always beats shedding
SHED = -1e6
NOT_VIABLE = -1e7

# In the order in which `score` reads them.
PARAMS = {
    "strict_tpot_s": Param(0.03, 0.01, 0.1),
    "loose_tpot_s": Param(0.25, 0.1, 1.0),
    "shed_ttft_strict": Param(1.0, 0.3, 3.0),
    "shed_ttft_loose": Param(1.0, 0.3, 3.0),
    "shed_tpot_strict": Param(1.1, 0.5, 3.0),
    "shed_tpot_loose": Param(1.1, 0.5, 3.0),
    "shed_harm": Param(8.0, 0.0, 50.0),
    "fairness": Param(0.5, -1.0, 3.0),
    "ttft_strict": Param(1.0, 0.0, 4.0),
    "ttft_loose": Param(1.0, 0.0, 4.0),
    "tpot_strict": Param(1.0, -2.0, 4.0),
    "tpot_loose": Param(0.0, -2.0, 4.0),
    "miss": Param(2.0, 0.0, 10.0),
    "ttft_margin": Param(0.8, 0.2, 1.5),
    "tpot_margin": Param(0.9, 0.2, 1.5),
    "sharpness": Param(10.0, 2.0, 40.0),
    "harm": Param(0.3, 0.0, 3.0),
    "lost": Param(0.0, -0.2, 0.2),
    "prefill": Param(1.0, 0.0, 8.0),
    "load": Param(0.5, -1.0, 4.0),
    "kv": Param(5.0, 0.0, 20.0),
    "kv_reserve": Param(0.1, 0.0, 0.6),
    "match": Param(0.2, -1.0, 3.0),
}


@njit
def between(strict: float, loose: float, z: float) -> float:
    """`strict` at z = 0, `loose` at z = 1, linear in between."""
    return strict + z * (loose - strict)


@njit
def soft(x: float, corner: float) -> float:
    """max(0, x) with a round corner, as wide as `corner`."""
    return 0.5 * (x + np.sqrt(x * x + corner * corner))


@njit
def strictness(request: ndarray, params: ndarray) -> float:
    """z: 0 for a strict class, 1 for a loose one."""
    strict_s, loose_s = params[0], max(params[1], 1.001 * params[0])
    return min(1.0, max(0.0, np.log(max(1e-6, request[TPOT_SLO]) / strict_s) / np.log(loose_s / strict_s)))


@njit
def score_replicas(rows: ndarray, mask: ndarray, params: ndarray, z: float, scores: ndarray) -> int:
    """Score the replicas; viable ones are above NOT_VIABLE. Returns the best, or −1 where none is allowed."""
    request = rows[-1]
    favour = max(0.1, 1.0 - params[7] * (request[ATTAINMENT] - request[WORST]))
    shed_ttft = favour * between(params[2], params[3], z)
    shed_tpot = favour * between(params[4], params[5], z)
    ttft, tpot = between(params[8], params[9], z), between(params[10], params[11], z)
    shed_harm, miss, ttft_margin, tpot_margin, corner = (
        params[6],
        params[12],
        params[13],
        params[14],
        1.0 / params[15],
    )
    harm, lost, prefill, load, kv, kv_reserve, match = params[16:23]
    best, chosen = -np.inf, -1
    for c in range(len(scores) - 2):
        if not mask[c]:
            scores[c] = NEVER
            continue
        row = rows[c]
        u, v = 1.0 - row[TTFT_SLACK], 1.0 - row[TPOT_SLACK]
        cost = ttft * u + tpot * v
        cost += miss * (soft(u - ttft_margin, corner) + soft(v - tpot_margin, corner))
        cost += harm * row[HARMED] - lost * row[LOST]
        cost += prefill * row[PREFILL_TIME] + load * row[PREFILL_LOAD]
        cost += kv * max(0.0, kv_reserve - row[HEADROOM])
        cost -= match * row[MATCHED] / max(1.0, row[PROMPT])
        scores[c] = -min(MOST, cost)
        if u > shed_ttft or v > shed_tpot or row[HARMED] > shed_harm:
            scores[c] += NOT_VIABLE
        if scores[c] > best:
            best, chosen = scores[c], c
    return chosen


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    scores[-2], scores[-1] = NEVER, SHED
    score_replicas(rows, mask, params, strictness(rows[-1], params), scores)


POLICY = CompiledPolicy(
    "push-shed",
    "Sends to the replica of least cost relative to the SLO, and sheds what none is likely to serve in time.",
    score,
    PARAMS,
)
