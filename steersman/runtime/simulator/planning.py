"""An iteration of an engine begins: who computes how many tokens in it, and how many iterations are like it."""

from __future__ import annotations

import numpy as np

from steersman.runtime import prefixes
from steersman.runtime.compiled import inner
from steersman.runtime.cost import chunk_s, growth_s, iteration_s
from steersman.runtime.fleet import Batching, Queue
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.simulator import queue
from steersman.runtime.simulator.jump import NEVER, cut, span
from steersman.runtime.simulator.leaving import drop_cancelled, fail, preempt, resize, victim
from steersman.runtime.simulator.memory import available_blocks, blocks_for, cache, grown, take
from steersman.runtime.simulator.state import open_state, tree_of

_FAILED = int(RequestState.FAILED)
_VTC = int(Queue.VTC)
_STATIC = int(Batching.STATIC)


@inner(inline=True)
def _prefill(s, a, r, i, chunk, have):
    """Schedule `chunk` prefill tokens of a sequence, beyond `have` KV blocks of its own. Returns their seconds."""
    c, e, q = s.cluster[0], s.engines[r], s.sequences[i]
    before = q.computed
    take(s, a, r, blocks_for(c, before + chunk) - have)
    q.computed = before + chunk
    cache(s, a, r, i, min(q.computed // np.int32(c.prefix_tokens), s.requests[q.request].prompt_blocks))
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
    if blocks_for(c, q.target) > e.total_blocks:
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
    lack = blocks_for(c, computed + chunk) - m * c.per_prefix - available_blocks(s, a, r) + idle * c.per_prefix
    if lack > 0:
        return 0, 0.0, idle > 0 and lack + e.free_blocks < c.per_prefix
    node, held = prefixes.hold(tree, s.blocks, request.block_start, m)
    if held < m:
        computed = max(held * prefix, q.swapped)
        chunk = min(q.target - computed, budget)
        if available_blocks(s, a, r) < blocks_for(c, computed + chunk) - held * c.per_prefix:
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
        drop_cancelled(a, r)
    preempted = False
    if s.replicas[r].kv_tokens >> s.cluster[0].shift != e.total_blocks:
        preempted = resize(a, r)
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
    while e.n_decode > 0 and available_blocks(s, a, r) < s.phase[r, column]:
        preempt(a, r, victim(s, r))
        preempted = True
    budget = max(0, rep.token_budget - e.n_decode)
    prefill_s, scheduled, close = 0.0, 0, False
    reserved = s.phase[r, column]  # for the decodes of this iteration
    take(s, a, r, reserved)
    if e.partial >= 0 and budget > 0:
        i = e.partial
        q = s.sequences[i]
        rest = q.target - q.computed
        chunk = min(rest, budget)
        have = blocks_for(c, q.computed)
        if available_blocks(s, a, r) < blocks_for(c, q.computed + chunk) - have:
            preempt(a, r, e.n_decode)
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
        take(s, a, r, reserved)
    else:
        e.beta = growth_s(rep, e.n_decode, e.chunk)
        alone = (preempted and e.n_waiting > 0) or e.extra_s > 0.0 or (e.chunk > 0 and rep_s <= _floor(rep, e))
        alone = alone or close
        if rep.queue == _VTC and e.n_waiting > 0 and e.partial < 0 and e.n_decode < rep.max_num_seqs:
            alone = True  # the first has no room, but who is first changes with every token
        e.steps = 1
        if not alone:
            _jump(s, a, r)
            if e.steps > 1 and e.chunk > 0 and grown(s, r, e.steps) > e.free_blocks and _shares(s, a, r):
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
    n = NEVER
    if e.n_decode > 0:
        n = e.first_finish - e.counter
    computed, chunk = 0, e.chunk
    if chunk > 0:
        computed = s.sequences[e.partial].computed
        n = min(n, (s.sequences[e.partial].target - computed - 1) // chunk)
    available = available_blocks(s, a, r)
    bound = e.n_decode * ((n >> c.shift) + 1)
    if chunk > 0:
        bound += blocks_for(c, n * chunk) + 1
    if bound > available:
        for k in range(n):
            available -= s.phase[r, (e.counter + k) & (c.block_tokens - 1)]
            if chunk > 0:
                available -= blocks_for(c, computed + (k + 1) * chunk) - blocks_for(c, computed + k * chunk)
            if available < 0:
                n = max(1, k)
                break
    e.steps = n
