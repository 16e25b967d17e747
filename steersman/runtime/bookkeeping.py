"""What a router knows: its own counts of what it sent where, and what it scraped.

The same compiled functions keep these counts in the simulator and in the gateway. Nothing here ever sees an
output length before its request has ended.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from steersman.runtime import prefixes, radix
from steersman.runtime.compiled import njit
from steersman.runtime.tenant import TENANT

# One row a replica.
VIEW = np.dtype(
    [
        ("inflight", "f8"),  # requests sent and not ended
        ("prefilling", "f8"),  # of these, without a first token yet
        ("prefill_tokens", "f8"),  # expected uncached prompt tokens of the prefilling ones
        ("prompt_tokens", "f8"),  # whole prompts of the prefilling ones
        ("context_tokens", "f8"),  # prompt and streamed tokens of the decoding ones
        ("prefill_since_s", "f8"),  # when its current head of line can have started prefill
        ("prefill_rate", "f8"),  # uncached prompt tokens sent per second, decaying mean
        ("prefill_rate_at_s", "f8"),
        ("running", "f8"),  # scraped: sequences in the batch
        ("waiting", "f8"),  # scraped: queued in the engine
        ("kv_use", "f8"),  # scraped: share of KV blocks in use
        ("scraped_at_s", "f8"),
    ],
    align=True,
)

# One row a tenant.
TENANT_VIEW = np.dtype(
    [
        ("output_tokens", "f8"),  # decaying mean of seen output lengths
        ("attainment", "f8"),  # decaying mean of "met both SLOs" over ended requests, 1 before any
        ("arrived", "f8"),
        ("ended", "f8"),
    ],
    align=True,
)

# One row: the whole fleet.
FLEET_VIEW = np.dtype([("rate_short", "f8"), ("rate_long", "f8"), ("rate_at_s", "f8"), ("held", "f8")], align=True)

_HEAD, _NODE = radix.HEAD.itemsize, radix.NODE.itemsize
PREFILL_RATE_WINDOW_S = 10.0
RATE_SHORT_S, RATE_LONG_S = 3.0, 60.0
OUTPUT_MEMORY = 200.0  # requests over which a tenant's mean output length decays
ATTAINMENT_MEMORY = 50.0


class Bookkeeping(NamedTuple):
    """The counts of one router over R replicas and T tenants."""

    views: np.ndarray  # VIEW (R,)
    tenants: np.ndarray  # TENANT (T,): promises, constant
    tenant_views: np.ndarray  # TENANT_VIEW (T,)
    fleet: np.ndarray  # FLEET_VIEW (1,)
    tenant_inflight: np.ndarray  # float64 (R, T): requests in flight by replica and tenant
    # The prefixes that each replica is believed to cache, see `prefixes`:
    sets: np.ndarray  # HEAD (R,)
    table: np.ndarray  # int32 (buckets, R)
    nodes: np.ndarray  # NODE (R, nodes)


def new_bookkeeping(replicas: np.ndarray, tenants: np.ndarray, prefix_tokens: int) -> Bookkeeping:
    """Empty counts for REPLICA and TENANT arrays; each replica is believed to cache what its KV memory can hold."""
    nodes = radix.nodes_for(int(replicas["kv_tokens"].max()) // prefix_tokens)
    book = Bookkeeping(
        views=np.zeros(len(replicas), VIEW),
        tenants=tenants.copy(),
        tenant_views=np.zeros(len(tenants), TENANT_VIEW),
        fleet=np.zeros(1, FLEET_VIEW),
        tenant_inflight=np.zeros((len(replicas), len(tenants))),
        sets=np.zeros(len(replicas), radix.HEAD),
        table=np.zeros((radix.buckets_for(nodes), len(replicas)), np.int32),
        nodes=np.zeros((len(replicas), nodes), radix.NODE),
    )
    assert tenants.dtype == TENANT
    clear(book)
    return book


@njit(forceinline=True)
def clear(book):
    """Forget everything but the promises."""
    for r in range(len(book.views)):
        v = book.views[r]
        v.inflight = v.prefilling = v.prefill_tokens = v.prompt_tokens = v.context_tokens = 0.0
        v.prefill_since_s = v.prefill_rate = v.prefill_rate_at_s = 0.0
        v.running = v.waiting = v.kv_use = v.scraped_at_s = 0.0
        count = book.nodes.shape[1]
        nodes = book.nodes.ctypes.data + r * count * _NODE
        radix.clear(belief(book, r), nodes, count, book.table.ctypes.data + 4 * r, *book.table.shape)
    for t in range(len(book.tenants)):
        book.tenant_views[t].output_tokens = book.tenants[t].expected_output_tokens
        book.tenant_views[t].attainment = 1.0
        book.tenant_views[t].arrived = book.tenant_views[t].ended = 0.0
    book.tenant_inflight[:] = 0.0
    f = book.fleet[0]
    f.rate_short = f.rate_long = f.rate_at_s = f.held = 0.0


@njit(forceinline=True)
def belief(book, r):
    """The set of prefixes that replica `r` is believed to cache."""
    return book.sets.ctypes.data + r * _HEAD


@njit(forceinline=True)
def forget(book, r):
    """Replica `r` went down: its cache is lost."""
    radix.clear_again(belief(book, r))


@njit(forceinline=True)
def arrive(book, now, tenant):
    """A request of `tenant` arrived."""
    f = book.fleet[0]
    elapsed = max(0.0, now - f.rate_at_s)
    f.rate_short = f.rate_short * np.exp(-elapsed / RATE_SHORT_S) + 1.0 / RATE_SHORT_S
    f.rate_long = f.rate_long * np.exp(-elapsed / RATE_LONG_S) + 1.0 / RATE_LONG_S
    f.rate_at_s = now
    book.tenant_views[tenant].arrived += 1.0


@njit(forceinline=True)
def matched_tokens(book, r, pool, at, count, prefix_tokens, prompt_tokens):
    """Tokens of a prompt that replica `r` is believed to have cached; the last token is always computed.

    Its full prefix blocks, of `prefix_tokens`, are the `count` identities from `at` in `pool`.
    """
    if count == 0:
        return 0
    return min(prefixes.lookup(belief(book, r), pool, at, count).blocks * prefix_tokens, prompt_tokens - 1)


@njit(forceinline=True)
def dispatch(book, now, r, tenant, prompt_tokens, uncached_tokens, pool, at, count, capacity):
    """A request goes to replica `r`, which can cache `capacity` prefix blocks; its own are as in `matched_tokens`.

    The pool must keep them while the replica is believed to cache them.
    """
    v = book.views[r]
    if v.prefilling == 0.0:
        v.prefill_since_s = now
    v.inflight += 1.0
    v.prefilling += 1.0
    v.prefill_tokens += uncached_tokens
    v.prompt_tokens += prompt_tokens
    elapsed = max(0.0, now - v.prefill_rate_at_s)
    v.prefill_rate = v.prefill_rate * np.exp(-elapsed / PREFILL_RATE_WINDOW_S) + uncached_tokens / PREFILL_RATE_WINDOW_S
    v.prefill_rate_at_s = now
    book.tenant_inflight[r, tenant] += 1.0
    if count > 0:
        prefixes.touch(belief(book, r), pool, at, count, capacity)


@njit(forceinline=True)
def first_token(book, now, r, prompt_tokens, uncached_tokens):
    """A request on replica `r` gave its first token."""
    v = book.views[r]
    v.prefilling -= 1.0
    v.prefill_tokens -= uncached_tokens
    v.prompt_tokens -= prompt_tokens
    v.prefill_since_s = now
    v.context_tokens += prompt_tokens + 1.0


@njit(forceinline=True)
def stream(book, r, tokens):
    """`tokens` further output tokens came from replica `r`."""
    book.views[r].context_tokens += tokens


@njit(forceinline=True)
def withdraw(book, now, r, tenant, prompt_tokens, uncached_tokens, streamed_tokens, started):
    """A request left replica `r`, to end or to be tried on another one.

    `streamed_tokens` are those counted by `first_token` and `stream`; `started`: it gave a first token.
    """
    v = book.views[r]
    v.inflight -= 1.0
    book.tenant_inflight[r, tenant] -= 1.0
    if started:
        v.context_tokens -= prompt_tokens + streamed_tokens
    else:
        v.prefilling -= 1.0
        v.prefill_tokens -= uncached_tokens
        v.prompt_tokens -= prompt_tokens
        v.prefill_since_s = now
    if v.inflight == 0.0:  # sums of floats: start afresh, so that nothing drifts
        v.prefilling = v.prefill_tokens = v.prompt_tokens = v.context_tokens = 0.0


@njit(forceinline=True)
def end(book, now, r, tenant, prompt_tokens, uncached_tokens, streamed_tokens, started, ok, attained):
    """A request on replica `r` ended, well (`ok`) or not. Arguments as in `withdraw`."""
    withdraw(book, now, r, tenant, prompt_tokens, uncached_tokens, streamed_tokens, started)
    tv = book.tenant_views[tenant]
    if ok:
        tv.output_tokens += (streamed_tokens - tv.output_tokens) / OUTPUT_MEMORY
    settle(book, tenant, attained)


@njit(forceinline=True)
def settle(book, tenant, attained):
    """A request of `tenant` is over: ended on a replica, or shed (then it missed its SLOs)."""
    tv = book.tenant_views[tenant]
    tv.ended += 1.0
    tv.attainment += ((1.0 if attained else 0.0) - tv.attainment) / min(ATTAINMENT_MEMORY, tv.ended + 1.0)
