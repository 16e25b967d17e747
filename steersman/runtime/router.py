"""What a live router's compiled functions work on, as one record whose address is all that they take.

Passing the arrays themselves costs a call 2 to 4 µs, more than what it does. Only the live scheduler uses this; the
simulator's compiled loop has its own buffer and calls the same functions of `bookkeeping`, `observation` and `guard`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from steersman.runtime import bookkeeping, radix
from steersman.runtime.bookkeeping import FLEET_VIEW, TENANT_VIEW, VIEW, Bookkeeping
from steersman.runtime.compiled import carray, entry, njit, pointer
from steersman.runtime.fleet import REPLICA
from steersman.runtime.guard import guard
from steersman.runtime.observation import WIDTH, encode
from steersman.runtime.tenant import TENANT

ROUTER = np.dtype(
    [
        ("n_replicas", "i8"),
        ("n_tenants", "i8"),
        ("n_candidates", "i8"),
        ("n_buckets", "i8"),
        ("n_nodes", "i8"),
        ("n_blocks", "i8"),
        ("p_replicas", "i8"),
        ("p_views", "i8"),
        ("p_tenants", "i8"),
        ("p_tenant_views", "i8"),
        ("p_fleet", "i8"),
        ("p_tenant_inflight", "i8"),
        ("p_sets", "i8"),
        ("p_table", "i8"),
        ("p_nodes", "i8"),
        ("p_blocks", "i8"),  # changes when the pool is compacted
        ("p_matched", "i8"),
        ("p_rows", "i8"),
        ("p_mask", "i8"),
        ("p_reasons", "i8"),
    ]
)


def router_record(
    replicas: np.ndarray,
    book: Bookkeeping,
    blocks: np.ndarray,
    matched: np.ndarray,
    rows: np.ndarray,
    mask: np.ndarray,
    reasons: np.ndarray,
) -> np.ndarray:
    """A ROUTER record (1,) of these arrays, which must stay where they are while it is used."""
    record = np.zeros(1, ROUTER)
    record["n_replicas"], record["n_tenants"] = len(replicas), len(book.tenants)
    record["n_candidates"] = len(rows)
    record["n_buckets"], record["n_nodes"] = len(book.table), book.nodes.shape[1]
    arrays = {"replicas": replicas, "matched": matched, "rows": rows, "mask": mask, "reasons": reasons}
    for name, array in {**book._asdict(), **arrays}.items():
        assert array.flags.c_contiguous, name
        record[f"p_{name}"] = array.ctypes.data
    set_blocks(record, blocks)
    return record


def set_blocks(record: np.ndarray, blocks: np.ndarray) -> None:
    """The pool of prefix blocks is another array now."""
    record["n_blocks"], record["p_blocks"] = len(blocks), blocks.ctypes.data


@njit(forceinline=True)
def _at(a):
    return carray(pointer(a), (1,), ROUTER)[0]


@njit(forceinline=True)
def _book(a):
    s = _at(a)
    n, t = s.n_replicas, s.n_tenants
    return Bookkeeping(
        carray(pointer(s.p_views), (n,), VIEW),
        carray(pointer(s.p_tenants), (t,), TENANT),
        carray(pointer(s.p_tenant_views), (t,), TENANT_VIEW),
        carray(pointer(s.p_fleet), (1,), FLEET_VIEW),
        carray(pointer(s.p_tenant_inflight), (n, t), np.float64),
        carray(pointer(s.p_sets), (n,), radix.HEAD),
        carray(pointer(s.p_table), (s.n_buckets, n), np.int32),
        carray(pointer(s.p_nodes), (n, s.n_nodes), radix.NODE),
    )


@njit(forceinline=True)
def _blocks(a):
    s = _at(a)
    return carray(pointer(s.p_blocks), (s.n_blocks,), np.int64)


@njit
def arrive(a, now, tenant):
    """`bookkeeping.arrive`."""
    bookkeeping.arrive(_book(a), now, tenant)


@njit
def observe(a, now, tenant, prompt_tokens, max_tokens, model, regions, priority, at, count, block_tokens, waited_s):
    """The simulator's `observe`: fill matched, rows, mask and reasons. Returns how many replicas are allowed.

    at, count, block_tokens: where the request's prefix blocks stand, how many they are, and tokens of one.
    """
    s, book, blocks = _at(a), _book(a), _blocks(a)
    replicas = carray(pointer(s.p_replicas), (s.n_replicas,), REPLICA)
    matched = carray(pointer(s.p_matched), (s.n_replicas,), np.float64)
    rows = carray(pointer(s.p_rows), (s.n_candidates, WIDTH), np.float32)
    mask = carray(pointer(s.p_mask), (s.n_candidates,), np.bool_)
    reasons = carray(pointer(s.p_reasons), (s.n_candidates,), np.int8)
    for r in range(s.n_replicas):
        matched[r] = bookkeeping.matched_tokens(book, r, blocks, at, count, block_tokens, prompt_tokens)
    encode(now, replicas, book, tenant, prompt_tokens, max_tokens, matched, waited_s, priority, rows)
    promise = book.tenants[tenant].ttft_slo_s
    return guard(replicas, prompt_tokens, max_tokens, model, regions, promise, waited_s, mask, reasons)


@njit
def dispatch(a, now, r, tenant, prompt_tokens, uncached_tokens, at, count, capacity):
    """`bookkeeping.dispatch`."""
    bookkeeping.dispatch(_book(a), now, r, tenant, prompt_tokens, uncached_tokens, _blocks(a), at, count, capacity)


@njit
def first_token(a, now, r, prompt_tokens, uncached_tokens):
    """`bookkeeping.first_token`."""
    bookkeeping.first_token(_book(a), now, r, prompt_tokens, uncached_tokens)


@njit
def withdraw(a, now, r, tenant, prompt_tokens, uncached_tokens, streamed_tokens, started):
    """`bookkeeping.withdraw`."""
    bookkeeping.withdraw(_book(a), now, r, tenant, prompt_tokens, uncached_tokens, streamed_tokens, started)


@njit
def end(a, now, r, tenant, prompt_tokens, uncached_tokens, streamed_tokens, started, ok, attained):
    """`bookkeeping.end`."""
    bookkeeping.end(_book(a), now, r, tenant, prompt_tokens, uncached_tokens, streamed_tokens, started, ok, attained)


@njit
def settle(a, tenant, attained):
    """`bookkeeping.settle`."""
    bookkeeping.settle(_book(a), tenant, attained)


class Entries(NamedTuple):
    """The functions above, as Python calls them fastest (see `compiled.entry`)."""

    arrive: Any = arrive
    observe: Any = observe
    dispatch: Any = dispatch
    first_token: Any = first_token
    withdraw: Any = withdraw
    end: Any = end
    settle: Any = settle


def entries() -> Entries:
    """Once each has been called, and so compiled."""
    return Entries(*map(entry, Entries()))
