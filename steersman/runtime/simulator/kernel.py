"""The compiled step of a cluster: apply a decision, advance to the next, observe it.

All functions take the address `a` of the cluster's buffer; see `state`.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import types

from steersman.runtime import bookkeeping, prefixes, radix
from steersman.runtime.compiled import address_of, caller, carray, inner, njit, pointer
from steersman.runtime.guard import guard
from steersman.runtime.observation import WIDTH, encode
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.simulator.engine import complete, enqueue
from steersman.runtime.simulator.faults import strike
from steersman.runtime.simulator.held import hold, release
from steersman.runtime.simulator.leaving import free_slot
from steersman.runtime.simulator.metering import scrape, stream_to
from steersman.runtime.simulator.planning import plan
from steersman.runtime.simulator.records import CLUSTER
from steersman.runtime.simulator.state import open_book, open_state, tree_of

_SHED, _CANCELLED = int(RequestState.SHED), int(RequestState.CANCELLED)
MOST_HOLDS = 32767  # that an outcome can count


@inner(inline=True)
def gateway_of(c, request):
    """The gateway at which a request arrives: drawn by a hash of its number."""
    if c.n_gateways == 1:
        return 0
    mixed = np.uint64(request + 1) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed >> np.uint64(40)) % np.uint64(c.n_gateways))


@inner
def _tick(a):
    """Faults that strike now, then metrics that are read now."""
    s = open_state(a)
    c = s.cluster[0]
    c.now = c.next_tick
    while c.next_fault < len(s.faults) and s.faults[c.next_fault].time_s <= c.now:
        c.next_fault += 1
        strike(a, c.next_fault - 1)
    after = s.faults[c.next_fault].time_s if c.next_fault < len(s.faults) else np.inf
    if c.scrape_s > 0.0:
        for g in range(c.n_gateways):
            for r in range(c.n_replicas):
                if s.scrapes[g, r] <= c.now:
                    stream_to(s, a, r, c.now)
                    scrape(s, a, g, r, c.now)
                    s.scrapes[g, r] += c.scrape_s
                after = min(after, s.scrapes[g, r])
    c.next_tick = after


@inner(inline=True)
def _first(times):
    """The index of the least, the first of equals."""
    least = np.int64(0)
    for k in range(1, len(times)):
        if times[k] < times[least]:
            least = np.int64(k)
    return least


@inner
def _given_up(a, request):
    """Whether the client of a held request has left meanwhile; then it is over."""
    s = open_state(a)
    c, row = s.cluster[0], s.requests[request]
    if row.cancel_s <= 0.0 or row.arrival_s + row.cancel_s > c.now:
        return False
    o = s.outcomes[request]
    o.state, o.holds = _CANCELLED, min(c.holds, MOST_HOLDS)
    o.attained = row.cancel_s <= s.tenants[row.tenant].ttft_slo_s
    bookkeeping.settle(open_book(a, gateway_of(c, request)), row.tenant, o.attained)
    s.ended[c.n_ended] = request
    c.n_ended += 1
    c.pending = -1
    return True


@inner(inline=True)
def _advance(a):
    """Run until a request needs a decision. Returns whether there is one; False: every request has ended."""
    while _to_next(a):
        c = open_state(a).cluster[0]
        if c.retried != 2 or not _given_up(a, c.pending):
            return True
    return False


@inner(inline=True)
def _to_next(a):
    """Run until a request needs a decision, or its client has left while it was held."""
    s = open_state(a)
    c = s.cluster[0]
    arrival = s.requests[c.next_request].arrival_s if c.next_request < c.last_request else np.inf
    if arrival == np.inf and c.more:
        return False
    held = c.n_held > 0 and s.sequences[s.held[0]].queued < arrival
    if held:
        arrival = s.sequences[s.held[0]].queued
    while c.retry < 0:
        r = _first(s.due)
        event = s.due[r]
        if c.next_tick < event and c.next_tick <= arrival and min(event, arrival) < np.inf:
            _tick(a)
            continue
        if event > arrival or event == np.inf:
            break
        c.now = event
        complete(a, r)
        plan(a, r)
    if c.retry >= 0:
        i = c.retry
        c.retry = s.sequences[i].next
        c.pending, c.retried, c.observed, c.holds = s.sequences[i].request, 1, 0, 0
        free_slot(s, i)
        return True
    if arrival == np.inf:
        return False
    c.now = arrival
    if held:
        c.pending, c.retried, c.observed = release(a), 2, 0
        return True
    c.pending, c.retried, c.observed, c.holds = c.next_request, 0, 0, 0
    c.next_request += 1
    bookkeeping.arrive(open_book(a, gateway_of(c, c.pending)), arrival, s.requests[c.pending].tenant)
    return True


@inner(inline=True)
def _believed(s, a, r):
    """Prompt tokens of the pending request that its gateway believes to be cached on replica `r`."""
    c = s.cluster[0]
    q = s.requests[c.pending]
    book = open_book(a, gateway_of(c, c.pending))
    return bookkeeping.matched_tokens(
        book, r, s.blocks, q.block_start, q.prompt_blocks, c.prefix_tokens, q.prompt_tokens
    )


@inner(inline=True)
def _observe(a):
    """Encode the pending request and its guard mask."""
    s = open_state(a)
    c = s.cluster[0]
    c.observed = 1
    q = s.requests[c.pending]
    g = gateway_of(c, c.pending)
    book = open_book(a, g)
    for r in range(len(s.engines)):
        stream_to(s, a, r, c.now)
        if c.scrape_s == 0.0:
            scrape(s, a, g, r, c.now)
        s.matched[r] = _believed(s, a, r)
    waited = c.now - q.arrival_s if c.retried else 0.0
    rows = carray(pointer(c.p_rows), (c.n_candidates, WIDTH), np.float32)
    encode(c.now, s.replicas, book, q.tenant, q.prompt_tokens, q.max_tokens, s.matched, waited, q.priority, rows)
    _guard(s, waited)


@inner(inline=True)
def _guard(s, waited):
    c = s.cluster[0]
    q = s.requests[c.pending]
    promise = s.tenants[q.tenant].ttft_slo_s
    mask = carray(pointer(c.p_mask), (c.n_candidates,), np.bool_)
    reasons = carray(pointer(c.p_reasons), (c.n_candidates,), np.int8)
    guard(s.replicas, q.prompt_tokens, q.max_tokens, q.model, q.regions, promise, waited, mask, reasons)
    return mask


@inner(inline=True)
def _apply(a, action):
    s = open_state(a)
    c = s.cluster[0]
    index = c.pending
    q = s.requests[index]
    g = gateway_of(c, index)
    book = open_book(a, g)
    mask = carray(pointer(c.p_mask), (c.n_candidates,), np.bool_)
    if not c.observed:
        _guard(s, c.now - q.arrival_s if c.retried else 0.0)
        if 0 <= action < len(s.engines):
            s.matched[action] = _believed(s, a, action)
    c.pending = -1
    c.decisions += 1
    c.n_ended = 0
    if 0 <= action < len(s.engines) and mask[action]:
        believed = int(s.matched[action])
        capacity = s.replicas[action].kv_tokens // c.prefix_tokens
        uncached = q.prompt_tokens - believed
        bookkeeping.dispatch(
            book, c.now, action, q.tenant, q.prompt_tokens, uncached, s.blocks, q.block_start, q.prompt_blocks, capacity
        )
        s.outcomes[index].replica, s.outcomes[index].holds = action, min(c.holds, MOST_HOLDS)
        expected = min(book.tenant_views[q.tenant].output_tokens, float(q.max_tokens))
        enqueue(a, action, index, g, believed, expected)
    elif action == c.n_candidates - 2 and mask[action]:
        hold(a, index, g)
    else:
        s.outcomes[index].state, s.outcomes[index].holds = _SHED, min(c.holds, MOST_HOLDS)
        bookkeeping.settle(book, q.tenant, False)
        s.ended[0] = index
        c.n_ended = 1


@njit
def warm(a, rows):
    """Before the first decision: the prompts of `rows`, REQUEST, were served by the replicas in turn, oldest first.

    Each is in the cache of its replica, and believed to be by the gateway that sent it.
    """
    s = open_state(a)
    c, turn = s.cluster[0], 0
    mask = carray(pointer(c.p_mask), (c.n_candidates,), np.bool_)
    reasons = carray(pointer(c.p_reasons), (c.n_candidates,), np.int8)
    for i in range(len(rows)):
        q = rows[i]
        if guard(s.replicas, q.prompt_tokens, q.max_tokens, q.model, q.regions, 1.0, 0.0, mask, reasons) == 0:
            continue
        while not mask[turn % c.n_replicas]:
            turn += 1
        r = turn % c.n_replicas
        turn += 1
        capacity = s.replicas[r].kv_tokens // c.prefix_tokens
        believed = bookkeeping.belief(open_book(a, gateway_of(c, i)), r)
        for tree in (tree_of(s, a, r), believed):
            prefixes.touch(tree, s.blocks, q.block_start, np.int64(q.prompt_blocks), capacity)
    for r in range(c.n_replicas):
        e = s.engines[r]
        e.free_blocks = e.total_blocks - radix.head(tree_of(s, a, r)).size * c.per_prefix


STEP = types.int64(types.int64, types.int64, types.int64)
STAY = -(1 << 62)  # no action
_call_step = caller(STEP)


def _step(a, action, look):
    c = open_state(a).cluster[0]
    if c.pending >= 0 and action != STAY:
        _apply(a, action)
    if c.pending < 0 and not _advance(a):
        return 0
    if look:
        _observe(a)
    return 1


@functools.cache
def step_address() -> int:
    """Where the compiled step of a cluster stands, for `p_step`; it is compiled at the first call, not on import.

    All other compiled code calls it there: this large function is compiled once, into nothing else.
    """
    return address_of(njit(STEP)(_step), STEP)


@njit
def step(a, action, look):
    """Apply `action` to the request that awaits a decision, if one does, advance to the next, and observe it if `look`.

    Returns 1 if there is one, 0 if every request has ended. A masked action sheds: nothing overrides the guard. STAY
    applies nothing: it finds the first decision, or observes the present one again.
    """
    return _call_step(carray(pointer(a), (1,), CLUSTER)[0].p_step, (a, np.int64(action), np.int64(look)))
