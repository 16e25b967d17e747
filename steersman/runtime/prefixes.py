"""A set of prompt prefixes with least-recently-used eviction: a radix tree in one flat piece of memory.

One such set a replica serves two uses: the simulator's true prefix cache (what a sequence uses is held by a reference
count and cannot be evicted), and what a router believes to be cached (no references).

A prefix is a list of blocks; a block's identity, int64, stands for the whole prompt up to its end. Every function takes
`tree`, the address of a set's HEAD (see `radix`), and `pool`, an int64 array in which a prefix is (`at`, `count`).
All is counted in blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from steersman.runtime.compiled import inner, njit
from steersman.runtime.radix import find, link_newest, new_node, open_tree, remove, split, unlink


class Found(NamedTuple):
    """How much of a prefix is in a set."""

    blocks: int
    idle: int  # of these, in nodes without references
    node: int  # the last one, or −1
    inside: int  # blocks of it that are part of the prefix


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
    t = open_tree(tree)
    blocks, idle, node, inside = 0, 0, -1, 0
    while blocks < count:
        i = find(t, pool[at + blocks])
        if i < 0:
            break
        node, inside = i, _common(t, pool, i, at + blocks, count - blocks)
        blocks += inside
        if t.nodes[i].refs == 0:
            idle += inside
        if inside < t.nodes[i].length or t.nodes[i].children == 0:
            break  # without children nothing follows: that spares a line of the table, which is rarely in a cache
    return Found(blocks, idle, node, inside)


@njit
def evict(tree, blocks):
    """Evict up to `blocks` idle blocks, least recently used first. Returns how many."""
    t = open_tree(tree)
    h, gone = t.head[0], 0
    while gone < blocks and h.oldest >= 0:
        i = h.oldest
        n = t.nodes[i]
        if n.length <= blocks - gone:
            gone += n.length
            unlink(t, i)
            remove(t, i)
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
def _hold_up(t, i):
    """Add a reference to node `i` and all above it."""
    while i >= 0:
        n = t.nodes[i]
        if n.refs == 0:
            unlink(t, i)
        n.refs += 1
        i = n.parent


@njit
def hold(tree, pool, at, count):
    """Hold the first `count` blocks of a prefix, which are in the set. Returns (last node or −1, blocks held).

    Fewer are held where a run had to be cut and no node was left for that.
    """
    t = open_tree(tree)
    found = lookup(tree, pool, at, count)
    node = found.node
    if node >= 0 and found.inside < t.nodes[node].length:
        if t.head[0].free >= 0 or t.head[0].used < t.head[0].nodes:
            node = split(t, pool, node, found.inside)
        else:
            node, count = t.nodes[node].parent, count - found.inside
    _hold_up(t, node)
    return node, count


@njit
def extend(tree, pool, at, node, held, count):
    """Add the blocks from `held` to `count` of a prefix of which `held` are held, up to `node`.

    Returns (last node, blocks held, blocks that were in the set already).
    """
    t = open_tree(tree)
    found_blocks = 0
    while held < count:
        leaf = node >= 0 and t.nodes[node].children == 0
        i = -1 if leaf else find(t, pool[at + held])
        if i >= 0:
            inside = _common(t, pool, i, at + held, count - held)
            if inside < t.nodes[i].length:
                if not _reserve_but(t, tree, i):
                    break
                i = split(t, pool, i, inside)
            n = t.nodes[i]
            if n.refs == 0:
                unlink(t, i)
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
            node = new_node(t, pool, at + held, count - held, node, 1)
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
    t = open_tree(tree)
    while node >= 0:
        n = t.nodes[node]
        n.refs -= 1
        if n.refs == 0:
            link_newest(t, node)
        node = n.parent


@njit
def touch(tree, pool, at, count, capacity):
    """Make a prefix the newest in a set that holds no more than `capacity` blocks, adding what is missing.

    What does not fit at all is left out from its end.
    """
    t = open_tree(tree)
    h = t.head[0]
    count = min(count, capacity)
    if count == 0 or not _reserve(t, tree, 2):
        return
    found = lookup(tree, pool, at, count)
    node = found.node
    if node >= 0 and found.inside < t.nodes[node].length:
        node = split(t, pool, node, found.inside)
    i = node
    while i >= 0:  # out of the list, so that they are not evicted
        unlink(t, i)
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
            node = new_node(t, pool, at + found.blocks, missing, node, 0)
    while node >= 0:
        link_newest(t, node)
        node = t.nodes[node].parent


@njit
def move(tree, pool, target, at):
    """Copy the blocks of all nodes from `pool` to `target`, from `at` on. Returns the end of what was written."""
    t = open_tree(tree)
    for i in range(t.head[0].used):
        n = t.nodes[i]
        for k in range(n.length):
            target[at + k] = pool[n.at + k]
        if n.length > 0:
            n.at = at
            at += n.length
    return at
