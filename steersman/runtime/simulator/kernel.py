"""The compiled loop over a cluster: advance to the next decision, apply it, or play a whole episode.

All functions take the address `a` of the cluster's buffer; see `state`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import carray, types

from steersman.runtime import bookkeeping
from steersman.runtime.compiled import njit, pointer
from steersman.runtime.guard import guard
from steersman.runtime.observation import WIDTH, encode
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.policy import SCORE, pick
from steersman.runtime.simulator.engine import complete, enqueue, free_slot, plan, scrape, stream_to
from steersman.runtime.simulator.faults import strike
from steersman.runtime.simulator.state import open_book, open_state

_SHED = int(RequestState.SHED)


@njit(forceinline=True)
def gateway_of(c, request):
    """The gateway at which a request arrives: drawn by a hash of its number."""
    if c.n_gateways == 1:
        return 0
    mixed = np.uint64(request + 1) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed >> np.uint64(40)) % np.uint64(c.n_gateways))


@njit
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


@njit
def advance(a):
    """Run until a request needs a decision. Returns whether there is one; False: every request has ended."""
    s = open_state(a)
    c = s.cluster[0]
    arrival = s.requests[c.next_request].arrival_s if c.next_request < c.last_request else np.inf
    if arrival == np.inf and c.more:
        return False
    while c.retry < 0:
        r, event = 0, s.due[0]
        for k in range(1, len(s.due)):
            if s.due[k] < event:
                r, event = k, s.due[k]
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
        c.pending, c.retried = s.sequences[i].request, 1
        free_slot(s, i)
        return True
    if arrival == np.inf:
        return False
    c.now = arrival
    c.pending, c.retried = c.next_request, 0
    c.next_request += 1
    bookkeeping.arrive(open_book(a, gateway_of(c, c.pending)), arrival, s.requests[c.pending].tenant)
    return True


@njit(forceinline=True)
def _believed(s, a, r):
    """Prompt tokens of the pending request that its gateway believes to be cached on replica `r`."""
    c = s.cluster[0]
    q = s.requests[c.pending]
    book = open_book(a, gateway_of(c, c.pending))
    return bookkeeping.matched_tokens(
        book, r, s.blocks, q.block_start, q.prompt_blocks, c.prefix_tokens, q.prompt_tokens
    )


@njit
def observe(a):
    """Encode the pending request and its guard mask."""
    s = open_state(a)
    c = s.cluster[0]
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
    _guard(s)


@njit(forceinline=True)
def _guard(s):
    c = s.cluster[0]
    q = s.requests[c.pending]
    mask = carray(pointer(c.p_mask), (c.n_candidates,), np.bool_)
    reasons = carray(pointer(c.p_reasons), (c.n_candidates,), np.int8)
    guard(s.replicas, q.prompt_tokens, q.max_tokens, q.model, q.regions, mask, reasons)
    return mask


@njit
def apply(a, action):
    """Carry out a decision for the pending request. A masked action sheds: nothing overrides the guard."""
    s = open_state(a)
    c = s.cluster[0]
    index = c.pending
    q = s.requests[index]
    g = gateway_of(c, index)
    book = open_book(a, g)
    c.pending = -1
    c.decisions += 1
    c.n_ended = 0
    mask = carray(pointer(c.p_mask), (c.n_candidates,), np.bool_)
    if 0 <= action < len(s.engines) and mask[action]:
        believed = int(s.matched[action])
        capacity = s.replicas[action].kv_tokens // c.prefix_tokens
        uncached = q.prompt_tokens - believed
        bookkeeping.dispatch(
            book, c.now, action, q.tenant, q.prompt_tokens, uncached, s.blocks, q.block_start, q.prompt_blocks, capacity
        )
        s.outcomes[index].replica = action
        expected = min(book.tenant_views[q.tenant].output_tokens, float(q.max_tokens))
        enqueue(a, action, index, g, believed, expected)
    else:
        s.outcomes[index].state = _SHED
        bookkeeping.settle(book, q.tenant, False)
        s.ended[0] = index
        c.n_ended = 1


@njit
def next_decision(a):
    """Advance to the next decision and observe it. Returns whether there is one."""
    if not advance(a):
        return False
    observe(a)
    return True


@njit
def step(a, action):
    """Apply `action`, then advance to the next decision and observe it. Returns whether there is one."""
    apply(a, action)
    return next_decision(a)


@njit
def replay(a, actions):
    """Play the episode with given actions, int (D,), without observing. Returns the number of decisions."""
    s = open_state(a)
    decisions = 0
    while decisions < len(actions) and advance(a):
        action = actions[decisions]
        _guard(s)
        if 0 <= action < len(s.engines):
            s.matched[action] = _believed(s, a, action)
        apply(a, action)
        decisions += 1
    if decisions == len(actions):
        advance(a)
    return decisions


def _run(a, function, params, memory, trace, actions):
    s = open_state(a)
    c = s.cluster[0]
    rows = carray(pointer(c.p_rows), (c.n_candidates, WIDTH), np.float32)
    mask = carray(pointer(c.p_mask), (c.n_candidates,), np.bool_)
    scores = np.empty(len(mask))
    decisions = 0
    while next_decision(a):
        function(rows, mask, params, memory[gateway_of(c, c.pending)], scores)
        action = pick(scores, mask)
        if decisions < len(actions):
            actions[decisions] = action
            if decisions < len(trace):
                trace[decisions] = rows
        apply(a, action)
        decisions += 1
    return decisions


@functools.cache
def run() -> Callable[..., int]:
    """The compiled function that plays an episode to its end under any compiled policy.

    run()(a, function, params, memory, trace, actions) returns the number of decisions. `memory` float64 (G, M): one
    a gateway. The first observations, as many as `trace` float32 (D, C, WIDTH) has room for, and the first actions,
    int32 (E,), are kept. The policy is called through a pointer, so that one compilation serves them all; it happens
    at the first call, not on import.
    """
    signature = types.int64(
        types.int64,
        types.FunctionType(SCORE),
        types.float64[::1],
        types.float64[:, ::1],
        types.Array(types.float32, 3, "C"),
        types.int32[::1],
    )
    return njit(signature)(_run)
