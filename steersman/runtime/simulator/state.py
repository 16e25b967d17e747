"""The state of a simulated cluster: one flat byte buffer, viewed as structured arrays inside compiled code.

The buffer starts with the byte offsets of its sections, so that one compiled function opens a cluster of any size,
a clone is a memory copy, and many clusters are the rows of one 2-D array.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from steersman.runtime import blockset, bookkeeping
from steersman.runtime.blockset import HEAD, NODE
from steersman.runtime.bookkeeping import FLEET_VIEW, TENANT_VIEW, VIEW, Bookkeeping
from steersman.runtime.compiled import njit
from steersman.runtime.fleet import REPLICA
from steersman.runtime.outcomes import USAGE
from steersman.runtime.tenant import TENANT

CLUSTER = np.dtype(
    [
        ("now", "f8"),
        ("horizon", "f8"),  # usage is measured up to here
        ("next_request", "i8"),  # next row of the request table to arrive
        ("pending", "i8"),  # request awaiting a decision, or −1
        ("n_ended", "i8"),  # entries of the ended log since the last decision
        ("free_slot", "i8"),  # head of the list of free sequences
        ("inflight", "i8"),
        ("decisions", "i8"),
        ("block_tokens", "i8"),  # of the paged KV cache
        ("prefix_tokens", "i8"),  # of a prefix block, a multiple of block_tokens
    ],
    align=True,
)

# The continuous-batching engine of one replica.
ENGINE = np.dtype(
    [
        ("next_event", "f8"),  # end of the running iteration or jump; inf: idle
        ("start", "f8"),  # its start
        ("alpha", "f8"),  # seconds of its first iteration
        ("beta", "f8"),  # further seconds of each later iteration of a jump: contexts grow
        ("steps", "i8"),  # iterations in it: 1, or a jump over decode-only iterations
        ("streamed", "i8"),  # iterations of it that the bookkeeping has counted
        ("counter", "i8"),  # iterations so far
        ("context", "i8"),  # computed tokens of the decoding sequences
        ("free_blocks", "i8"),  # KV blocks neither held by requests nor by idle cache entries
        ("total_blocks", "i8"),
        ("n_decode", "i4"),
        ("n_finishing", "i4"),  # sequences whose prefill ends with the running iteration
        ("partial", "i4"),  # sequence with a prefill chunk done and more to come, or −1
        ("first_waiting", "i4"),
        ("last_waiting", "i4"),
        ("n_waiting", "i4"),
        ("mixed", "i4"),  # 1: the running iteration has prefill, its KV blocks are taken already
        ("_", "i4"),
    ],
    align=True,
)

# A request inside a replica.
SEQUENCE = np.dtype(
    [
        ("first_token", "f8"),  # time, or NaN
        ("base", "i8"),  # while decoding: computed tokens − the engine's counter
        ("request", "i4"),
        ("next", "i4"),  # in the waiting list or the free list
        (
            "target",
            "i4",
        ),  # tokens to compute before it decodes (prompt, and on recomputation its output so far)
        ("computed", "i4"),
        ("generated", "i4"),
        ("held", "i4"),  # prefix blocks of the cache that it references
        ("cached", "i4"),  # prompt tokens found in the cache at first admission
        ("believed", "i4"),  # prompt tokens that the router expected to be cached
    ],
    align=True,
)

OUTCOME = np.dtype(
    [
        ("ttft_s", "f8"),
        ("tpot_s", "f8"),
        ("e2e_s", "f8"),
        ("replica", "i4"),
        ("cached_tokens", "i4"),
        ("state", "i1"),
        ("attained", "?"),
    ],
    align=True,
)


class State(NamedTuple):
    """Views into the buffer, for R replicas, T tenants, M sequences and S batch slots."""

    cluster: np.ndarray  # CLUSTER (1,)
    replicas: np.ndarray  # REPLICA (R,)
    engines: np.ndarray  # ENGINE (R,)
    usage: np.ndarray  # USAGE (R,)
    sequences: np.ndarray  # SEQUENCE (M,)
    decoding: np.ndarray  # int32 (R, S): sequences that decode, in order of admission
    finish: np.ndarray  # int64 (R, S): the engine's counter at which each ends
    finishing: np.ndarray  # int32 (R, S)
    phase: np.ndarray  # int32 (R, block_tokens): decoding sequences that need a KV block at counter ≡ column
    ended: np.ndarray  # int32 (M + 1,): requests that ended since the last decision
    matched: np.ndarray  # float64 (R,): scratch
    nodes: np.ndarray  # NODE (R, N): the true prefix caches
    buckets: np.ndarray  # int32 (R, H)
    heads: np.ndarray  # HEAD (R,)
    book: Bookkeeping  # the router's


class Shape(NamedTuple):
    """Sizes that decide the layout."""

    replicas: int
    tenants: int
    sequences: int
    slots: int
    block_tokens: int
    nodes: int
    buckets: int


SECTIONS = 22
_HEADER = 2 * SECTIONS + len(Shape._fields)


def shape_of(replicas: np.ndarray, tenants: int, sequences: int, block_tokens: int, prefix_tokens: int) -> Shape:
    """The sizes for a fleet (REPLICA array) with room for `sequences` requests in flight."""
    nodes = max(1, int(replicas["kv_tokens"].max()) // prefix_tokens)
    return Shape(
        replicas=len(replicas),
        tenants=tenants,
        sequences=max(1, sequences),
        slots=int(replicas["max_num_seqs"].max()),
        block_tokens=block_tokens,
        nodes=nodes,
        buckets=1 << max(3, nodes.bit_length()),
    )


def header(shape: Shape) -> np.ndarray:
    """int64 start and end of each section, in bytes, then the sizes."""
    r, t, m, s, b, n, h = shape
    sizes = [
        CLUSTER.itemsize,
        REPLICA.itemsize * r,
        ENGINE.itemsize * r,
        USAGE.itemsize * r,
        SEQUENCE.itemsize * m,
        4 * r * s,
        8 * r * s,
        4 * r * s,
        4 * r * b,
        4 * (m + 1),
        8 * r,
        NODE.itemsize * r * n,
        4 * r * h,
        HEAD.itemsize * r,
        VIEW.itemsize * r,
        TENANT.itemsize * t,
        TENANT_VIEW.itemsize * t,
        FLEET_VIEW.itemsize,
        8 * r * t,
        NODE.itemsize * r * n,
        4 * r * h,
        HEAD.itemsize * r,
    ]
    assert len(sizes) == SECTIONS
    place, bounds = _align(8 * _HEADER), []
    for size in sizes:
        bounds += [place, place + size]
        place = _align(place + size)
    return np.array([*bounds, *shape], np.int64)


def _align(offset: int) -> int:
    return -(-offset // 64) * 64


def buffer_size(shape: Shape) -> int:
    """Bytes of one cluster."""
    return _align(int(header(shape)[2 * SECTIONS - 1]))


@njit(inline="always")
def _section(buffer, bounds, i):
    return buffer[bounds[2 * i] : bounds[2 * i + 1]]


@njit(forceinline=True)
def open_state(buffer):
    """The views of a buffer, uint8 (bytes,), whose header is written."""
    o = buffer[: 8 * _HEADER].view(np.int64)
    k = 2 * SECTIONS
    r, t, s, b, n, h = o[k], o[k + 1], o[k + 3], o[k + 4], o[k + 5], o[k + 6]
    book = Bookkeeping(
        _section(buffer, o, 14).view(VIEW),
        _section(buffer, o, 15).view(TENANT),
        _section(buffer, o, 16).view(TENANT_VIEW),
        _section(buffer, o, 17).view(FLEET_VIEW),
        _section(buffer, o, 18).view(np.float64).reshape((r, t)),
        _section(buffer, o, 19).view(NODE).reshape((r, n)),
        _section(buffer, o, 20).view(np.int32).reshape((r, h)),
        _section(buffer, o, 21).view(HEAD),
    )
    return State(
        _section(buffer, o, 0).view(CLUSTER),
        _section(buffer, o, 1).view(REPLICA),
        _section(buffer, o, 2).view(ENGINE),
        _section(buffer, o, 3).view(USAGE),
        _section(buffer, o, 4).view(SEQUENCE),
        _section(buffer, o, 5).view(np.int32).reshape((r, s)),
        _section(buffer, o, 6).view(np.int64).reshape((r, s)),
        _section(buffer, o, 7).view(np.int32).reshape((r, s)),
        _section(buffer, o, 8).view(np.int32).reshape((r, b)),
        _section(buffer, o, 9).view(np.int32),
        _section(buffer, o, 10).view(np.float64),
        _section(buffer, o, 11).view(NODE).reshape((r, n)),
        _section(buffer, o, 12).view(np.int32).reshape((r, h)),
        _section(buffer, o, 13).view(HEAD),
        book,
    )


@njit(forceinline=True)
def reset_state(buffer, head, replicas, tenants, prefix_tokens, horizon):
    """Write the header and an empty cluster of `replicas` (REPLICA) and `tenants` (TENANT) into `buffer`."""
    buffer[: 8 * _HEADER].view(np.int64)[:] = head
    s = open_state(buffer)
    c = s.cluster[0]
    c.now, c.horizon = 0.0, horizon
    c.next_request, c.pending, c.n_ended, c.free_slot, c.inflight, c.decisions = 0, -1, 0, 0, 0, 0
    c.block_tokens, c.prefix_tokens = s.phase.shape[1], prefix_tokens
    for m in range(len(s.sequences)):
        s.sequences[m].next = m + 1
    s.sequences[len(s.sequences) - 1].next = -1
    s.replicas[:] = replicas
    s.book.tenants[:] = tenants
    s.phase[:] = 0
    for r in range(len(replicas)):
        e = s.engines[r]
        e.next_event, e.start, e.alpha, e.beta = np.inf, 0.0, 0.0, 0.0
        e.steps, e.streamed, e.counter, e.context = 0, 0, 0, 0
        e.total_blocks = replicas[r].kv_tokens // c.block_tokens
        e.free_blocks = e.total_blocks
        e.n_decode, e.n_finishing, e.partial, e.mixed = 0, 0, -1, 0
        e.first_waiting, e.last_waiting, e.n_waiting = -1, -1, 0
        u = s.usage[r]
        u.busy_s, u.sequence_s, u.kv_s = 0.0, 0.0, 0.0
        u.output_tokens, u.iterations, u.preemptions = 0, 0, 0
        blockset.clear(s.nodes, s.buckets, s.heads, r, max(1, replicas[r].kv_tokens // prefix_tokens))
    bookkeeping.clear(s.book, s.replicas, prefix_tokens)
