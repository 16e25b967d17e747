"""What goes wrong with replicas, and when: a table that an episode is played with."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from steersman.runtime import bookkeeping
from steersman.runtime.compiled import inner
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import queue
from steersman.runtime.simulator.engine import complete
from steersman.runtime.simulator.jump import cut, span, steps_within
from steersman.runtime.simulator.leaving import fail
from steersman.runtime.simulator.metering import stream_to, use
from steersman.runtime.simulator.records import FAULT
from steersman.runtime.simulator.state import clear_engine, open_book, open_state


class Kind(IntEnum):
    """What happens to a replica."""

    CRASH = 0  # it is down, its KV and cache are lost
    START = 1  # it is up again, cold, at full speed
    SLOW = 2  # its iterations take `value` times as long
    DRAIN = 3  # it takes no new requests
    RESUME = 4  # it takes them again


_CRASH, _START, _SLOW, _DRAIN, _RESUME = (int(kind) for kind in Kind)
_FAILED = int(RequestState.FAILED)


def faults(rows: Sequence[tuple[float, int, Kind, float]]) -> np.ndarray:
    """A FAULT table from (time in seconds, replica, kind, value) in any order; value matters to SLOW only.

    Raises:
        UserError: a time is negative, or a slowdown not positive.
    """
    table = np.zeros(len(rows), FAULT)
    for row, (time_s, replica, kind, value) in zip(table, rows, strict=True):
        if not 0 <= time_s < float("inf"):
            raise UserError(f"a fault at {time_s} s: times are 0 or more")
        if kind == Kind.SLOW and not 0 < value < float("inf"):
            raise UserError(f"a slowdown by {value}: expected a positive factor, 2 for half the speed")
        row["time_s"], row["replica"], row["kind"], row["value"] = time_s, replica, kind, value
    return table[np.argsort(table["time_s"], kind="stable")]


def random_faults(
    replicas: int, duration_s: float, seed: int, *, mean_up_s: float, mean_down_s: float, slow: float = 1.0
) -> np.ndarray:
    """Crashes and restarts of each replica, up and down for exponentially distributed times.

    slow: above 1, it does not crash but is so many times slower in its bad times.
    """
    rng, rows = np.random.default_rng(seed), []
    for replica in range(replicas):
        time_s = rng.exponential(mean_up_s)
        while time_s < duration_s:
            rows.append((time_s, replica, Kind.SLOW if slow > 1 else Kind.CRASH, slow))
            time_s += rng.exponential(mean_down_s)
            rows.append((time_s, replica, Kind.START, 1.0))
            time_s += rng.exponential(mean_up_s)
    return faults(rows)


def faults_of(fleet: Fleet, requests: Requests) -> np.ndarray:
    """The FAULT table of a fleet for one episode; the same requests meet the same random faults."""
    table = faults([(f.at_s, fleet.names.index(f.replica), Kind[f.kind.upper()], f.factor) for f in fleet.faults])
    if (random := fleet.random_faults) is not None:
        seed = zlib.crc32(requests.table["arrival_s"].tobytes())
        more = random_faults(len(fleet.names), requests.window_s, seed, **random.model_dump())
        table = np.concatenate([table, more])
    return table[np.argsort(table["time_s"], kind="stable")]


@inner
def strike(a, index):
    """The fault in row `index` of the table happens now."""
    s = open_state(a)
    fault = s.faults[index]
    r = np.int64(fault.replica)
    kind, e, rep = fault.kind, s.engines[r], s.replicas[r]
    if kind == _CRASH:
        rep.up = 0
        _crash(a, r)
    elif kind == _START:
        rep.up = 1
        cut(s, r, s.cluster[0].now, 0)
        e.slowdown = 1.0
    elif kind == _SLOW:
        cut(s, r, s.cluster[0].now, 0)
        e.slowdown = fault.value
    elif kind == _DRAIN:
        rep.up = 0
    elif kind == _RESUME:
        rep.up = 1


@inner
def _crash(a, r):
    """Everything on replica `r` is lost: requests without a token are to be decided anew, the others failed."""
    s = open_state(a)
    c, e = s.cluster[0], s.engines[r]
    now = c.now
    if e.steps > 0:
        stream_to(s, a, r, now)
        n = steps_within(e, now - e.start) if e.mixed == 0 else 0
        if n > 0:
            e.steps = n
            c.now = e.start + span(e, n)
            complete(a, r)
            e.start, c.now = c.now, now
        use(s, a, r, now, 0)
    for k in range(e.n_decode):
        i = s.decoding[r, k]
        q = s.sequences[i]
        _lose(a, r, i, q.base + e.counter - s.requests[q.request].prompt_tokens + 1)
    for k in range(e.n_finishing):
        i = s.finishing[r, k]
        _lose(a, r, i, s.sequences[i].generated)
    if e.partial >= 0:
        _lose(a, r, e.partial, s.sequences[e.partial].generated)
    while e.first_waiting >= 0:
        i = e.first_waiting
        queue.remove(s, r, -1, i)
        _lose(a, r, i, s.sequences[i].generated)
    clear_engine(a, r)
    for g in range(c.n_gateways):
        bookkeeping.forget(open_book(a, g), r)


@inner
def _lose(a, r, i, generated):
    s = open_state(a)
    c, q = s.cluster[0], s.sequences[i]
    if generated > 0:
        fail(a, r, i, generated, _FAILED)
        return
    request = s.requests[q.request]
    uncached = request.prompt_tokens - q.believed
    bookkeeping.withdraw(open_book(a, q.gateway), c.now, r, request.tenant, request.prompt_tokens, uncached, 0, False)
    s.present[r, request.tenant] -= 1
    s.outcomes[q.request].replica = -1
    before, j = -1, c.retry  # in order of arrival
    while j >= 0 and s.sequences[j].request < q.request:
        before, j = j, s.sequences[j].next
    q.next = j
    if before < 0:
        c.retry = i
    else:
        s.sequences[before].next = i
