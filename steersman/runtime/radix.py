"""A radix tree of prefixes in one flat piece of memory: its nodes, its hash table, and the list of idle nodes.

A node is a run of blocks that prompts have in common; it does not hold their identities but points to where they stand
in `pool`, an int64 array that functions take. All is counted in blocks.

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


def nodes_for(blocks: int) -> int:
    """Nodes that a set of up to `blocks` blocks gets. Where they run out, old prefixes go early."""
    return min(blocks + 2, MOST_NODES)  # `touch` wants two that are free


def buckets_for(nodes: int) -> int:
    return 1 << max(2, (nodes // 8).bit_length())


@inner(inline=True)
def open_tree(tree):
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
    t = open_tree(tree)
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
def find(t, key):
    """The node that starts with block `key`, or −1."""
    i = t.table[_bucket(t, key)]
    while i >= 0 and t.nodes[i].key != key:
        i = t.nodes[i].chain
    return i


@inner(inline=True)
def unlink(t, i):
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
def link_newest(t, i):
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
def remove(t, i):
    """Free an idle node, which has no children; it stands in the list no more."""
    h, n = t.head[0], t.nodes[i]
    _unindex(t, i)
    if n.parent >= 0:
        t.nodes[n.parent].children -= 1
    h.size -= n.length
    n.length, n.chain = 0, h.free
    h.free = i


@inner(inline=True)
def new_node(t, pool, at, length, parent, refs):
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
def split(t, pool, i, count):
    """Split node `i` after `count` blocks: a new node has its head, `i` keeps the rest. Returns the new one."""
    n = t.nodes[i]
    _unindex(t, i)
    h = t.head[0]
    h.size -= count  # `new_node` counts them again
    j = new_node(t, pool, n.at, count, n.parent, n.refs)
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
