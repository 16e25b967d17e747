"""Held requests: a binary heap by when they are decided anew, then by the order of arrival."""

from __future__ import annotations

import numpy as np

from steersman.runtime.compiled import inner
from steersman.runtime.holding import pause_s
from steersman.runtime.simulator.engine import new_slot
from steersman.runtime.simulator.leaving import free_slot
from steersman.runtime.simulator.state import open_book, open_state


@inner(inline=True)
def _sooner(s, i, j):
    p, q = s.sequences[i], s.sequences[j]
    return p.queued < q.queued or (p.queued == q.queued and p.request < q.request)


@inner
def hold(a, request, gateway):
    """The pending request waits at its gateway for a pause."""
    s = open_state(a)
    c, row, i = s.cluster[0], s.requests[request], new_slot(s)
    q = s.sequences[i]
    q.request, q.gateway, q.generated = request, gateway, c.holds + 1
    q.queued = c.now + pause_s(s.tenants[row.tenant].ttft_slo_s)
    open_book(a, gateway).fleet[0].held += 1.0
    k = c.n_held
    c.n_held += 1
    while k > 0 and _sooner(s, i, s.held[(k - 1) >> 1]):
        s.held[k] = s.held[(k - 1) >> 1]
        k = (k - 1) >> 1
    s.held[k] = i


@inner
def release(a):
    """The first of the held requests leaves the heap. Returns it."""
    s = open_state(a)
    c, first = s.cluster[0], s.held[0]
    c.n_held -= 1
    i, k, child = s.held[c.n_held], 0, 1
    while child < c.n_held:
        if child + 1 < c.n_held and _sooner(s, s.held[child + 1], s.held[child]):
            child += 1
        if not _sooner(s, s.held[child], i):
            break
        s.held[k] = s.held[child]
        k, child = child, 2 * child + 1
    s.held[k] = i
    q = s.sequences[first]
    open_book(a, q.gateway).fleet[0].held -= 1.0
    c.holds = q.generated
    free_slot(s, first)
    return np.int64(q.request)
