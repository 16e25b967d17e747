"""Identities of prefix blocks.

Within a stream, a chain is a text that requests share up to some length; block k of a chain has the identity
`chain << 20 | k`, so that equal identities mean equal prefixes without any hashing.
"""

from __future__ import annotations

import numpy as np

POSITION_BITS = 20  # 10 million tokens in blocks of 16 are 625,000 positions
_MASK = np.uint64((1 << 63) - 1)


def chained(
    count: np.ndarray, shared: np.ndarray | int, shared_chain: np.ndarray | int, own_chain: np.ndarray
) -> np.ndarray:
    """Identities of `count` (n,) blocks for each request, joined: int64 (sum of count,).

    The first `shared` of them are of `shared_chain`, the others of `own_chain`.
    """
    n = len(count)
    lengths, chains = np.empty((n, 2), np.int64), np.empty((n, 2), np.int64)
    lengths[:, 0] = np.minimum(shared, count)
    lengths[:, 1] = count - lengths[:, 0]
    chains[:, 0], chains[:, 1] = shared_chain, own_chain
    # One subtraction gives the position: each request's blocks start at 0 again.
    starts = np.cumsum(count) - count
    offset = (chains << POSITION_BITS) - starts[:, None]
    joined = np.repeat(offset.ravel(), lengths.ravel())
    joined += np.arange(len(joined))
    return joined


def separate(blocks: np.ndarray, seed: int) -> np.ndarray:
    """`blocks` (int64, not negative) moved by `seed`, so that episodes do not share prefixes.

    A bijection of 63-bit numbers (addition, xor-shifts, and a product with an odd number, as in SplitMix64):
    different blocks stay different.
    """
    salt = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    x = blocks.astype(np.uint64)
    x += salt
    x &= _MASK
    x ^= x >> np.uint64(31)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x &= _MASK
    x ^= x >> np.uint64(29)
    return x.view(np.int64)
