"""The KV memory of one replica: blocks that sequences own, and blocks that its prefix cache shares."""

from __future__ import annotations

from steersman.runtime import prefixes, radix
from steersman.runtime.compiled import inner
from steersman.runtime.simulator.state import tree_of


@inner(inline=True)
def blocks_for(c, tokens):
    """KV blocks that hold `tokens`."""
    return (tokens + c.block_tokens - 1) >> c.shift


@inner(inline=True)
def available_blocks(s, a, r):
    """KV blocks that can be had: free ones, and idle cache entries."""
    return s.engines[r].free_blocks + radix.head(tree_of(s, a, r)).idle * s.cluster[0].per_prefix


@inner(inline=True)
def kv_blocks(s, a, r):
    """KV blocks that sequences hold, as of the start of the running iteration or jump."""
    return s.engines[r].total_blocks - available_blocks(s, a, r)


@inner(inline=True)
def take(s, a, r, count):
    """Take `count` available KV blocks, evicting idle cache entries where needed."""
    e, per = s.engines[r], s.cluster[0].per_prefix
    short = count - e.free_blocks
    if short > 0:
        e.free_blocks += per * prefixes.evict(tree_of(s, a, r), (short + per - 1) // per)
    e.free_blocks -= count


@inner(inline=True)
def grown(s, r, n):
    """KV blocks that the next `n` iterations of the running jump take."""
    c, e = s.cluster[0], s.engines[r]
    period = c.block_tokens
    need = (n >> c.shift) * e.n_decode
    for k in range(n & ~(period - 1), n):
        need += s.phase[r, (e.counter + k) & (period - 1)]
    if e.chunk > 0:
        computed = s.sequences[e.partial].computed
        need += blocks_for(c, computed + n * e.chunk) - blocks_for(c, computed)
    return need


@inner(inline=True)
def cache(s, a, r, i, upto):
    """Let the cache own the sequence's full prefix blocks before index `upto`; it references them."""
    q = s.sequences[i]
    if upto > q.held:
        node, held, shared = prefixes.extend(
            tree_of(s, a, r), s.blocks, s.requests[q.request].block_start, q.node, q.held, upto
        )
        q.node, q.held = node, held
        s.engines[r].free_blocks += shared * s.cluster[0].per_prefix


@inner(inline=True)
def release(s, a, r, i, tokens):
    """Give back the KV of a sequence that holds `tokens` computed tokens: its own blocks, and its references."""
    q, c = s.sequences[i], s.cluster[0]
    s.engines[r].free_blocks += blocks_for(c, tokens) - q.held * c.per_prefix
    prefixes.release(tree_of(s, a, r), q.node)
    q.held, q.node = 0, -1
