"""The requests that wait in a replica's engine: a linked list, in order of arrival, and who of them is next."""

from __future__ import annotations

from steersman.runtime.compiled import inner
from steersman.runtime.fleet import Queue

_FCFS, _PRIORITY, _EDF, _SJF, _VTC = (int(order) for order in Queue)
INPUT_TOKEN, OUTPUT_TOKEN = 1.0, 2.0  # what a virtual token counter counts for each


@inner(inline=True)
def append(s, r, i):
    """Sequence `i` waits last."""
    e = s.engines[r]
    s.sequences[i].next = -1
    if e.last_waiting >= 0:
        s.sequences[e.last_waiting].next = i
    else:
        e.first_waiting = i
    e.last_waiting = i
    e.n_waiting += 1


@inner(inline=True)
def prepend(s, r, i):
    """Sequence `i` waits first."""
    e = s.engines[r]
    s.sequences[i].next = e.first_waiting
    e.first_waiting = i
    if e.last_waiting < 0:
        e.last_waiting = i
    e.n_waiting += 1


@inner(inline=True)
def remove(s, r, before, i):
    """Sequence `i`, which stands after `before` (−1: first), waits no more."""
    e = s.engines[r]
    after = s.sequences[i].next
    if before < 0:
        e.first_waiting = after
    else:
        s.sequences[before].next = after
    if after < 0:
        e.last_waiting = before
    s.sequences[i].next = -1
    e.n_waiting -= 1


@inner
def _rank(s, r, i):
    """The key of a waiting sequence; the least is next."""
    q, order = s.sequences[i], s.replicas[r].queue
    request = s.requests[q.request]
    if order == _PRIORITY:
        return -float(request.priority)
    if order == _EDF:
        return request.arrival_s + s.tenants[request.tenant].ttft_slo_s
    if order == _SJF:
        return q.expected
    return s.served[r, request.tenant]


@inner(inline=True)
def following(s, r):
    """(the one before it in the list or −1, the sequence that is next); one must wait."""
    best = s.engines[r].first_waiting
    if s.replicas[r].queue == _FCFS:
        return -1, best
    before, least = -1, _rank(s, r, best)
    previous, i = best, s.sequences[best].next
    while i >= 0:
        rank = _rank(s, r, i)
        if rank < least:
            before, best, least = previous, i, rank
        previous, i = i, s.sequences[i].next
    return before, best


@inner(inline=True)
def enter(s, r, tenant):
    """A sequence of `tenant`, which is lifted to the least of those that have some, comes to replica `r`."""
    if s.present[r, tenant] == 0 and s.replicas[r].queue == _VTC:
        least = -1.0
        for t in range(len(s.tenants)):
            if s.present[r, t] > 0 and (least < 0.0 or s.served[r, t] < least):
                least = s.served[r, t]
        s.served[r, tenant] = max(s.served[r, tenant], least)
    s.present[r, tenant] += 1


@inner(inline=True)
def serve(s, r, i, tokens):
    """Sequence `i` got `tokens` weighted tokens of work."""
    s.served[r, s.requests[s.sequences[i].request].tenant] += tokens
