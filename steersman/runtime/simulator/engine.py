"""One replica's engine, after vLLM's scheduler: iterations, chunked prefill, paged KV, preemption, prefix cache.

`docs/simulator.md` says what it does; here it is done many iterations at a time (`jump`). Requests reach it here, and
its iterations end here; `planning` begins them, `leaving` takes sequences out.

All functions here and in these modules take the address `a` of the cluster (see `state`), or its views `s`, and the
replica `r`.
"""

from __future__ import annotations

import numpy as np

from steersman.runtime import bookkeeping
from steersman.runtime.compiled import inner
from steersman.runtime.fleet import Batching, Queue
from steersman.runtime.simulator import queue
from steersman.runtime.simulator.jump import NEVER, cut, steps_within
from steersman.runtime.simulator.leaving import end
from steersman.runtime.simulator.memory import cache, grown, take
from steersman.runtime.simulator.metering import count_served, stream, use
from steersman.runtime.simulator.state import open_book, open_state

_VTC = int(Queue.VTC)
_STATIC = int(Batching.STATIC)


@inner(inline=True)
def new_slot(s):
    """A sequence that nothing uses."""
    c = s.cluster[0]
    i = c.free_slot
    if i >= 0:
        c.free_slot = s.sequences[i].next
    else:
        i = c.used_slots
        c.used_slots += 1
    c.inflight += 1
    return i


@inner
def enqueue(a, r, request, gateway, believed, expected):
    """A request reaches replica `r` now and joins its queue."""
    s = open_state(a)
    c, e, row = s.cluster[0], s.engines[r], s.requests[request]
    i = new_slot(s)
    q = s.sequences[i]
    q.request, q.gateway, q.queued, q.believed, q.expected = request, gateway, c.now, believed, expected
    q.target, q.computed, q.generated, q.held, q.node, q.swapped = row.prompt_tokens, 0, 0, 0, -1, 0
    q.cached, q.first_token, q.base, q.batched = -1, np.nan, 0, 0
    q.cancel = row.arrival_s + row.cancel_s if row.cancel_s > 0.0 else np.inf
    if s.replicas[r].queue == _VTC and s.present[r, row.tenant] == 0 and e.steps > 0:
        count_served(s, r, steps_within(e, c.now - e.start))
    queue.enter(s, r, row.tenant)
    first = e.n_waiting == 0
    queue.append(s, r, i)
    if q.cancel < e.next_cancel:
        e.next_cancel = q.cancel
        cut(s, r, max(q.cancel, c.now), q.cancel > c.now)  # its client may have left before it is retried
    if e.steps == 0:
        s.due[r] = c.now
    elif _may_join(s, r, first):
        cut(s, r, c.now, 0)


@inner(inline=True)
def _may_join(s, r, first):
    """Whether one that starts to wait now could be admitted when the running iteration ends.

    Else the jump goes on: the batch is full, a prefill takes all of the budget, or others wait for memory before it.
    """
    e, rep = s.engines[r], s.replicas[r]
    if e.partial >= 0 or e.n_decode >= rep.max_num_seqs or rep.batching == _STATIC:
        return False
    return first or rep.queue != 0


@inner
def complete(a, r):
    """End the running iteration or jump of replica `r`: tokens come out, sequences start to decode or end."""
    s = open_state(a)
    c, e, u = s.cluster[0], s.engines[r], s.usage[r]
    now, n = c.now, e.steps
    if n == 0:
        return
    need = grown(s, r, n) if e.mixed == 0 else 0
    use(s, a, r, now, need)
    if e.start < c.horizon:
        within = n if now <= c.horizon else steps_within(e, c.horizon - e.start)
        u.output_tokens += within * (e.n_decode + e.n_finishing)
    u.iterations += n
    if need > 0:
        take(s, a, r, need)
    vtc = s.replicas[r].queue == _VTC
    if e.n_decode > 0:
        stream(s, a, r, n - e.streamed)
        if vtc:
            count_served(s, r, n)
    if e.chunk > 0:
        q = s.sequences[e.partial]
        q.computed += n * e.chunk
        full = min(q.computed // np.int32(c.prefix_tokens), s.requests[q.request].prompt_blocks)
        cache(s, a, r, e.partial, full)
    e.counter += n
    e.context += n * e.n_decode
    e.steps = 0
    s.due[r] = np.inf
    if e.n_decode > 0 and e.counter >= e.first_finish:
        _end_finished(a, r)
    if e.n_finishing > 0:
        _begin_decoding(a, r, vtc)


@inner
def _end_finished(a, r):
    s = open_state(a)
    c, e = s.cluster[0], s.engines[r]
    kept, first = 0, NEVER
    for k in range(e.n_decode):
        i, finish = s.decoding[r, k], s.finish[r, k]
        if finish == e.counter:
            q = s.sequences[i]
            tokens = q.base + e.counter
            s.phase[r, -q.base & (c.block_tokens - 1)] -= 1
            s.streams[r, q.gateway] -= 1
            e.context -= tokens
            end(a, r, i, tokens)
        else:
            s.decoding[r, kept] = i
            s.finish[r, kept] = finish
            first = min(first, finish)
            kept += 1
    e.n_decode, e.first_finish = kept, first


@inner
def _begin_decoding(a, r, vtc):
    """The prefill of some sequences is complete: each gives a token."""
    s = open_state(a)
    c, e = s.cluster[0], s.engines[r]
    if e.n_decode == 0:
        e.first_finish = NEVER
    for k in range(e.n_finishing):
        i = s.finishing[r, k]
        q = s.sequences[i]
        request = s.requests[q.request]
        if q.generated == 0:
            q.first_token = c.now
            bookkeeping.first_token(
                open_book(a, q.gateway), c.now, r, request.prompt_tokens, request.prompt_tokens - q.believed
            )
        else:
            bookkeeping.stream(open_book(a, q.gateway), r, 1)
        if vtc:
            queue.serve(s, r, i, queue.OUTPUT_TOKEN)
        q.generated += 1
        if q.generated == request.output_tokens:
            end(a, r, i, q.target)
        else:
            q.base = q.target - e.counter
            s.phase[r, -q.base & (c.block_tokens - 1)] += 1
            s.streams[r, q.gateway] += 1
            e.context += q.target
            s.decoding[r, e.n_decode] = i
            s.finish[r, e.n_decode] = e.counter + request.output_tokens - q.generated
            e.first_finish = min(e.first_finish, s.finish[r, e.n_decode])
            e.n_decode += 1
    e.n_finishing = 0
