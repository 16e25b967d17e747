"""A set of prompt prefixes with least-recently-used eviction: a radix tree in one flat piece of memory.

One such set a replica serves two uses: the simulator's true prefix cache (what a sequence uses is held by a reference
count and cannot be evicted), and what a router believes to be cached (no references).

A prefix is a list of blocks; a block's identity, int64, stands for the whole prompt up to its end. A node is a run of
blocks that prompts have in common; it does not hold their identities but points to where they stand in `pool`, an int64
array that every function takes, with the prefix as (`at`, `count`) in it. All is counted in blocks.

The list of idle nodes (those without references) runs from the oldest to the newest; a node is never newer than its
parent, and eviction takes blocks from the end of the oldest, so that it equals an LRU of single blocks.

`tree` is the address of a set's HEAD, which says where the rest stands: NODE (nodes,), and a hash table of nodes by
their first block. The heads of several sets stand side by side, and so do their tables, as columns of an int32
(buckets, sets): who looks one prefix up in all of them touches few lines of memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from steersman.runtime.compiled import carray, inner, njit, pointer

HEAD = np.dtype(
    [
        ("size", "i4"),  # blocks in it
        ("idle", "i4"),  # blocks of nodes without references
        ("oldest", "i4"),  # ends of the list of idle nodes, or −1
        ("newest", "i4"),
        ("free", "i4"),  # first of the list of freed nodes, through `chain`, or −1
        ("used", "i4"),  # nodes from here on were never used
        ("nodes", "i4"),
        ("buckets", "i4"),  # a power of two
        ("at_nodes", "i8"),  # where the nodes stand, bytes from here on
        ("at_table", "i8"),  # where its column of the table starts
        ("stride", "i4"),  # columns of that
        ("_", "i4", 3),
    ]
)  # a line of memory, as NODE
NODE = np.dtype(
    [
        ("key", "i8"),  # its first block
        ("last", "i8"),  # its last block, or 0 where that must be looked up in the pool
        ("at", "i4"),  # where its blocks stand in the pool
        ("length", "i4"),  # blocks; 0: the node is free
        ("parent", "i4"),  # or −1
        ("children", "i4"),
        ("refs", "i4"),  # sequences that hold it
        ("older", "i4"),
        ("newer", "i4"),
        ("chain", "i4"),  # next in its bucket, or in the list of freed nodes
        ("_", "i8", 2),
    ],
    align=True,
)
MOST_NODES = 2048


class Tree(NamedTuple):
    """Views into a set."""

    head: np.ndarray  # HEAD (1,)
    table: np.ndarray  # int32: every `stride`-th is of this set
    nodes: np.ndarray  # NODE (nodes,)


class Found(NamedTuple):
    """How much of a prefix is in a set."""

    blocks: int
    idle: int  # of these, in nodes without references
    node: int  # the last one, or −1
    inside: int  # blocks of it that are part of the prefix


def nodes_for(blocks: int) -> int:
    """Nodes that a set of up to `blocks` blocks gets. Where they run out, old prefixes go early."""
    return min(blocks + 2, MOST_NODES)  # `touch` wants two that are free


def buckets_for(nodes: int) -> int:
    return 1 << max(2, (nodes // 8).bit_length())


@inner(inline=True)
def _open(tree):
    head = carray(pointer(tree), (1,), HEAD)
    h = head[0]
    return Tree(
        head,
        carray(pointer(tree + h.at_table), (h.buckets * h.stride,), np.int32),
        carray(pointer(tree + h.at_nodes), (h.nodes,), NODE),
    )


@njit
def clear(tree, nodes, count, table, buckets, stride):
    """Make an empty set. nodes, table: addresses of NODE (count,), and of its column of int32 (buckets, stride)."""
    h = carray(pointer(tree), (1,), HEAD)[0]
    h.size, h.idle, h.oldest, h.newest, h.free, h.used = 0, 0, -1, -1, -1, 0
    h.nodes, h.buckets, h.stride = count, buckets, stride
    h.at_nodes, h.at_table = nodes - tree, table - tree
    t = _open(tree)
    for b in range(buckets):
        t.table[b * stride] = -1


@inner(inline=True)
def clear_again(tree):
    """Make a set empty."""
    h = head(tree)
    clear(tree, tree + h.at_nodes, h.nodes, tree + h.at_table, h.buckets, h.stride)


@inner(inline=True)
def head(tree):
    """The HEAD record."""
    return carray(pointer(tree), (1,), HEAD)[0]


@inner(inline=True)
def _bucket(t, key):
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    h = t.head[0]
    return np.int64((mixed >> np.uint64(32)) & np.uint64(h.buckets - 1)) * h.stride


@inner(inline=True)
def _find(t, key):
    """The node that starts with block `key`, or −1."""
    i = t.table[_bucket(t, key)]
    while i >= 0 and t.nodes[i].key != key:
        i = t.nodes[i].chain
    return i


@inner(inline=True)
def _common(t, pool, i, at, count):
    """Leading blocks of node `i`, whose first one matches, that are those of the prefix."""
    n = t.nodes[i]
    high = min(n.length, count)
    if high == n.length and n.last == pool[at + high - 1] and n.last != 0:
        return high
    if pool[n.at + high - 1] == pool[at + high - 1]:
        return high
    low = 1
    high -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if pool[n.at + middle - 1] == pool[at + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


@njit
def lookup(tree, pool, at, count):
    """How much of a prefix is in the set: `Found`."""
    t = _open(tree)
    blocks, idle, node, inside = 0, 0, -1, 0
    while blocks < count:
        i = _find(t, pool[at + blocks])
        if i < 0:
            break
        node, inside = i, _common(t, pool, i, at + blocks, count - blocks)
        blocks += inside
        if t.nodes[i].refs == 0:
            idle += inside
        if inside < t.nodes[i].length or t.nodes[i].children == 0:
            break  # without children nothing follows: that spares a line of the table, which is rarely in a cache
    return Found(blocks, idle, node, inside)


@inner(inline=True)
def _unlink(t, i):
    h, n = t.head[0], t.nodes[i]
    if n.older >= 0:
        t.nodes[n.older].newer = n.newer
    else:
        h.oldest = n.newer
    if n.newer >= 0:
        t.nodes[n.newer].older = n.older
    else:
        h.newest = n.older
    h.idle -= n.length


@inner(inline=True)
def _link_newest(t, i):
    h, n = t.head[0], t.nodes[i]
    n.older, n.newer = h.newest, -1
    if h.newest >= 0:
        t.nodes[h.newest].newer = i
    else:
        h.oldest = i
    h.newest = i
    h.idle += n.length


@inner(inline=True)
def _index(t, i):
    b = _bucket(t, t.nodes[i].key)
    t.nodes[i].chain = t.table[b]
    t.table[b] = i


@inner(inline=True)
def _unindex(t, i):
    b = _bucket(t, t.nodes[i].key)
    j = t.table[b]
    if j == i:
        t.table[b] = t.nodes[i].chain
        return
    while t.nodes[j].chain != i:
        j = t.nodes[j].chain
    t.nodes[j].chain = t.nodes[i].chain


@inner(inline=True)
def _remove(t, i):
    """Free an idle node, which has no children; it stands in the list no more."""
    h, n = t.head[0], t.nodes[i]
    _unindex(t, i)
    if n.parent >= 0:
        t.nodes[n.parent].children -= 1
    h.size -= n.length
    n.length, n.chain = 0, h.free
    h.free = i


@njit
def evict(tree, blocks):
    """Evict up to `blocks` idle blocks, least recently used first. Returns how many."""
    t = _open(tree)
    h, gone = t.head[0], 0
    while gone < blocks and h.oldest >= 0:
        i = h.oldest
        n = t.nodes[i]
        if n.length <= blocks - gone:
            gone += n.length
            _unlink(t, i)
            _remove(t, i)
        else:
            rest = blocks - gone
            n.length -= rest
            n.last = 0
            h.size -= rest
            h.idle -= rest
            gone += rest
    return gone


@inner(inline=True)
def _reserve(t, tree, count):
    """Have `count` nodes that are not in use, evicting old ones where needed. Returns whether there are."""
    h = t.head[0]
    free, i = h.nodes - h.used, h.free
    while free < count and i >= 0:
        free += 1
        i = t.nodes[i].chain
    while free < count:
        if h.oldest < 0:
            return False
        evict(tree, t.nodes[h.oldest].length)
        free += 1
    return True


@inner(inline=True)
def _new(t, pool, at, length, parent, refs):
    """A node, indexed, counted in `size` and by its parent; not in the list of idle ones. One must be free."""
    h = t.head[0]
    if h.free >= 0:
        i = h.free
        h.free = t.nodes[i].chain
    else:
        i = h.used
        h.used += 1
    n = t.nodes[i]
    n.key, n.last, n.at, n.length = pool[at], pool[at + length - 1], at, length
    n.parent, n.children, n.refs = parent, 0, refs
    n.older, n.newer = -1, -1
    if parent >= 0:
        t.nodes[parent].children += 1
    h.size += length
    _index(t, i)
    return i


@inner(inline=True)
def _split(t, pool, i, count):
    """Split node `i` after `count` blocks: a new node has its head, `i` keeps the rest. Returns the new one."""
    n = t.nodes[i]
    _unindex(t, i)
    h = t.head[0]
    h.size -= count  # `_new` counts them again
    j = _new(t, pool, n.at, count, n.parent, n.refs)
    n.at += count
    n.length -= count
    n.key = pool[n.at]
    _index(t, i)
    if n.parent >= 0:
        t.nodes[n.parent].children -= 1
    n.parent = j
    t.nodes[j].children = 1
    if n.refs == 0:  # its head is the next newer one
        t.nodes[j].older, t.nodes[j].newer = i, n.newer
        if n.newer >= 0:
            t.nodes[n.newer].older = j
        else:
            h.newest = j
        n.newer = j
    return j


@inner(inline=True)
def _hold_up(t, i):
    """Add a reference to node `i` and all above it."""
    while i >= 0:
        n = t.nodes[i]
        if n.refs == 0:
            _unlink(t, i)
        n.refs += 1
        i = n.parent


@njit
def hold(tree, pool, at, count):
    """Hold the first `count` blocks of a prefix, which are in the set. Returns (last node or −1, blocks held).

    Fewer are held where a run had to be cut and no node was left for that.
    """
    t = _open(tree)
    found = lookup(tree, pool, at, count)
    node = found.node
    if node >= 0 and found.inside < t.nodes[node].length:
        if t.head[0].free >= 0 or t.head[0].used < t.head[0].nodes:
            node = _split(t, pool, node, found.inside)
        else:
            node, count = t.nodes[node].parent, count - found.inside
    _hold_up(t, node)
    return node, count


@njit
def extend(tree, pool, at, node, held, count):
    """Add the blocks from `held` to `count` of a prefix of which `held` are held, up to `node`.

    Returns (last node, blocks held, blocks that were in the set already).
    """
    t = _open(tree)
    found_blocks = 0
    while held < count:
        leaf = node >= 0 and t.nodes[node].children == 0
        i = -1 if leaf else _find(t, pool[at + held])
        if i >= 0:
            inside = _common(t, pool, i, at + held, count - held)
            if inside < t.nodes[i].length:
                if not _reserve_but(t, tree, i):
                    break
                i = _split(t, pool, i, inside)
            n = t.nodes[i]
            if n.refs == 0:
                _unlink(t, i)
            n.refs += 1
            node = i
            held += inside
            found_blocks += inside
        elif leaf and t.nodes[node].refs == 1:
            n = t.nodes[node]
            n.at = at + held - n.length
            n.length += count - held
            n.last = pool[at + count - 1]
            t.head[0].size += count - held
            held = count
        else:
            if not _reserve(t, tree, 1):
                break
            node = _new(t, pool, at + held, count - held, node, 1)
            held = count
    return node, held, found_blocks


@inner(inline=True)
def _reserve_but(t, tree, i):
    """`_reserve` one node, which must not be `i`."""
    h = t.head[0]
    if h.free >= 0 or h.used < h.nodes:
        return True
    if h.oldest < 0 or h.oldest == i:
        return False
    evict(tree, t.nodes[h.oldest].length)
    return True


@njit
def release(tree, node):
    """Drop a reference to `node` and all above it; those without any become the newest idle ones."""
    t = _open(tree)
    while node >= 0:
        n = t.nodes[node]
        n.refs -= 1
        if n.refs == 0:
            _link_newest(t, node)
        node = n.parent


@njit
def touch(tree, pool, at, count, capacity):
    """Make a prefix the newest in a set that holds no more than `capacity` blocks, adding what is missing.

    What does not fit at all is left out from its end.
    """
    t = _open(tree)
    h = t.head[0]
    count = min(count, capacity)
    if count == 0 or not _reserve(t, tree, 2):
        return
    found = lookup(tree, pool, at, count)
    node = found.node
    if node >= 0 and found.inside < t.nodes[node].length:
        node = _split(t, pool, node, found.inside)
    i = node
    while i >= 0:  # out of the list, so that they are not evicted
        _unlink(t, i)
        i = t.nodes[i].parent
    missing = count - found.blocks
    if missing > 0:
        over = h.size + missing - capacity
        if over > 0:
            evict(tree, over)
        if node >= 0 and t.nodes[node].children == 0:
            n = t.nodes[node]
            n.at = at + found.blocks - n.length
            n.length += missing
            n.last = pool[at + count - 1]
            h.size += missing
        else:
            node = _new(t, pool, at + found.blocks, missing, node, 0)
    while node >= 0:
        _link_newest(t, node)
        node = t.nodes[node].parent


@njit
def move(tree, pool, target, at):
    """Copy the blocks of all nodes from `pool` to `target`, from `at` on. Returns the end of what was written."""
    t = _open(tree)
    for i in range(t.head[0].used):
        n = t.nodes[i]
        for k in range(n.length):
            target[at + k] = pool[n.at + k]
        if n.length > 0:
            n.at = at
            at += n.length
    return at
