"""The state of a simulated cluster: one flat byte buffer, viewed as structured arrays inside compiled code.

Compiled functions take the buffer's address. It starts with a CLUSTER record that says where the sections are, and
where the read-only data of the episode stand, so that one function opens a cluster of any size, and a clone is a copy
of bytes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from steersman.runtime import bookkeeping, prefixes, radix
from steersman.runtime.bookkeeping import FLEET_VIEW, TENANT_VIEW, VIEW, Bookkeeping
from steersman.runtime.compiled import carray, copy_bytes, inner, njit, pointer
from steersman.runtime.fleet import REPLICA
from steersman.runtime.outcomes import USAGE
from steersman.runtime.requests import REQUEST
from steersman.runtime.simulator.records import CLUSTER, ENGINE, FAULT, OUTCOME, SEQUENCE, SIZES
from steersman.runtime.tenant import TENANT


class State(NamedTuple):
    """Views for R replicas, T tenants, G gateways, M sequences, S batch slots, N requests."""

    cluster: np.ndarray  # CLUSTER (1,)
    replicas: np.ndarray  # REPLICA (R,)
    engines: np.ndarray  # ENGINE (R,)
    due: np.ndarray  # float64 (R,): end of the running iteration or jump; inf: idle
    usage: np.ndarray  # USAGE (R,)
    tenants: np.ndarray  # TENANT (T,)
    served: np.ndarray  # float64 (R, T): virtual token counters
    present: np.ndarray  # int32 (R, T): sequences of a tenant, waiting or running
    streams: np.ndarray  # int32 (R, G): decoding sequences by gateway
    decoding: np.ndarray  # int32 (R, S): sequences that decode, in the order in which they began
    finish: np.ndarray  # int64 (R, S): the engine's counter at which each ends
    finishing: np.ndarray  # int32 (R, S)
    phase: np.ndarray  # int32 (R, block_tokens): decoding sequences that need a KV block at counter ≡ column
    matched: np.ndarray  # float64 (R,): prompt tokens of the pending request that its gateway believes cached
    scrapes: np.ndarray  # float64 (G, R): when each gateway reads each replica's metrics next
    ended: np.ndarray  # int32 (M + 1,): requests that ended since the last decision
    held: np.ndarray  # int32 (M,): a heap of sequences whose requests are held, by when they are decided anew
    sequences: np.ndarray  # SEQUENCE (M,)
    requests: np.ndarray  # REQUEST (N,), read-only
    blocks: np.ndarray  # int64 (K,), read-only: prefix blocks of the requests
    outcomes: np.ndarray  # OUTCOME (N,)
    faults: np.ndarray  # FAULT (F,), read-only


class Shape(NamedTuple):
    """Sizes that decide the layout."""

    replicas: int
    tenants: int
    gateways: int
    sequences: int
    slots: int
    block_tokens: int
    nodes: int
    buckets: int


def shape_of(
    replicas: np.ndarray, tenants: int, sequences: int, block_tokens: int, prefix_tokens: int, gateways: int = 1
) -> Shape:
    """The sizes for a fleet (REPLICA array) with room for `sequences` requests in flight."""
    nodes = radix.nodes_for(int(replicas["kv_tokens"].max()) // prefix_tokens)
    return Shape(
        replicas=len(replicas),
        tenants=tenants,
        gateways=gateways,
        sequences=max(1, sequences),
        slots=int(replicas["max_num_seqs"].max()),
        block_tokens=block_tokens,
        nodes=nodes,
        buckets=radix.buckets_for(nodes),
    )


def shape_in(cluster: np.ndarray) -> Shape:
    """The sizes in a CLUSTER record (1,)."""
    return Shape(*(int(cluster[name][0]) for name in SIZES))


def _sections(shape: Shape) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Element and shape of each section, in the order in which they stand in the buffer."""
    r, t, g, m, s, b, n, _ = shape
    real, number = np.dtype(np.float64), np.dtype(np.int32)
    return {
        "replicas": (REPLICA, (r,)),
        "engines": (ENGINE, (r,)),
        "due": (real, (r,)),
        "usage": (USAGE, (r,)),
        "tenants": (TENANT, (t,)),
        "served": (real, (r, t)),
        "present": (number, (r, t)),
        "streams": (number, (r, g)),
        "matched": (real, (r,)),
        "scrapes": (real, (g, r)),
        "views": (VIEW, (g, r)),
        "tenant_views": (TENANT_VIEW, (g, t)),
        "fleets": (FLEET_VIEW, (g, 1)),
        "tenant_inflight": (real, (g, r, t)),
        "phase": (number, (r, b)),
        "decoding": (number, (r, s)),
        "finish": (np.dtype(np.int64), (r, s)),
        "finishing": (number, (r, s)),
        "sets": (radix.HEAD, (1 + g, r)),
        "tables": (number, (1 + g, radix.buckets_for(n), r)),
        "nodes": (radix.NODE, (1 + g, r, n)),
        "ended": (number, (m + 1,)),
        "held": (number, (m,)),
        "sequences": (SEQUENCE, (m,)),
    }


def layout(shape: Shape) -> np.ndarray:
    """A CLUSTER record (1,) with the sizes, the places of the sections, and the buffer's size in bytes."""
    record = np.zeros(1, CLUSTER)
    for name, size in zip(SIZES, shape, strict=True):
        record[name] = size
    place = _align(CLUSTER.itemsize)
    for name, (element, counts) in _sections(shape).items():
        record[f"at_{name}"] = place
        place = _align(place + element.itemsize * math.prod(counts))
    record["bytes"] = place
    record["shift"] = shape.block_tokens.bit_length() - 1
    return record


def view(buffer: np.ndarray, section: str) -> np.ndarray:
    """A section of a buffer, uint8 (bytes,), by its name in `State` or `Bookkeeping`; or `cluster`."""
    cluster: np.ndarray = buffer[: CLUSTER.itemsize].view(CLUSTER)
    if section == "cluster":
        return cluster
    element, counts = _sections(shape_in(cluster))[section]
    start = int(cluster[f"at_{section}"][0])
    return buffer[start : start + element.itemsize * math.prod(counts)].view(element).reshape(counts)


def _align(offset: int) -> int:
    return -(-offset // 64) * 64


_HEAD, _NODE = radix.HEAD.itemsize, radix.NODE.itemsize
_VIEW, _TENANT_VIEW, _FLEET_VIEW, _SEQUENCE = (d.itemsize for d in (VIEW, TENANT_VIEW, FLEET_VIEW, SEQUENCE))


@inner(inline=True)
def open_state(a):
    """The views of the cluster at address `a`."""
    cluster = carray(pointer(a), (1,), CLUSTER)
    c = cluster[0]
    r, t, s = c.n_replicas, c.n_tenants, c.n_slots
    return State(
        cluster,
        carray(pointer(a + c.at_replicas), (r,), REPLICA),
        carray(pointer(a + c.at_engines), (r,), ENGINE),
        carray(pointer(a + c.at_due), (r,), np.float64),
        carray(pointer(a + c.at_usage), (r,), USAGE),
        carray(pointer(a + c.at_tenants), (t,), TENANT),
        carray(pointer(a + c.at_served), (r, t), np.float64),
        carray(pointer(a + c.at_present), (r, t), np.int32),
        carray(pointer(a + c.at_streams), (r, c.n_gateways), np.int32),
        carray(pointer(a + c.at_decoding), (r, s), np.int32),
        carray(pointer(a + c.at_finish), (r, s), np.int64),
        carray(pointer(a + c.at_finishing), (r, s), np.int32),
        carray(pointer(a + c.at_phase), (r, c.block_tokens), np.int32),
        carray(pointer(a + c.at_matched), (r,), np.float64),
        carray(pointer(a + c.at_scrapes), (c.n_gateways, r), np.float64),
        carray(pointer(a + c.at_ended), (c.n_sequences + 1,), np.int32),
        carray(pointer(a + c.at_held), (c.n_sequences,), np.int32),
        carray(pointer(a + c.at_sequences), (c.n_sequences,), SEQUENCE),
        carray(pointer(c.p_requests), (c.n_requests,), REQUEST),
        carray(pointer(c.p_blocks), (c.n_blocks,), np.int64),
        carray(pointer(c.p_outcomes), (c.n_requests,), OUTCOME),
        carray(pointer(c.p_faults), (c.n_faults,), FAULT),
    )


@inner(inline=True)
def open_book(a, g):
    """What gateway `g` knows."""
    c = carray(pointer(a), (1,), CLUSTER)[0]
    r, t = c.n_replicas, c.n_tenants
    return Bookkeeping(
        carray(pointer(a + c.at_views + g * r * _VIEW), (r,), VIEW),
        carray(pointer(a + c.at_tenants), (t,), TENANT),
        carray(pointer(a + c.at_tenant_views + g * t * _TENANT_VIEW), (t,), TENANT_VIEW),
        carray(pointer(a + c.at_fleets + g * _FLEET_VIEW), (1,), FLEET_VIEW),
        carray(pointer(a + c.at_tenant_inflight + g * r * t * 8), (r, t), np.float64),
        carray(pointer(a + c.at_sets + (1 + g) * r * _HEAD), (r,), radix.HEAD),
        carray(pointer(a + c.at_tables + (1 + g) * r * c.n_buckets * 4), (c.n_buckets, r), np.int32),
        carray(pointer(a + c.at_nodes + (1 + g) * r * c.n_nodes * _NODE), (r, c.n_nodes), radix.NODE),
    )


@inner(inline=True)
def tree_of(s, a, r):
    """The true prefix cache of replica `r`."""
    return a + s.cluster[0].at_sets + r * _HEAD


@njit
def reset_state(a, prefix_tokens, horizon, scrape_s):
    """Make an empty cluster at `a`, where layout, replicas, tenants and the episode's addresses are written."""
    s = open_state(a)
    c = s.cluster[0]
    c.now, c.horizon, c.scrape_s = 0.0, horizon, scrape_s
    c.next_request, c.pending, c.n_ended, c.free_slot, c.inflight, c.decisions = 0, -1, 0, -1, 0, 0
    c.last_request, c.more, c.next_fault, c.retry, c.retried, c.used_slots = len(s.requests), 0, 0, -1, 0, 0
    c.observed, c.n_held = 0, 0
    c.prefix_tokens, c.per_prefix = prefix_tokens, prefix_tokens >> c.shift
    c.cancels = 0
    for i in range(len(s.requests)):
        if s.requests[i].cancel_s > 0.0:
            c.cancels = 1
            break
    for r in range(c.n_replicas):
        clear_engine(a, r)
        s.engines[r].counter, s.engines[r].slowdown = 0, 1.0
        u = s.usage[r]
        u.busy_s, u.sequence_s, u.kv_s = 0.0, 0.0, 0.0
        u.output_tokens, u.iterations, u.preemptions = 0, 0, 0
    for g in range(c.n_gateways):
        bookkeeping.clear(open_book(a, g))
    c.next_tick = s.faults[0].time_s if len(s.faults) > 0 else np.inf
    s.scrapes[:] = np.inf
    if scrape_s > 0.0:
        c.next_tick = 0.0
        for g in range(c.n_gateways):
            for r in range(c.n_replicas):
                s.scrapes[g, r] = scrape_s * (g * c.n_replicas + r) / (c.n_gateways * c.n_replicas)


@inner
def clear_engine(a, r):
    """Empty replica `r`: nothing runs, nothing waits, nothing is cached."""
    s = open_state(a)
    c, e = s.cluster[0], s.engines[r]
    s.due[r] = np.inf
    e.start, e.alpha, e.beta, e.extra_s, e.next_cancel = 0.0, 0.0, 0.0, 0.0, np.inf
    e.steps, e.streamed, e.first_finish, e.context = 0, 0, 0, 0
    e.total_blocks = s.replicas[r].kv_tokens >> c.shift
    e.free_blocks, e.host_free = e.total_blocks, s.replicas[r].host_tokens
    e.n_decode, e.n_finishing, e.partial, e.chunk, e.mixed, e.batch = 0, 0, -1, 0, 0, 0
    e.first_waiting, e.last_waiting, e.n_waiting = -1, -1, 0
    s.phase[r, :] = 0
    s.served[r, :] = 0.0
    s.present[r, :] = 0
    s.streams[r, :] = 0
    nodes = a + c.at_nodes + r * c.n_nodes * _NODE
    radix.clear(tree_of(s, a, r), nodes, c.n_nodes, a + c.at_tables + 4 * r, c.n_buckets, c.n_replicas)


@njit
def copy_state(target, source):
    """Copy what a cluster is into another buffer of the same layout; what was never used is left out."""
    s = open_state(source)
    c = s.cluster[0]
    copy_bytes(target, source, c.at_nodes)
    open_state(target).cluster[0].observed = 0  # rows and mask are not copied
    for i in range(c.n_replicas * (1 + c.n_gateways)):
        at = c.at_nodes + i * c.n_nodes * _NODE
        copy_bytes(target + at, source + at, _NODE * radix.head(source + c.at_sets + i * _HEAD).used)
    copy_bytes(target + c.at_ended, source + c.at_ended, 4 * c.n_ended)
    copy_bytes(target + c.at_held, source + c.at_held, 4 * c.n_held)
    copy_bytes(target + c.at_sequences, source + c.at_sequences, _SEQUENCE * c.used_slots)


@njit
def count_blocks(a):
    """Blocks in all sets of prefixes of a cluster."""
    c, total = carray(pointer(a), (1,), CLUSTER)[0], 0
    for i in range(c.n_replicas * (1 + c.n_gateways)):
        total += radix.head(a + c.at_sets + i * _HEAD).size
    return total


@njit
def move_blocks(a, target, at):
    """Copy the blocks of all sets of prefixes to `target` int64, from `at` on, where they will be looked for.

    Returns the end of what was written.
    """
    s = open_state(a)
    c = s.cluster[0]
    for i in range(c.n_replicas * (1 + c.n_gateways)):
        at = prefixes.move(a + c.at_sets + i * _HEAD, s.blocks, target, at)
    return at
