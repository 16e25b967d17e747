"""The records of a simulated cluster: what is known of an engine, a sequence, an outcome, a fault, and the whole."""

from __future__ import annotations

import numpy as np

# The continuous-batching engine of one replica.
ENGINE = np.dtype(
    [
        ("start", "f8"),  # of the running iteration or jump
        ("alpha", "f8"),  # seconds of its first iteration
        ("beta", "f8"),  # further seconds of each later one: contexts grow
        ("extra_s", "f8"),  # seconds that the next iteration takes longer, for swapping
        ("slowdown", "f8"),  # a fault: iterations take so many times as long
        ("next_cancel", "f8"),  # when the first client of those here leaves
        ("steps", "i8"),  # iterations in it: 1, or a jump; 0: idle, or waiting for a batch
        ("streamed", "i8"),  # iterations of it that the bookkeeping has counted
        ("counter", "i8"),  # iterations so far
        ("first_finish", "i8"),  # the counter at which the first decoding sequence ends, or less
        ("context", "i8"),  # computed tokens of the decoding sequences
        ("free_blocks", "i8"),  # KV blocks neither held by requests nor by idle cache entries
        ("total_blocks", "i8"),
        ("host_free", "i8"),  # KV tokens that host memory has room for
        ("n_decode", "i4"),
        ("n_finishing", "i4"),  # sequences whose prefill ends with the running iteration
        ("partial", "i4"),  # sequence with a prefill chunk done and more to come, or −1
        ("chunk", "i4"),  # tokens that each iteration of a jump computes of it
        ("first_waiting", "i4"),
        ("last_waiting", "i4"),
        ("n_waiting", "i4"),
        ("batch", "i4"),  # static batching: waiting sequences that belong to the batch
        ("mixed", "i4"),  # 1: the running iteration has prefill, and its KV blocks are taken already
        ("served", "i4"),  # iterations of the jump that the virtual token counters have counted
    ],
    align=True,
)

# A request inside a replica.
SEQUENCE = np.dtype(
    [
        ("first_token", "f8"),  # time, or NaN
        ("queued", "f8"),  # when it came to the replica; of a held one, when it is decided anew
        ("cancel", "f8"),  # when its client leaves, or inf
        ("expected", "f8"),  # output tokens that its gateway expected
        ("base", "i8"),  # while decoding: computed tokens − the engine's counter
        ("request", "i4"),
        ("next", "i4"),  # in the waiting list or the free list
        ("target", "i4"),  # tokens to compute before it decodes: prompt, and on recomputation its output so far
        ("computed", "i4"),
        ("generated", "i4"),  # output tokens; while decoding, as of when it began to; of a held one, how often it was
        ("held", "i4"),  # prefix blocks of the cache that it references
        ("node", "i4"),  # the last of them, in the tree of the replica, or −1
        ("cached", "i4"),  # prompt tokens found in the cache at first admission, or −1
        ("believed", "i4"),  # prompt tokens that the router expected to be cached
        ("swapped", "i4"),  # computed tokens in host memory
        ("gateway", "i4"),
        ("batched", "i4"),  # 1: it waits and belongs to the batch
    ],
    align=True,
)

OUTCOME = np.dtype(
    [
        ("ttft_s", "f8"),
        ("tpot_s", "f8"),
        ("e2e_s", "f8"),
        ("quality", "f4"),  # of the replica's precision when it ended; 0 where it did not end well
        ("replica", "i4"),
        ("cached_tokens", "i4"),
        ("state", "i1"),
        ("attained", "?"),
        ("holds", "i2"),  # how often it was held at its gateway; where a crash brought it back, since then
    ],
    align=True,
)

FAULT = np.dtype([("time_s", "f8"), ("value", "f8"), ("replica", "i4"), ("kind", "i4")], align=True)

SIZES = ("n_replicas", "n_tenants", "n_gateways", "n_sequences", "n_slots", "block_tokens", "n_nodes", "n_buckets")
_SECTIONS: tuple[str, ...] = (
    "replicas",
    "engines",
    "due",
    "usage",
    "tenants",
    "served",
    "present",
    "streams",
    "decoding",
    "finish",
)
_SECTIONS += ("finishing", "phase", "matched", "scrapes", "views", "tenant_views", "fleets", "tenant_inflight")
_SECTIONS += ("sets", "tables", "nodes", "ended", "held", "sequences")

CLUSTER = np.dtype(
    [
        ("now", "f8"),
        ("horizon", "f8"),  # usage is measured up to here
        ("scrape_s", "f8"),
        ("next_tick", "f8"),  # the next fault or scrape
        ("next_request", "i8"),  # next row of the request table to arrive
        ("last_request", "i8"),  # rows from here on do not arrive
        ("more", "i8"),  # 1: further requests follow, so that nothing is played beyond the last of these
        ("next_fault", "i8"),
        ("retry", "i8"),  # first sequence whose request needs another decision, or −1
        ("n_held", "i8"),  # sequences whose requests are held
        ("pending", "i8"),  # request awaiting a decision, or −1
        ("retried", "i8"),  # 1: it was on a replica before; 2: it was held last
        ("holds", "i8"),  # how often it was held since it arrived, or came back from a replica
        ("observed", "i8"),  # 1: rows and mask are those of the pending request
        ("n_ended", "i8"),  # entries of the ended log since the last decision
        ("free_slot", "i8"),  # head of the list of free sequences
        ("used_slots", "i8"),  # sequences from here on were never used
        ("inflight", "i8"),
        ("decisions", "i8"),
        ("cancels", "i8"),  # 1: some clients leave
        ("shift", "i8"),  # block_tokens = 1 << shift
        ("prefix_tokens", "i8"),  # of a prefix block, a multiple of block_tokens
        ("per_prefix", "i8"),  # KV blocks of a prefix block
        ("bytes", "i8"),
        *((name, "i8") for name in SIZES),
        *((f"at_{name}", "i8") for name in _SECTIONS),
        ("p_step", "i8"),  # address of the compiled step
        # Addresses of data that stand beside the buffer, and their lengths.
        ("p_requests", "i8"),
        ("n_requests", "i8"),
        ("p_blocks", "i8"),
        ("n_blocks", "i8"),
        ("p_outcomes", "i8"),
        ("p_faults", "i8"),
        ("n_faults", "i8"),
        ("p_rows", "i8"),
        ("p_mask", "i8"),
        ("p_reasons", "i8"),
        ("n_candidates", "i8"),
    ],
    align=True,
)
