"""One replica's engine, after vLLM's scheduler: iterations, chunked prefill, paged KV, preemption, prefix cache.

`docs/simulator.md` says what it does; here it is done many iterations at a time. Iterations that decode the same
sequences, beside full chunks of one partial prefill, form an arithmetic series: n of them take
n·alpha + beta·n(n−1)/2 seconds.

All functions take the address `a` of the cluster (see `state`) and the replica `r`.
"""

from __future__ import annotations

import numpy as np

from steersman.runtime import bookkeeping, prefixes
from steersman.runtime.compiled import inner, njit
from steersman.runtime.cost import chunk_s, growth_s, iteration_s
from steersman.runtime.fleet import Batching, Queue
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.simulator import queue
from steersman.runtime.simulator.state import open_book, open_state, tree_of

_DONE, _CANCELLED, _FAILED = int(RequestState.DONE), int(RequestState.CANCELLED), int(RequestState.FAILED)
_PRIORITY, _VTC = int(Queue.PRIORITY), int(Queue.VTC)
_STATIC = int(Batching.STATIC)
_NEVER = 1 << 62


@inner(inline=True)
def span(e, steps):
    """Seconds that the first `steps` iterations of the running jump take."""
    return steps * e.alpha + e.beta * (0.5 * steps * (steps - 1))


@inner(inline=True)
def steps_within(e, seconds):
    """How many whole iterations of the running jump end within `seconds` of its start."""
    if seconds < e.alpha:
        return 0
    if e.beta <= 0.0:
        n = int(min(seconds / e.alpha, 1e9))
    else:
        b = e.alpha - 0.5 * e.beta
        n = int(min((np.sqrt(b * b + 2.0 * e.beta * seconds) - b) / e.beta, 1e9))
    n = max(0, min(n, e.steps))
    while n < e.steps and span(e, n + 1) <= seconds:  # rounding of the closed form
        n += 1
    while n > 0 and span(e, n) > seconds:
        n -= 1
    return n


@inner(inline=True)
def cut(s, r, time, at_boundary):
    """End the running jump with the iteration that runs at `time`.

    at_boundary: 1 if an iteration that ends exactly then is early enough.
    """
    e = s.engines[r]
    if e.mixed == 0 and e.steps > 1:
        n = steps_within(e, time - e.start)
        if n < e.steps and (at_boundary == 0 or span(e, n) < time - e.start):
            n += 1
        e.steps = max(1, n)
        s.due[r] = e.start + span(e, e.steps)


@njit
def interrupt(a, r):
    """Replica `r` was changed: it plans anew when the iteration that runs now ends, or at once where none does.

    A decision that is due is guarded anew.
    """
    s = open_state(a)
    s.cluster[0].observed = 0
    now, e = s.cluster[0].now, s.engines[r]
    cut(s, r, now, 0)
    if e.steps == 0 and e.n_waiting > 0:
        s.due[r] = now


@inner(inline=True)
def running(e):
    """Sequences in the batch."""
    return e.n_decode + e.n_finishing + (e.partial >= 0)


@inner(inline=True)
def _available(s, a, r):
    """KV blocks that can be had: free ones, and idle cache entries."""
    return s.engines[r].free_blocks + prefixes.head(tree_of(s, a, r)).idle * s.cluster[0].per_prefix


@inner(inline=True)
def _take(s, a, r, count):
    """Take `count` available KV blocks, evicting idle cache entries where needed."""
    e, per = s.engines[r], s.cluster[0].per_prefix
    short = count - e.free_blocks
    if short > 0:
        e.free_blocks += per * prefixes.evict(tree_of(s, a, r), (short + per - 1) // per)
    e.free_blocks -= count


@inner(inline=True)
def _blocks(c, tokens):
    """KV blocks that hold `tokens`."""
    return (tokens + c.block_tokens - 1) >> c.shift


@inner(inline=True)
def _grown(s, r, n):
    """KV blocks that the next `n` iterations of the running jump take."""
    c, e = s.cluster[0], s.engines[r]
    period = c.block_tokens
    need = (n >> c.shift) * e.n_decode
    for k in range(n & ~(period - 1), n):
        need += s.phase[r, (e.counter + k) & (period - 1)]
    if e.chunk > 0:
        computed = s.sequences[e.partial].computed
        need += _blocks(c, computed + n * e.chunk) - _blocks(c, computed)
    return need


@inner(inline=True)
def _tokens(s, r, i):
    """Computed tokens of a decoding sequence."""
    return s.sequences[i].base + s.engines[r].counter


# Sequences come and go


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
        _serve(s, r, steps_within(e, c.now - e.start))
    queue.enter(s, r, row.tenant)
    first = e.n_waiting == 0
    queue.append(s, r, i)
    if q.cancel < e.next_cancel:
        e.next_cancel = q.cancel
        cut(s, r, max(q.cancel, c.now), q.cancel > c.now)  # its client may have left before it is retried
    if e.steps == 0:
        rep = s.replicas[r]
        if rep.batching == _STATIC and e.n_waiting < rep.max_num_seqs:
            s.due[r] = max(c.now, min(s.sequences[e.first_waiting].queued + rep.batch_wait_s, e.next_cancel))
        else:
            s.due[r] = c.now
    elif _may_join(s, r, first):
        cut(s, r, c.now, 0)


@inner(inline=True)
def _serve(s, r, steps):
    """Let the virtual token counters count the first `steps` iterations of the running jump."""
    e = s.engines[r]
    for k in range(e.n_decode):
        queue.serve(s, r, s.decoding[r, k], queue.OUTPUT_TOKEN * (steps - e.served))
    e.served = steps


@inner(inline=True)
def _may_join(s, r, first):
    """Whether one that starts to wait now could be admitted when the running iteration ends.

    Else the jump goes on: the batch is full, a prefill takes all of the budget, or others wait for memory before it.
    """
    e, rep = s.engines[r], s.replicas[r]
    if e.partial >= 0 or e.n_decode >= rep.max_num_seqs or rep.batching == _STATIC:
        return False
    return first or rep.queue != 0


@inner(inline=True)
def _cache(s, a, r, i, upto):
    """Let the cache own the sequence's full prefix blocks before index `upto`; it references them."""
    q = s.sequences[i]
    if upto > q.held:
        node, held, shared = prefixes.extend(
            tree_of(s, a, r), s.blocks, s.requests[q.request].block_start, q.node, q.held, upto
        )
        q.node, q.held = node, held
        s.engines[r].free_blocks += shared * s.cluster[0].per_prefix


@inner(inline=True)
def _release(s, a, r, i, tokens):
    """Give back the KV of a sequence that holds `tokens` computed tokens: its own blocks, and its references."""
    q, c = s.sequences[i], s.cluster[0]
    s.engines[r].free_blocks += _blocks(c, tokens) - q.held * c.per_prefix
    prefixes.release(tree_of(s, a, r), q.node)
    q.held, q.node = 0, -1


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
def _end(a, r, i, tokens):
    """A sequence has all its tokens: free its KV, report it, and let the cache keep the blocks of its output."""
    s = open_state(a)
    c, q = s.cluster[0], s.sequences[i]
    request, now = s.requests[q.request], c.now
    output = request.output_tokens
    _cache(s, a, r, i, min(tokens // np.int32(c.prefix_tokens), request.block_count))
    _release(s, a, r, i, tokens)
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
def _stop_decoding(a, r, k):
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
    first = _NEVER
    for k in range(e.n_decode):
        first = min(first, s.finish[r, k])
    e.first_finish = first


@inner(inline=True)
def _victim(s, r):
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


@inner
def _preempt(a, r, victim):
    """Preempt a sequence: free its KV, and put it first in the queue, to be computed anew or swapped in."""
    s = open_state(a)
    e, rep = s.engines[r], s.replicas[r]
    if victim == e.n_decode:
        i = e.partial
        tokens = np.int64(s.sequences[i].computed)
        e.partial = -1
    else:
        i, tokens = _stop_decoding(a, r, victim)
    _release(s, a, r, i, tokens)
    q = s.sequences[i]
    q.target, q.computed = s.requests[q.request].prompt_tokens + q.generated, 0
    if rep.swap_s_per_token > 0.0 and tokens <= e.host_free:
        q.swapped = tokens
        e.host_free -= tokens
        e.extra_s += tokens * rep.swap_s_per_token
    queue.prepend(s, r, i)
    s.usage[r].preemptions += 1


@inner(inline=True)
def _priority(s, i):
    return s.requests[s.sequences[i].request].priority


@inner
def _drop_cancelled(a, r):
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
            _release(s, a, r, i, s.sequences[i].computed)
            fail(a, r, i, s.sequences[i].generated, _CANCELLED)
        else:
            e.next_cancel = min(e.next_cancel, s.sequences[i].cancel)
    k = 0
    while k < e.n_decode:
        i = s.decoding[r, k]
        if s.sequences[i].cancel <= now:
            i, tokens = _stop_decoding(a, r, k)
            _release(s, a, r, i, tokens)
            fail(a, r, i, s.sequences[i].generated, _CANCELLED)
        else:
            e.next_cancel = min(e.next_cancel, s.sequences[i].cancel)
            k += 1


@inner
def _resize(a, r):
    """The KV memory of replica `r` has been changed. Returns whether anything was preempted."""
    s = open_state(a)
    e = s.engines[r]
    total = s.replicas[r].kv_tokens >> s.cluster[0].shift
    e.free_blocks += total - e.total_blocks
    e.total_blocks = total
    preempted = False
    while _available(s, a, r) < 0:
        _preempt(a, r, _victim(s, r))
        preempted = True
    _take(s, a, r, 0)
    return preempted


# An iteration begins


@inner(inline=True)
def _prefill(s, a, r, i, chunk, have):
    """Schedule `chunk` prefill tokens of a sequence, beyond `have` KV blocks of its own. Returns their seconds."""
    c, e, q = s.cluster[0], s.engines[r], s.sequences[i]
    before = q.computed
    _take(s, a, r, _blocks(c, before + chunk) - have)
    q.computed = before + chunk
    _cache(s, a, r, i, min(q.computed // np.int32(c.prefix_tokens), s.requests[q.request].prompt_blocks))
    if q.computed == q.target:
        s.finishing[r, e.n_finishing] = i
        e.n_finishing += 1
        e.partial = -1
    else:
        e.partial = i
    return chunk_s(s.replicas[r], chunk, before)


@inner
def _admit(a, r, budget):
    """Admit the waiting sequence that is next, if its chunk has room; fail it if the KV memory has become too small.

    Returns (tokens scheduled: 0 where there is no room, −1 where it failed; seconds; whether it may come to fit while
    nothing leaves: evicting a prefix block that it would have shared leaves free what decodes do not need of it).
    """
    s = open_state(a)
    c, e = s.cluster[0], s.engines[r]
    before, i = queue.following(s, r)
    q = s.sequences[i]
    request = s.requests[q.request]
    if _blocks(c, q.target) > e.total_blocks:
        queue.remove(s, r, before, i)
        fail(a, r, i, q.generated, _FAILED)
        return -1, 0.0, False
    tree, prefix = tree_of(s, a, r), np.int32(c.prefix_tokens)
    found = prefixes.lookup(tree, s.blocks, request.block_start, request.prompt_blocks)
    m, idle = found.blocks, found.idle
    if m * prefix >= q.target:  # the last token is always computed
        m -= 1
        idle = max(0, idle - 1)
    computed = max(m * prefix, q.swapped)
    chunk = min(q.target - computed, budget)
    lack = _blocks(c, computed + chunk) - m * c.per_prefix - _available(s, a, r) + idle * c.per_prefix
    if lack > 0:
        return 0, 0.0, idle > 0 and lack + e.free_blocks < c.per_prefix
    node, held = prefixes.hold(tree, s.blocks, request.block_start, m)
    if held < m:
        computed = max(held * prefix, q.swapped)
        chunk = min(q.target - computed, budget)
        if _available(s, a, r) < _blocks(c, computed + chunk) - held * c.per_prefix:
            prefixes.release(tree, node)
            return 0, 0.0, False
    queue.remove(s, r, before, i)
    if q.swapped > 0:
        e.extra_s += s.replicas[r].swap_s_per_token * max(0, q.swapped - held * prefix)
        e.host_free += q.swapped
        q.swapped = 0
    q.held, q.node, q.computed = held, node, computed
    if q.cached < 0:
        q.cached = computed
        if s.replicas[r].queue == _VTC:
            queue.serve(s, r, i, queue.INPUT_TOKEN * request.prompt_tokens)
    return chunk, _prefill(s, a, r, i, chunk, held * c.per_prefix), False


@inner
def plan(a, r):
    """Schedule the next iteration, or jump, of an engine that has just ended one, or was idle."""
    s = open_state(a)
    e, now = s.engines[r], s.cluster[0].now
    if e.next_cancel <= now:
        _drop_cancelled(a, r)
    preempted = False
    if s.replicas[r].kv_tokens >> s.cluster[0].shift != e.total_blocks:
        preempted = _resize(a, r)
    while not _planned(s, a, r, now, preempted):
        preempted = False  # the batch was emptied: now those that wait have room


@inner(inline=True)
def _batch_waits(s, r, now):
    """Static batching: whether an empty engine goes on waiting for a batch. If not, the batch is formed."""
    e, rep = s.engines[r], s.replicas[r]
    if e.n_waiting == 0:
        return False
    until = s.sequences[e.first_waiting].queued + rep.batch_wait_s
    if e.n_waiting < rep.max_num_seqs and now < until:
        e.steps, e.mixed = 0, 0
        s.due[r] = min(until, e.next_cancel)
        return True
    queue.form_batch(s, r)
    return False


@inner(inline=True)
def _planned(s, a, r, now, preempted):
    c, e, rep = s.cluster[0], s.engines[r], s.replicas[r]
    column = e.counter & (c.block_tokens - 1)
    e.n_finishing, e.chunk, e.mixed, e.start, e.streamed, e.served = 0, 0, 0, now, 0, 0
    static = rep.batching == _STATIC
    if static and e.n_decode == 0 and e.partial < 0 and _batch_waits(s, r, now):
        return True
    while e.n_decode > 0 and _available(s, a, r) < s.phase[r, column]:
        _preempt(a, r, _victim(s, r))
        preempted = True
    budget = max(0, rep.token_budget - e.n_decode)
    prefill_s, scheduled, close = 0.0, 0, False
    reserved = s.phase[r, column]  # for the decodes of this iteration
    _take(s, a, r, reserved)
    if e.partial >= 0 and budget > 0:
        i = e.partial
        q = s.sequences[i]
        rest = q.target - q.computed
        chunk = min(rest, budget)
        have = _blocks(c, q.computed)
        if _available(s, a, r) < _blocks(c, q.computed + chunk) - have:
            _preempt(a, r, e.n_decode)
            preempted = True
        elif chunk < rest:
            e.chunk = chunk  # the budget is used up: a jump over full chunks
            prefill_s = chunk_s(rep, chunk, q.computed)
        else:
            prefill_s = _prefill(s, a, r, i, chunk, have)
            scheduled = chunk
    if not preempted and e.chunk == 0:
        while (
            e.n_waiting > 0
            and e.partial < 0
            and scheduled < budget
            and e.n_decode + e.n_finishing < rep.max_num_seqs
            and (not static or e.batch > 0)
        ):
            tokens, seconds, close = _admit(a, r, budget - scheduled)
            if tokens == 0:
                break
            scheduled += max(0, tokens)
            prefill_s += seconds
    e.free_blocks += reserved

    if scheduled == 0 and e.chunk == 0 and e.n_decode == 0:
        e.steps = 0
        s.due[r] = np.inf
        return e.n_waiting == 0
    e.alpha = rep_s = iteration_s(rep, e.n_decode, e.context, prefill_s)
    if scheduled > 0:
        e.mixed, e.steps, e.beta = 1, 1, 0.0
        _take(s, a, r, reserved)
    else:
        e.beta = growth_s(rep, e.n_decode, e.chunk)
        alone = (preempted and e.n_waiting > 0) or e.extra_s > 0.0 or (e.chunk > 0 and rep_s <= _floor(rep, e))
        alone = alone or close
        if rep.queue == _VTC and e.n_waiting > 0 and e.partial < 0 and e.n_decode < rep.max_num_seqs:
            alone = True  # the first has no room, but who is first changes with every token
        e.steps = 1
        if not alone:
            _jump(s, a, r)
            if e.steps > 1 and e.chunk > 0 and _grown(s, r, e.steps) > e.free_blocks and _shares(s, a, r):
                e.steps = 1  # sharing gives back blocks, so that fewer are evicted than for all iterations at once
    if e.slowdown != 1.0:
        e.alpha *= e.slowdown
        e.beta *= e.slowdown
    if e.extra_s > 0.0:
        e.alpha += e.extra_s
        e.extra_s = 0.0
    if e.steps > 1 and e.next_cancel < np.inf:
        cut(s, r, e.next_cancel, 1)
    s.due[r] = now + span(e, e.steps)
    return True


@inner(inline=True)
def _floor(rep, e):
    """What a mixed iteration takes at least: then it does not grow with the prefill."""
    return iteration_s(rep, e.n_decode, e.context, 0.0) if e.n_decode > 0 else 0.0


@inner(inline=True)
def _shares(s, a, r):
    """Whether the next prefix block of the partial sequence is in the cache by now."""
    q = s.sequences[s.engines[r].partial]
    request = s.requests[q.request]
    return prefixes.lookup(tree_of(s, a, r), s.blocks, request.block_start, request.prompt_blocks).blocks > q.held


@inner(inline=True)
def _jump(s, a, r):
    """How many iterations like the first run before a sequence ends, a prefill nears its end, or KV runs out."""
    c, e = s.cluster[0], s.engines[r]
    n = _NEVER
    if e.n_decode > 0:
        n = e.first_finish - e.counter
    computed, chunk = 0, e.chunk
    if chunk > 0:
        computed = s.sequences[e.partial].computed
        n = min(n, (s.sequences[e.partial].target - computed - 1) // chunk)
    available = _available(s, a, r)
    bound = e.n_decode * ((n >> c.shift) + 1)
    if chunk > 0:
        bound += _blocks(c, n * chunk) + 1
    if bound > available:
        for k in range(n):
            available -= s.phase[r, (e.counter + k) & (c.block_tokens - 1)]
            if chunk > 0:
                available -= _blocks(c, computed + (k + 1) * chunk) - _blocks(c, computed + k * chunk)
            if available < 0:
                n = max(1, k)
                break
    e.steps = n


# … and ends


@inner(inline=True)
def stream_to(s, a, r, now):
    """Let the gateways count the tokens that have come out of the running jump by `now`."""
    e = s.engines[r]
    if e.mixed == 0 and e.n_decode > 0 and e.steps > 0:
        n = steps_within(e, now - e.start)
        if n > e.streamed:
            _stream(s, a, r, n - e.streamed)
            e.streamed = n


@inner(inline=True)
def _stream(s, a, r, steps):
    for g in range(s.streams.shape[1]):
        if s.streams[r, g] > 0:
            bookkeeping.stream(open_book(a, g), r, steps * s.streams[r, g])


@inner(inline=True)
def kv_blocks(s, a, r):
    """KV blocks that sequences hold, as of the start of the running iteration or jump."""
    return s.engines[r].total_blocks - _available(s, a, r)


@inner(inline=True)
def scrape(s, a, g, r, now):
    """Gateway `g` reads the metrics of replica `r`."""
    e, v = s.engines[r], open_book(a, g).views[r]
    v.running = running(e)
    v.waiting = e.n_waiting
    grown = e.streamed * e.n_decode / s.cluster[0].block_tokens
    v.kv_use = min(1.0, (kv_blocks(s, a, r) + grown) / e.total_blocks)
    v.scraped_at_s = now


@inner(inline=True)
def use(s, a, r, now, need):
    """Count the time from the start of the running iteration or jump, which takes `need` KV blocks, to `now`."""
    c, e, u = s.cluster[0], s.engines[r], s.usage[r]
    if e.start < c.horizon:
        seconds = min(now, c.horizon) - e.start
        u.busy_s += seconds
        u.sequence_s += seconds * running(e)
        u.kv_s += seconds * (kv_blocks(s, a, r) + 0.5 * need) / e.total_blocks


@inner
def complete(a, r):
    """End the running iteration or jump of replica `r`: tokens come out, sequences start to decode or end."""
    s = open_state(a)
    c, e, u = s.cluster[0], s.engines[r], s.usage[r]
    now, n = c.now, e.steps
    if n == 0:
        return
    need = _grown(s, r, n) if e.mixed == 0 else 0
    use(s, a, r, now, need)
    if e.start < c.horizon:
        within = n if now <= c.horizon else steps_within(e, c.horizon - e.start)
        u.output_tokens += within * (e.n_decode + e.n_finishing)
    u.iterations += n
    if need > 0:
        _take(s, a, r, need)
    vtc = s.replicas[r].queue == _VTC
    if e.n_decode > 0:
        _stream(s, a, r, n - e.streamed)
        if vtc:
            _serve(s, r, n)
    if e.chunk > 0:
        q = s.sequences[e.partial]
        q.computed += n * e.chunk
        full = min(q.computed // np.int32(c.prefix_tokens), s.requests[q.request].prompt_blocks)
        _cache(s, a, r, e.partial, full)
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
    kept, first = 0, _NEVER
    for k in range(e.n_decode):
        i, finish = s.decoding[r, k], s.finish[r, k]
        if finish == e.counter:
            q = s.sequences[i]
            tokens = q.base + e.counter
            s.phase[r, -q.base & (c.block_tokens - 1)] -= 1
            s.streams[r, q.gateway] -= 1
            e.context -= tokens
            _end(a, r, i, tokens)
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
        e.first_finish = _NEVER
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
            _end(a, r, i, q.target)
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
