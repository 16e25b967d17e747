"""How sequences leave an engine: with all their tokens, badly, cancelled by their clients, or back into its queue."""

from __future__ import annotations

import numpy as np

from steersman.runtime import bookkeeping
from steersman.runtime.compiled import inner
from steersman.runtime.fleet import Queue
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.simulator import queue
from steersman.runtime.simulator.jump import NEVER
from steersman.runtime.simulator.memory import available_blocks, cache, release, take
from steersman.runtime.simulator.state import open_book, open_state

_DONE = int(RequestState.DONE)
_CANCELLED = int(RequestState.CANCELLED)
_PRIORITY = int(Queue.PRIORITY)


@inner(inline=True)
def free_slot(s, i):
    """The request of a sequence is on no replica any more."""
    c = s.cluster[0]
    s.sequences[i].next = c.free_slot
    c.free_slot = i
    c.inflight -= 1


@inner(inline=True)
def _judge(s, q, now, tokens):
    """Whether its promise was kept until now, when a sequence has `tokens` tokens; TTFT and TPOT where it has some."""
    request, o = s.requests[q.request], s.outcomes[q.request]
    promise = s.tenants[request.tenant]
    if tokens == 0:
        o.attained = q.cancel - request.arrival_s <= promise.ttft_slo_s
        return
    o.ttft_s = q.first_token - request.arrival_s + s.replicas[o.replica].latency_s
    o.tpot_s = (now - q.first_token) / (tokens - 1) if tokens > 1 else 0.0
    o.attained = o.ttft_s <= promise.ttft_slo_s and o.tpot_s <= promise.tpot_slo_s


@inner
def fail(a, r, i, generated, state):
    """A sequence that has left the engine's lists ends badly, with `generated` tokens."""
    s = open_state(a)
    c, q = s.cluster[0], s.sequences[i]
    request = s.requests[q.request]
    s.present[r, request.tenant] -= 1
    o = s.outcomes[q.request]
    o.state, o.replica, o.cached_tokens = state, r, max(0, q.cached)
    if state == _CANCELLED:
        _judge(s, q, c.now, generated)
    bookkeeping.end(
        open_book(a, q.gateway),
        c.now,
        r,
        request.tenant,
        request.prompt_tokens,
        request.prompt_tokens - q.believed,
        generated,
        generated > 0,
        False,
        o.attained,
    )
    s.ended[c.n_ended] = q.request
    c.n_ended += 1
    if q.swapped > 0:
        s.engines[r].host_free += q.swapped
    free_slot(s, i)


@inner
def end(a, r, i, tokens):
    """A sequence has all its tokens: free its KV, report it, and let the cache keep the blocks of its output."""
    s = open_state(a)
    c, q = s.cluster[0], s.sequences[i]
    request, now = s.requests[q.request], c.now
    output = request.output_tokens
    cache(s, a, r, i, min(tokens // np.int32(c.prefix_tokens), request.block_count))
    release(s, a, r, i, tokens)
    s.present[r, request.tenant] -= 1

    o = s.outcomes[q.request]
    o.state, o.replica, o.cached_tokens, o.quality = _DONE, r, max(0, q.cached), s.replicas[r].quality
    o.e2e_s = now - request.arrival_s + s.replicas[r].latency_s
    _judge(s, q, now, output)
    bookkeeping.end(
        open_book(a, q.gateway),
        now,
        r,
        request.tenant,
        request.prompt_tokens,
        request.prompt_tokens - q.believed,
        output,
        True,
        True,
        o.attained,
    )
    s.ended[c.n_ended] = q.request
    c.n_ended += 1
    free_slot(s, i)


@inner
def stop_decoding(a, r, k):
    """Take the k-th decoding sequence out of the batch. Returns (sequence, computed tokens)."""
    s = open_state(a)
    c, e = s.cluster[0], s.engines[r]
    i = s.decoding[r, k]
    q = s.sequences[i]
    tokens = q.base + e.counter
    s.phase[r, -q.base & (c.block_tokens - 1)] -= 1
    s.streams[r, q.gateway] -= 1
    e.context -= tokens
    q.generated = tokens - s.requests[q.request].prompt_tokens + 1
    e.n_decode -= 1
    for j in range(k, e.n_decode):
        s.decoding[r, j] = s.decoding[r, j + 1]
        s.finish[r, j] = s.finish[r, j + 1]
    _first_finish(s, r)
    return i, tokens


@inner(inline=True)
def _first_finish(s, r):
    e = s.engines[r]
    first = NEVER
    for k in range(e.n_decode):
        first = min(first, s.finish[r, k])
    e.first_finish = first


@inner(inline=True)
def victim(s, r):
    """Who is preempted when KV runs out: an index into the decoding ones, or their number for the partial one."""
    e = s.engines[r]
    victim = e.n_decode
    if e.partial < 0:
        victim -= 1
    if s.replicas[r].queue == _PRIORITY:
        lowest = _priority(s, e.partial if victim == e.n_decode else s.decoding[r, victim])
        for k in range(victim - 1, -1, -1):
            if _priority(s, s.decoding[r, k]) < lowest:
                victim, lowest = k, _priority(s, s.decoding[r, k])
    return victim


@inner(inline=True)
def _priority(s, i):
    return s.requests[s.sequences[i].request].priority


@inner
def preempt(a, r, victim):
    """Preempt a sequence: free its KV, and put it first in the queue, to be computed anew or swapped in."""
    s = open_state(a)
    e, rep = s.engines[r], s.replicas[r]
    if victim == e.n_decode:
        i = e.partial
        tokens = np.int64(s.sequences[i].computed)
        e.partial = -1
    else:
        i, tokens = stop_decoding(a, r, victim)
    release(s, a, r, i, tokens)
    q = s.sequences[i]
    q.target, q.computed = s.requests[q.request].prompt_tokens + q.generated, 0
    if rep.swap_s_per_token > 0.0 and tokens <= e.host_free:
        q.swapped = tokens
        e.host_free -= tokens
        e.extra_s += tokens * rep.swap_s_per_token
    queue.prepend(s, r, i)
    s.usage[r].preemptions += 1


@inner
def drop_cancelled(a, r):
    """The clients of some sequences have left: end them, wherever they are."""
    s = open_state(a)
    e, now = s.engines[r], s.cluster[0].now
    e.next_cancel = np.inf
    before, i = -1, e.first_waiting
    while i >= 0:
        after = s.sequences[i].next
        if s.sequences[i].cancel <= now:
            queue.remove(s, r, before, i)
            fail(a, r, i, s.sequences[i].generated, _CANCELLED)
        else:
            e.next_cancel = min(e.next_cancel, s.sequences[i].cancel)
            before = i
        i = after
    if e.partial >= 0:
        i = e.partial
        if s.sequences[i].cancel <= now:
            e.partial = -1
            release(s, a, r, i, s.sequences[i].computed)
            fail(a, r, i, s.sequences[i].generated, _CANCELLED)
        else:
            e.next_cancel = min(e.next_cancel, s.sequences[i].cancel)
    k = 0
    while k < e.n_decode:
        i = s.decoding[r, k]
        if s.sequences[i].cancel <= now:
            i, tokens = stop_decoding(a, r, k)
            release(s, a, r, i, tokens)
            fail(a, r, i, s.sequences[i].generated, _CANCELLED)
        else:
            e.next_cancel = min(e.next_cancel, s.sequences[i].cancel)
            k += 1


@inner
def resize(a, r):
    """The KV memory of replica `r` has been changed. Returns whether anything was preempted."""
    s = open_state(a)
    e = s.engines[r]
    total = s.replicas[r].kv_tokens >> s.cluster[0].shift
    e.free_blocks += total - e.total_blocks
    e.total_blocks = total
    preempted = False
    while available_blocks(s, a, r) < 0:
        preempt(a, r, victim(s, r))
        preempted = True
    take(s, a, r, 0)
    return preempted
