"""The requests that wait in a replica's engine: a linked list, in order of arrival, and who of them is next."""

from __future__ import annotations

from steersman.runtime.compiled import inner
from steersman.runtime.fleet import Batching, Queue

_FCFS, _PRIORITY, _EDF, _SJF, _VTC = (int(order) for order in Queue)
_STATIC = int(Batching.STATIC)
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
    e.batch -= s.sequences[i].batched
    s.sequences[i].batched = 0


@inner
def _rank(s, r, i):
    """The key of a waiting sequence; the least is next."""
    q, order = s.sequences[i], s.replicas[r].queue
    request = s.requests[q.request]
    if order == _FCFS:
        return 0.0
    if order == _PRIORITY:
        return -float(request.priority)
    if order == _EDF:
        return request.arrival_s + s.tenants[request.tenant].ttft_slo_s
    if order == _SJF:
        return q.expected
    return s.served[r, request.tenant]


@inner(inline=True)
def following(s, r):
    """(the one before it or −1, the sequence that is next); one must wait, of the batch where it is static."""
    rep = s.replicas[r]
    if rep.batching == _STATIC:
        return _least(s, r, 1)
    if rep.queue == _FCFS:
        return -1, s.engines[r].first_waiting
    return _least(s, r, 0)


@inner
def _least(s, r, batched):
    """`following` of those that do or do not belong to the batch."""
    before, best, least = -1, -1, 0.0
    previous, i = -1, s.engines[r].first_waiting
    while i >= 0:
        if s.sequences[i].batched == batched:
            rank = _rank(s, r, i)
            if best < 0 or rank < least:
                before, best, least = previous, i, rank
        previous, i = i, s.sequences[i].next
    return before, best


@inner
def form_batch(s, r):
    """The first in the queue, as many as the batch holds, belong to it."""
    e = s.engines[r]
    i = e.first_waiting
    while i >= 0:
        s.sequences[i].batched = 0
        i = s.sequences[i].next
    e.batch = min(e.n_waiting, s.replicas[r].max_num_seqs)
    for _ in range(e.batch):
        s.sequences[_least(s, r, 0)[1]].batched = 1


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
