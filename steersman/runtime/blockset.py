"""A bounded set of prefix blocks with least-recently-used eviction, as flat arrays for compiled code.

One such set a replica serves two uses: the simulator's true prefix cache (entries in use are held by a
reference count and cannot be evicted), and what a router believes to be cached (no references). `r` selects the
replica in every function.

Arrays, for R replicas, N entries and H buckets (H a power of two):
    nodes    NODE (R, N)    entries; the free ones form a list through `chain`
    buckets  int32 (R, H)   first entry of each hash chain, or -1
    heads    HEAD (R,)      list ends and counts
"""

from __future__ import annotations

import numpy as np

from steersman.runtime.compiled import njit

NODE = np.dtype(
    [
        ("key", "i8"),
        ("refs", "i4"),  # users; 0 means that it stands in the LRU list
        ("older", "i4"),
        ("newer", "i4"),
        ("chain", "i4"),
    ],
    align=True,
)
HEAD = np.dtype(
    [("oldest", "i4"), ("newest", "i4"), ("free", "i4"), ("idle", "i4"), ("size", "i4"), ("capacity", "i4")]
)


@njit(forceinline=True)
def clear(nodes, buckets, heads, r, capacity):
    """Empty the set of replica `r`, which may hold `capacity` (at least 1, at most N) entries."""
    buckets[r, :] = -1
    for i in range(capacity):
        nodes[r, i].chain = i + 1
    nodes[r, capacity - 1].chain = -1
    h = heads[r]
    h.oldest, h.newest, h.free, h.idle, h.size, h.capacity = -1, -1, 0, 0, 0, capacity


@njit(inline="always")
def _bucket(buckets, key):
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed >> np.uint64(32)) & np.uint64(buckets.shape[1] - 1))


@njit(forceinline=True)
def find(nodes, buckets, r, key):
    """The entry of `key`, or -1."""
    i = buckets[r, _bucket(buckets, key)]
    while i >= 0 and nodes[r, i].key != key:
        i = nodes[r, i].chain
    return i


@njit(forceinline=True)
def matched(nodes, buckets, r, keys):
    """How many leading `keys` are in the set.

    The set is closed under prefixes (a block is never newer than the blocks before it), so a bisection finds it.
    """
    if len(keys) == 0 or find(nodes, buckets, r, keys[0]) < 0:
        return 0
    low, high = 1, len(keys)
    while low < high:
        middle = (low + high + 1) // 2
        if find(nodes, buckets, r, keys[middle - 1]) >= 0:
            low = middle
        else:
            high = middle - 1
    return low


@njit(forceinline=True)
def _unlink(nodes, heads, r, i):
    older, newer = nodes[r, i].older, nodes[r, i].newer
    if older >= 0:
        nodes[r, older].newer = newer
    else:
        heads[r].oldest = newer
    if newer >= 0:
        nodes[r, newer].older = older
    else:
        heads[r].newest = older
    heads[r].idle -= 1


@njit(forceinline=True)
def _link_newest(nodes, heads, r, i):
    last = heads[r].newest
    nodes[r, i].older = last
    nodes[r, i].newer = -1
    if last >= 0:
        nodes[r, last].newer = i
    else:
        heads[r].oldest = i
    heads[r].newest = i
    heads[r].idle += 1


@njit(forceinline=True)
def hold(nodes, heads, r, i):
    """Add a reference to entry `i`: it cannot be evicted."""
    if nodes[r, i].refs == 0:
        _unlink(nodes, heads, r, i)
    nodes[r, i].refs += 1


@njit(forceinline=True)
def release(nodes, heads, r, i):
    """Drop a reference to entry `i`; without any it becomes the newest idle one."""
    nodes[r, i].refs -= 1
    if nodes[r, i].refs == 0:
        _link_newest(nodes, heads, r, i)


@njit(forceinline=True)
def evict(nodes, buckets, heads, r):
    """Remove the oldest idle entry. Returns whether there was one."""
    i = heads[r].oldest
    if i < 0:
        return False
    _unlink(nodes, heads, r, i)
    b = _bucket(buckets, nodes[r, i].key)
    j = buckets[r, b]
    if j == i:
        buckets[r, b] = nodes[r, i].chain
    else:
        while nodes[r, j].chain != i:
            j = nodes[r, j].chain
        nodes[r, j].chain = nodes[r, i].chain
    nodes[r, i].chain = heads[r].free
    heads[r].free = i
    heads[r].size -= 1
    return True


@njit(forceinline=True)
def insert(nodes, buckets, heads, r, key, refs):
    """Add `key`, which is not in the set, with `refs` references. Returns its entry, or -1 when all are held."""
    if heads[r].free < 0 and not evict(nodes, buckets, heads, r):
        return -1
    i = heads[r].free
    heads[r].free = nodes[r, i].chain
    b = _bucket(buckets, key)
    nodes[r, i].key = key
    nodes[r, i].refs = refs
    nodes[r, i].chain = buckets[r, b]
    buckets[r, b] = i
    heads[r].size += 1
    if refs == 0:
        _link_newest(nodes, heads, r, i)
    return i


@njit(forceinline=True)
def touch(nodes, buckets, heads, r, keys):
    """Make `keys` (a prompt's blocks, first to last) the newest idle entries, adding those that are missing.

    The last block goes first, so that no block is ever newer than one before it; keys that do not fit at all
    (more than the set holds) are left out from the end.
    """
    fit = min(len(keys), heads[r].capacity)
    for k in range(fit - 1, -1, -1):
        i = find(nodes, buckets, r, keys[k])
        if i < 0:
            insert(nodes, buckets, heads, r, keys[k], 0)
        else:
            _unlink(nodes, heads, r, i)
            _link_newest(nodes, heads, r, i)
