"""Numbers as columns of bytes that compress: the same place of all rows together, and only what changed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from steersman.runtime.compiled import njit


def planes(array: np.ndarray, item: int) -> np.ndarray:
    """Rows `array` (n, …) as uint8 (item, k, n): byte b of item i of every row, XORed with that of the row before.

    item: bytes of a number, 1 or 4. A row has k of them, whatever the array's own type: records may be taken
    byte by byte.
    """
    n = len(array)
    if not array.size:
        return np.zeros((item, 0, n), np.uint8)
    if item == 4:
        numbers = array.view(np.uint32)
        return _planes(numbers.reshape(n, 1, -1) if numbers.ndim < 3 else numbers)
    turned = np.ascontiguousarray(array.reshape(n, -1).view(np.uint8).T)
    changed = turned.copy()
    changed[:, 1:] ^= turned[:, :-1]
    return changed[None]


_STRIDED = types.Array(types.uint32, 3, "A", readonly=True)
_TILE = 64  # rows that are turned at once: a line of the cache of each column, however many columns


@njit(types.uint8[:, :, ::1](_STRIDED))
def _planes(numbers):  # type: ignore[no-untyped-def]
    """`planes` of (n, groups, width) in one pass: numpy would copy it four times."""
    n, groups, width = numbers.shape
    stored = np.empty((4, groups * width, n), np.uint8)
    for first in range(0, n, _TILE):
        last = min(first + _TILE, n)
        for g in range(groups):
            for j in range(width):
                column = g * width + j
                before = numbers[first - 1, g, j] if first else np.uint32(0)
                for i in range(first, last):
                    now = numbers[i, g, j]
                    x = now ^ before
                    before = now
                    stored[0, column, i] = x & 255
                    stored[1, column, i] = (x >> 8) & 255
                    stored[2, column, i] = (x >> 16) & 255
                    stored[3, column, i] = x >> 24
    return stored


def rows(stored: np.ndarray, dtype: Any, shape: tuple[int, ...] = ()) -> np.ndarray:
    """What `planes` was made of: an array (n, *shape) of `dtype`, the same bytes.

    Raises:
        ValueError: it does not have that size.
    """
    dtype = np.dtype(dtype)
    item, _, n = stored.shape
    if not n or not stored.size:
        return np.zeros((n, *shape), dtype)
    changed = np.ascontiguousarray(np.moveaxis(stored, 0, -1)).reshape(stored.shape[1], -1).view(f"<u{item}")
    turned = np.bitwise_xor.accumulate(changed, axis=1)
    return np.ascontiguousarray(turned.T).view(np.uint8).reshape(-1).view(dtype).reshape(n, *shape)


@njit("Tuple((i8[::1], u4[::1]))(i8[::1])")
def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different `keys` (n,) in order of their first appearance, int64 (u,), and each key's place there (n,).

    In this order, prompts that begin alike have the same consecutive places, which compress to nothing.
    """
    bits = 4
    while (1 << bits) < 2 * len(keys):
        bits += 1
    table = np.full(1 << bits, -1, np.int32)
    found, places, count = np.empty(len(keys), np.int64), np.empty(len(keys), np.uint32), 0
    last = (1 << bits) - 1
    for i in range(len(keys)):
        key = keys[i]
        slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))
        while table[slot] >= 0 and found[table[slot]] != key:
            slot = (slot + 1) & last
        if table[slot] < 0:
            table[slot], found[count] = count, key
            count += 1
        places[i] = table[slot]
    return found[:count].copy(), places
