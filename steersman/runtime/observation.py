"""The observation: one float32 row for each candidate, encoded by one compiled function everywhere.

Rows 0 … R−1 are replicas, then there is padding (zero), and the last two rows are *hold* and *shed*. The columns
have raw quantities in the units given here; a learned policy normalises them inside its own graph. The first
`CANDIDATE_FEATURES` columns describe the candidate (zero on the shed row, and on that of hold once the request has
waited too long), the others describe the request, its tenant and the fleet, and are equal on every row that is not
padding.

Nothing in it depends on the request's true output length.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np

from steersman.runtime.bookkeeping import PREFILL_RATE_WINDOW_S, RATE_LONG_S, RATE_SHORT_S
from steersman.runtime.compiled import njit
from steersman.runtime.cost import chunk_s, iteration_s
from steersman.runtime.errors import UserError
from steersman.runtime.holding import may_hold

VERSION = 4


class Feature(NamedTuple):
    """A column of the observation."""

    name: str
    unit: str
    low: float
    high: float
    meaning: str


_BIG = 1e7
CANDIDATE = (
    Feature("is_replica", "bool", 0, 1, "1 for a replica, 0 for hold, shed and padding"),
    Feature("inflight", "requests", 0, _BIG, "sent to it and not ended (own count)"),
    Feature("prefilling", "requests", 0, _BIG, "of these, without a first token yet (own count)"),
    Feature(
        "prefill_ahead",
        "tokens",
        0,
        _BIG,
        "estimated uncached prompt tokens still to compute before this request",
    ),
    Feature("context_tokens", "tokens", 0, _BIG, "prompt and streamed tokens of its decoding requests (own count)"),
    Feature("running", "requests", 0, _BIG, "batch size (scraped)"),
    Feature("waiting", "requests", 0, _BIG, "queue inside the engine (scraped)"),
    Feature("kv_use", "share", 0, 1, "KV blocks in use (scraped)"),
    Feature("metrics_age", "s", 0, _BIG, "age of the scraped columns"),
    Feature("matched_tokens", "tokens", 0, _BIG, "prompt tokens believed to be in its prefix cache"),
    Feature("uncached_tokens", "tokens", 0, _BIG, "prompt tokens that it would have to compute"),
    Feature("kv_tokens", "tokens", 0, _BIG, "KV capacity"),
    Feature("max_num_seqs", "requests", 0, _BIG, "batch limit"),
    Feature("prefill_speed", "tokens/s", 0, _BIG, "prompt tokens per second at a full token budget"),
    Feature("decode_step", "s", 0, 1e4, "predicted decode iteration now"),
    Feature("prefill_time", "s", 0, 1e4, "time to prefill this request alone"),
    Feature("predicted_ttft", "s", 0, 1e4, "predicted time to first token"),
    Feature("predicted_tpot", "s", 0, 1e4, "predicted time per output token with this request"),
    Feature("ttft_slack", "ratio", -1e4, 1, "(TTFT target − waited − predicted TTFT) / TTFT target"),
    Feature("tpot_slack", "ratio", -1e4, 1, "(TPOT target − predicted TPOT) / TPOT target"),
    Feature("ttft_chance", "share", 0, 1, "½ + ½·x / √(1 + x²), x = 4·ttft_slack"),
    Feature("tpot_chance", "share", 0, 1, "the same of tpot_slack"),
    Feature("kv_headroom", "share", -1e4, 1, "KV share free after this request and its expected output"),
    Feature("prefill_load", "ratio", 0, 1e4, "share of its time that recent prompts take"),
    Feature(
        "others_harmed",
        "requests",
        0,
        _BIG,
        "in flight whose TPOT target is met without this request, not with it",
    ),
    Feature("others_lost", "requests", 0, _BIG, "in flight whose TPOT target is missed anyway"),
    Feature("price", "currency/h", 0, _BIG, "price per hour"),
    Feature("is_hold", "bool", 0, 1, "1 for hold, unless it has waited too long"),
    Feature("patience", "share", 0, 1, "hold: share of the TTFT target that is left"),
)
REQUEST = (
    Feature("prompt_tokens", "tokens", 0, _BIG, "prompt length"),
    Feature("expected_output", "tokens", 0, _BIG, "the tenant's mean output length so far, at most max_tokens"),
    Feature("waited", "s", 0, 1e4, "time since arrival"),
    Feature("ttft_slo", "s", 0, 1e4, "TTFT target"),
    Feature("tpot_slo", "s", 0, 1e4, "TPOT target"),
    Feature("tenant_weight", "worth", 0, _BIG, "worth of a good request of the tenant"),
    Feature("tenant_attainment", "share", 0, 1, "recent attainment of the tenant"),
    Feature("worst_attainment", "share", 0, 1, "recent attainment of the worst tenant"),
    Feature("priority", "level", -1e4, 1e4, "priority tag"),
    Feature("burst", "ratio", 0, 1e4, "arrival rate of the last 3 s over that of the last minute"),
    Feature("best_ttft_slack", "ratio", -1e4, 1, "best ttft_slack over replicas"),
    Feature("best_tpot_slack", "ratio", -1e4, 1, "best tpot_slack over replicas"),
    Feature("mean_ttft_slack", "ratio", -1e4, 1, "mean ttft_slack over replicas, each at least −2"),
    Feature("occupancy", "share", 0, 1e4, "requests in flight over the fleet's batch limits"),
    Feature("held", "requests", 0, _BIG, "waiting at this gateway"),
    Feature("slo_guessed", "bool", 0, 1, "1 where nobody promised the targets: they are a guess"),
)
FEATURES = CANDIDATE + REQUEST
CANDIDATE_FEATURES = len(CANDIDATE)
WIDTH = len(FEATURES)
COLUMN = {feature.name: i for i, feature in enumerate(FEATURES)}
LOW = np.array([f.low for f in FEATURES], np.float32)
HIGH = np.array([f.high for f in FEATURES], np.float32)
SCHEMA_HASH = hashlib.sha256(repr((VERSION, FEATURES)).encode()).hexdigest()[:16]


def candidates_for(replicas: int, candidates: int | None = None) -> int:
    """C for a fleet: as given, or what it needs.

    Raises:
        UserError: that is not enough.
    """
    least = replicas + 2
    if candidates is not None and candidates < least:
        raise UserError(f"{replicas} replicas, hold and shed do not fit into {candidates} candidates")
    return candidates or least


class Prediction(NamedTuple):
    """What a replica is expected to do with one more request, all in seconds."""

    decode_step_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float
    tpot_without_s: float
    ahead_tokens: float
    prefill_load: float  # share of its time that prompts of the last seconds take


@njit(forceinline=True)
def predict(now, replica, view, prompt_tokens, uncached_tokens, expected_output):
    """Predict a replica's latency for one more request, from the cost model and the router's own counts.

    TTFT: what is left of the running iteration, then whole chunks of the token budget until the tokens ahead and
    this prompt are computed, then a wait for slots or KV memory if they are short. TPOT: the decode iteration with
    every request in flight and this one, stretched by the share of time that recent prompts take.
    """
    rep, v = replica, view
    decoding = max(0.0, v.inflight - v.prefilling)
    decode_step = iteration_s(rep, decoding, v.context_tokens, 0.0)
    chunk = max(1.0, rep.token_budget - decoding)
    chunk_step = iteration_s(rep, decoding, v.context_tokens, chunk_s(rep, chunk, 0.0))

    ahead = v.prefill_tokens
    if ahead > 0.0:
        ahead = max(0.0, ahead - max(0.0, now - v.prefill_since_s) * chunk / chunk_step)
    total = ahead + uncached_tokens
    full = math.floor(total / chunk)
    rest = total - full * chunk
    cached = prompt_tokens - uncached_tokens
    ttft = full * chunk_step
    ttft += rep.prefill_c_s * uncached_tokens * (cached + max(0.0, uncached_tokens - chunk) * 0.5)
    if rest > 0.0:
        ttft += iteration_s(rep, decoding, v.context_tokens, chunk_s(rep, rest, 0.0))
    if v.inflight > 0.0:
        ttft += 0.5 * (chunk_step if v.prefilling > 0.0 else decode_step)

    context = v.context_tokens + v.prompt_tokens
    load = v.prefill_rate * np.exp(-max(0.0, now - v.prefill_rate_at_s) / PREFILL_RATE_WINDOW_S) * rep.prefill_b_s
    rest_of_time = 1.0 - min(0.9, load)
    without = iteration_s(rep, v.inflight, context, 0.0) / rest_of_time
    tpot = iteration_s(rep, v.inflight + 1.0, context + prompt_tokens, 0.0) / rest_of_time

    short = max(0.0, v.inflight + 1.0 - rep.max_num_seqs) / rep.max_num_seqs
    short += max(0.0, context + prompt_tokens - rep.kv_tokens) / rep.kv_tokens
    ttft += short * expected_output * tpot + rep.latency_s
    prefill = chunk_s(rep, uncached_tokens, cached)
    return Prediction(decode_step, prefill, ttft, tpot, without, ahead, load)


@njit(forceinline=True)
def _chance(slack):
    """From 0 to 1, steep where a target is just met; of a root, which is faster than a logistic."""
    x = 4.0 * slack
    return 0.5 + 0.5 * x / np.sqrt(1.0 + x * x)


@njit(forceinline=True)
def encode(now, replicas, book, tenant, prompt_tokens, max_tokens, matched, waited_s, priority, rows):
    """Write the observation of one request into `rows`.

    replicas: REPLICA (R,); book: Bookkeeping; matched: float64 (R,) tokens believed cached on each replica;
    rows: float32 (C, WIDTH), C > R + 1.
    """
    n = len(replicas)
    promise, tv = book.tenants[tenant], book.tenant_views[tenant]
    expected = min(tv.output_tokens, max_tokens * 1.0)
    best_ttft, best_tpot, sum_ttft, inflight, limits = -1e4, -1e4, 0.0, 0.0, 0.0
    rows[:] = 0.0
    for r in range(n):
        rep, v, row = replicas[r], book.views[r], rows[r]
        uncached = prompt_tokens - matched[r]
        p = predict(now, rep, v, prompt_tokens, uncached, expected)
        ttft_slack = max(-1e4, (promise.ttft_slo_s - waited_s - p.ttft_s) / promise.ttft_slo_s)
        tpot_slack = max(-1e4, (promise.tpot_slo_s - p.tpot_s) / promise.tpot_slo_s)
        harmed, lost = 0.0, 0.0
        for t in range(len(book.tenants)):
            if book.tenants[t].tpot_slo_s < p.tpot_without_s:
                lost += book.tenant_inflight[r, t]
            elif book.tenants[t].tpot_slo_s < p.tpot_s:
                harmed += book.tenant_inflight[r, t]
        context = v.context_tokens + v.prompt_tokens
        row[0] = 1.0
        row[1] = v.inflight
        row[2] = v.prefilling
        row[3] = p.ahead_tokens
        row[4] = v.context_tokens
        row[5] = v.running
        row[6] = v.waiting
        row[7] = v.kv_use
        row[8] = min(_BIG, max(0.0, now - v.scraped_at_s))  # a gateway may run for months without metrics
        row[9] = matched[r]
        row[10] = uncached
        row[11] = rep.kv_tokens
        row[12] = rep.max_num_seqs
        budget = rep.token_budget * 1.0
        row[13] = budget / iteration_s(rep, 0.0, 0.0, chunk_s(rep, budget, 0.0))
        row[14] = p.decode_step_s
        row[15] = p.prefill_s
        row[16] = min(1e4, p.ttft_s)  # hours: beyond its range a policy would not be asked at all
        row[17] = p.tpot_s
        row[18] = ttft_slack
        row[19] = tpot_slack
        row[20] = _chance(ttft_slack)
        row[21] = _chance(tpot_slack)
        row[22] = max(-1e4, 1.0 - (context + prompt_tokens + expected) / rep.kv_tokens)
        row[23] = p.prefill_load
        row[24] = harmed
        row[25] = lost
        row[26] = rep.price_per_hour
        best_ttft, best_tpot = max(best_ttft, ttft_slack), max(best_tpot, tpot_slack)
        sum_ttft += max(-2.0, ttft_slack)
        inflight += v.inflight
        limits += rep.max_num_seqs
    worst = 1.0
    for t in range(len(book.tenants)):
        worst = min(worst, book.tenant_views[t].attainment)
    f = book.fleet[0]
    elapsed = max(0.0, now - f.rate_at_s)
    short = f.rate_short * np.exp(-elapsed / RATE_SHORT_S)
    # Corrected for the time that the long mean has not seen yet.
    seen = max(1e-3, 1.0 - np.exp(-max(now, RATE_SHORT_S) / RATE_LONG_S))
    long = f.rate_long * np.exp(-elapsed / RATE_LONG_S) / seen
    k = CANDIDATE_FEATURES
    hold = rows.shape[0] - 2
    if may_hold(promise.ttft_slo_s, waited_s):
        rows[hold, 27] = 1.0
        rows[hold, 28] = 1.0 - waited_s / promise.ttft_slo_s
    for c in range(rows.shape[0]):
        if n <= c < hold:
            continue
        row = rows[c]
        row[k] = prompt_tokens
        row[k + 1] = expected
        row[k + 2] = min(1e4, waited_s)
        row[k + 3] = min(1e4, promise.ttft_slo_s)  # batch work may have a day
        row[k + 4] = promise.tpot_slo_s
        row[k + 5] = promise.weight
        row[k + 6] = tv.attainment
        row[k + 7] = worst
        row[k + 8] = priority
        row[k + 9] = short / max(long, 1e-6)
        row[k + 10] = best_ttft
        row[k + 11] = best_tpot
        row[k + 12] = sum_ttft / n
        row[k + 13] = inflight / limits
        row[k + 14] = f.held
        row[k + 15] = promise.slo_guessed
