"""One replica's engine, after vLLM's scheduler: iterations, chunked prefill, paged KV, preemption, prefix cache.

At each iteration: every decoding sequence gets one token; what is left of the token budget goes to the one
partially prefilled sequence, then to waiting ones, first come first served, while the batch and the KV cache have
room. A decode that finds no KV block preempts the sequence admitted last, which is recomputed later. Full prompt
blocks enter the prefix cache when they are scheduled; idle ones are evicted, least recently used first.

Iterations with decodes only are taken many at a time: until the first sequence ends, KV runs out, or a request
arrives. With contexts growing by one token a sequence, n of them take n·alpha + beta·n(n−1)/2 seconds.

One simplification: two sequences that prefill the same prefix at once share its blocks; vLLM keeps both copies.
"""

from __future__ import annotations

import numpy as np

from steersman.runtime import blockset, bookkeeping
from steersman.runtime.compiled import njit
from steersman.runtime.cost import chunk_s, iteration_s
from steersman.runtime.outcomes import State as RequestState

_DONE = int(RequestState.DONE)


@njit(forceinline=True)
def span(e, steps):
    """Seconds that the first `steps` iterations of the running jump take."""
    return steps * e.alpha + e.beta * (0.5 * steps * (steps - 1))


@njit(forceinline=True)
def steps_within(e, seconds):
    """How many whole iterations of the running jump end within `seconds` of its start."""
    if e.beta <= 0.0:
        n = int(seconds / e.alpha)
    else:
        b = e.alpha - 0.5 * e.beta
        n = int((np.sqrt(b * b + 2.0 * e.beta * seconds) - b) / e.beta)
    n = max(0, min(n, e.steps))
    while n < e.steps and span(e, n + 1) <= seconds:  # rounding of the closed form
        n += 1
    while n > 0 and span(e, n) > seconds:
        n -= 1
    return n


@njit(forceinline=True)
def enqueue(s, requests, r, request, believed):
    """A request reaches replica `r` now and joins its queue; an idle engine is due to plan at once."""
    c, e = s.cluster[0], s.engines[r]
    i = c.free_slot
    q = s.sequences[i]
    c.free_slot = q.next
    c.inflight += 1
    q.request, q.next = request, -1
    q.target, q.computed, q.generated, q.held = requests[request].prompt_tokens, 0, 0, 0
    q.cached, q.believed = -1, believed
    q.first_token, q.base = np.nan, 0
    if e.last_waiting >= 0:
        s.sequences[e.last_waiting].next = i
    else:
        e.first_waiting = i
    e.last_waiting = i
    e.n_waiting += 1
    if e.next_event == np.inf:
        e.start, e.next_event, e.steps, e.streamed, e.mixed = c.now, c.now, 0, 0, 0
    elif e.mixed == 0:
        # Cut the jump at the end of the iteration that runs now, so that the request can join the next one.
        n = steps_within(e, c.now - e.start)
        if n < e.steps:
            n += 1
        e.steps = n
        e.next_event = e.start + span(e, n)


@njit(forceinline=True)
def _per_block(s):
    return s.cluster[0].prefix_tokens // s.cluster[0].block_tokens


@njit(forceinline=True)
def _available(s, r):
    """KV blocks that can be had: free ones, and idle cache entries."""
    return s.engines[r].free_blocks + s.heads[r].idle * _per_block(s)


@njit(forceinline=True)
def _take(s, r, count):
    """Take `count` available KV blocks, evicting idle cache entries where needed."""
    e = s.engines[r]
    while e.free_blocks < count:
        blockset.evict(s.nodes, s.buckets, s.heads, r)
        e.free_blocks += _per_block(s)
    e.free_blocks -= count


@njit(forceinline=True)
def _blocks(s, tokens):
    """KV blocks that hold `tokens`."""
    b = s.cluster[0].block_tokens
    return (tokens + b - 1) // b


@njit(forceinline=True)
def _cache_computed(s, requests, blocks, r, i, upto):
    """Let the cache own the sequence's full prefix blocks before index `upto`; it references them."""
    q = s.sequences[i]
    start = requests[q.request].block_start
    for k in range(q.held, upto):
        key = blocks[start + k]
        j = blockset.find(s.nodes, s.buckets, r, key)
        if j >= 0:
            blockset.hold(s.nodes, s.heads, r, j)
            s.engines[r].free_blocks += _per_block(s)
        else:
            blockset.insert(s.nodes, s.buckets, s.heads, r, key, 1)
    q.held = max(q.held, upto)


@njit(forceinline=True)
def _release(s, requests, blocks, r, i, tokens):
    """Give back the KV of a sequence that holds `tokens` computed tokens: its own blocks, and its references."""
    q = s.sequences[i]
    s.engines[r].free_blocks += _blocks(s, tokens) - q.held * _per_block(s)
    start = requests[q.request].block_start
    for k in range(q.held - 1, -1, -1):  # last block first: it becomes the oldest
        blockset.release(s.nodes, s.heads, r, blockset.find(s.nodes, s.buckets, r, blocks[start + k]))
    q.held = 0


@njit(forceinline=True)
def _requeue(s, requests, blocks, r, i, tokens):
    """Preempt a sequence: free its KV, and put it first in the queue to be computed anew."""
    e, q = s.engines[r], s.sequences[i]
    _release(s, requests, blocks, r, i, tokens)
    q.target, q.computed = requests[q.request].prompt_tokens + q.generated, 0
    q.next = e.first_waiting
    e.first_waiting = i
    if e.last_waiting < 0:
        e.last_waiting = i
    e.n_waiting += 1
    s.usage[r].preemptions += 1


@njit(forceinline=True)
def _preempt_last(s, requests, blocks, r):
    """Preempt the sequence that was admitted last."""
    e = s.engines[r]
    if e.partial >= 0:
        i = e.partial
        e.partial = -1
        _requeue(s, requests, blocks, r, i, s.sequences[i].computed)
        return
    e.n_decode -= 1
    i = s.decoding[r, e.n_decode]
    q = s.sequences[i]
    tokens = q.base + e.counter
    s.phase[r, -q.base % s.phase.shape[1]] -= 1
    e.context -= tokens
    q.generated = tokens - requests[q.request].prompt_tokens + 1
    _requeue(s, requests, blocks, r, i, tokens)


@njit(forceinline=True)
def _prefill(s, requests, blocks, r, i, chunk):
    """Schedule `chunk` prefill tokens of a sequence, whose KV is available. Returns their seconds."""
    e, q = s.engines[r], s.sequences[i]
    before = q.computed
    _take(s, r, _blocks(s, before + chunk) - _blocks(s, before))
    q.computed = before + chunk
    full = min(q.computed // s.cluster[0].prefix_tokens, requests[q.request].prompt_blocks)
    _cache_computed(s, requests, blocks, r, i, full)
    if q.computed == q.target:
        s.finishing[r, e.n_finishing] = i
        e.n_finishing += 1
        e.partial = -1
    else:
        e.partial = i
    return chunk_s(s.replicas[r], chunk, before)


@njit(forceinline=True)
def _admit(s, requests, blocks, r, budget):
    """Admit the first waiting sequence if its next chunk has room. Returns (tokens scheduled, seconds)."""
    e = s.engines[r]
    c = s.cluster[0]
    i = e.first_waiting
    q = s.sequences[i]
    request = requests[q.request]
    keys = blocks[request.block_start : request.block_start + request.prompt_blocks]
    m = blockset.matched(s.nodes, s.buckets, r, keys)
    if m * c.prefix_tokens >= q.target:  # the last token is always computed
        m -= 1
    computed = m * c.prefix_tokens
    chunk = min(q.target - computed, budget)
    need = _blocks(s, computed + chunk) - m * _per_block(s)
    if _available(s, r) - m * _per_block(s) < need:
        idle = 0
        for k in range(m):
            idle += s.nodes[r, blockset.find(s.nodes, s.buckets, r, keys[k])].refs == 0
        if _available(s, r) - idle * _per_block(s) < need:
            return 0, 0.0
    for k in range(m):
        blockset.hold(s.nodes, s.heads, r, blockset.find(s.nodes, s.buckets, r, keys[k]))
    e.first_waiting = q.next
    if e.first_waiting < 0:
        e.last_waiting = -1
    e.n_waiting -= 1
    q.next, q.held, q.computed = -1, m, computed
    if q.cached < 0:
        q.cached = computed
    return chunk, _prefill(s, requests, blocks, r, i, chunk)


@njit(forceinline=True)
def plan(s, requests, blocks, r, now):
    """Schedule the next iteration, or jump, of an engine that has just ended one (or was idle)."""
    while not _planned(s, requests, blocks, r, now):
        pass  # a preemption emptied the batch: now its victims have room


@njit(forceinline=True)
def _planned(s, requests, blocks, r, now):
    e, rep = s.engines[r], s.replicas[r]
    period = s.phase.shape[1]
    e.n_finishing = 0
    preempted = False
    while e.n_decode > 0 and _available(s, r) < s.phase[r, e.counter % period]:
        _preempt_last(s, requests, blocks, r)
        preempted = True
    budget = rep.token_budget - e.n_decode
    prefill_s, scheduled = 0.0, 0
    reserved = s.phase[r, e.counter % period]  # for the decodes of this iteration
    e.free_blocks -= reserved
    if e.partial >= 0:
        i = e.partial
        q = s.sequences[i]
        chunk = min(q.target - q.computed, budget)
        if _available(s, r) < _blocks(s, q.computed + chunk) - _blocks(s, q.computed):
            _preempt_last(s, requests, blocks, r)
            preempted = True
        else:
            prefill_s += _prefill(s, requests, blocks, r, i, chunk)
            scheduled += chunk
    if not preempted:
        while (
            e.first_waiting >= 0
            and e.partial < 0
            and scheduled < budget
            and e.n_decode + e.n_finishing < rep.max_num_seqs
        ):
            tokens, seconds = _admit(s, requests, blocks, r, budget - scheduled)
            if tokens == 0:
                break
            scheduled += tokens
            prefill_s += seconds
    e.free_blocks += reserved

    e.start, e.streamed = now, 0
    if scheduled > 0:
        e.mixed, e.steps, e.beta = 1, 1, 0.0
        e.alpha = iteration_s(rep, e.n_decode, e.context, prefill_s)
        _take(s, r, reserved)
    elif e.n_decode > 0:
        e.mixed = 0
        e.alpha = iteration_s(rep, e.n_decode, e.context, 0.0)
        e.beta = rep.decode_c_s * e.n_decode
        e.steps = 1 if preempted and e.first_waiting >= 0 else _jump(s, r)
    else:
        e.mixed, e.steps, e.next_event = 0, 0, np.inf
        return e.first_waiting < 0
    e.next_event = now + span(e, e.steps)
    return True


@njit(forceinline=True)
def _jump(s, r):
    """How many decode-only iterations run before a sequence ends or KV blocks run out; at least 1."""
    e = s.engines[r]
    period = s.phase.shape[1]
    n = s.finish[r, 0]
    for k in range(1, e.n_decode):
        n = min(n, s.finish[r, k])
    n -= e.counter
    available = _available(s, r)
    if e.n_decode * (n // period + 1) <= available:
        return n
    for k in range(n):
        available -= s.phase[r, (e.counter + k) % period]
        if available < 0:
            return max(1, k)
    return n


@njit(forceinline=True)
def sync(s, r, now):
    """Bring the router's view of replica `r` to `now`: tokens streamed so far, and fresh engine metrics."""
    e, v, c = s.engines[r], s.book.views[r], s.cluster[0]
    if e.n_decode > 0 and e.next_event != np.inf and e.mixed == 0:
        n = steps_within(e, now - e.start)
        if n > e.streamed:
            bookkeeping.stream(s.book, r, (n - e.streamed) * e.n_decode)
            e.streamed = n
    v.running = e.n_decode + e.n_finishing + (e.partial >= 0)
    v.waiting = e.n_waiting
    v.kv_use = (e.total_blocks - e.free_blocks - s.heads[r].idle * _per_block(s)) / e.total_blocks
    v.scraped_at_s = c.now


@njit(forceinline=True)
def complete(s, requests, blocks, outcomes, r):
    """End the running iteration or jump of replica `r`: tokens come out, sequences start to decode or end."""
    c, e, u = s.cluster[0], s.engines[r], s.usage[r]
    period = s.phase.shape[1]
    now, n = e.next_event, e.steps
    c.now = now

    seconds = min(now, c.horizon) - min(e.start, c.horizon)
    u.busy_s += seconds
    u.sequence_s += seconds * (e.n_decode + e.n_finishing + (e.partial >= 0))
    u.kv_s += seconds * (e.total_blocks - e.free_blocks - s.heads[r].idle * _per_block(s)) / e.total_blocks
    u.iterations += n
    u.output_tokens += n * e.n_decode + e.n_finishing if now <= c.horizon else 0

    if e.n_decode > 0:
        if e.mixed == 0:
            need = (n // period) * e.n_decode
            for k in range(n - n % period, n):
                need += s.phase[r, (e.counter + k) % period]
            _take(s, r, need)
        bookkeeping.stream(s.book, r, (n - e.streamed) * e.n_decode)
    e.counter += n
    e.context += n * e.n_decode

    kept = 0
    for k in range(e.n_decode):
        i = s.decoding[r, k]
        if s.finish[r, k] == e.counter:
            q = s.sequences[i]
            tokens = q.base + e.counter
            s.phase[r, -q.base % period] -= 1
            e.context -= tokens
            _end(s, requests, blocks, outcomes, r, i, tokens, now)
        else:
            s.decoding[r, kept] = i
            s.finish[r, kept] = s.finish[r, k]
            kept += 1
    e.n_decode = kept

    for k in range(e.n_finishing):
        i = s.finishing[r, k]
        q = s.sequences[i]
        request = requests[q.request]
        if q.generated == 0:
            q.first_token = now
            bookkeeping.first_token(s.book, now, r, request.prompt_tokens, request.prompt_tokens - q.believed)
        else:
            bookkeeping.stream(s.book, r, 1)
        q.generated += 1
        if q.generated == request.output_tokens:
            _end(s, requests, blocks, outcomes, r, i, q.target, now)
        else:
            q.base = q.target - e.counter
            s.phase[r, -q.base % period] += 1
            e.context += q.target
            s.decoding[r, e.n_decode] = i
            s.finish[r, e.n_decode] = e.counter + request.output_tokens - q.generated
            e.n_decode += 1
    e.n_finishing = 0
    e.next_event = np.inf


@njit(forceinline=True)
def _end(s, requests, blocks, outcomes, r, i, tokens, now):
    """A sequence has all its tokens: free its KV, report it, and let the cache keep the blocks of its output."""
    c, q = s.cluster[0], s.sequences[i]
    request = requests[q.request]
    output = request.output_tokens
    full = min(tokens // c.prefix_tokens, request.block_count)
    if full > q.held:
        _cache_computed(s, requests, blocks, r, i, full)
    _release(s, requests, blocks, r, i, tokens)

    o = outcomes[q.request]
    o.state, o.replica, o.cached_tokens = _DONE, r, max(0, q.cached)
    o.ttft_s = q.first_token - request.arrival_s
    o.e2e_s = now - request.arrival_s
    o.tpot_s = (now - q.first_token) / (output - 1) if output > 1 else 0.0
    promise = s.book.tenants[request.tenant]
    o.attained = o.ttft_s <= promise.ttft_slo_s and o.tpot_s <= promise.tpot_slo_s
    bookkeeping.end(
        s.book,
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
    q.next = c.free_slot
    c.free_slot = i
    c.inflight -= 1
