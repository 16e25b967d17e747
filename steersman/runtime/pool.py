"""Where a live router keeps the identities of prefix blocks: an array that grows at its end and is compacted."""

from __future__ import annotations

import numpy as np

from steersman.runtime import bookkeeping, prefixes, radix
from steersman.runtime.bookkeeping import Bookkeeping
from steersman.runtime.compiled import njit


class Pool:
    """The pool of `prefixes` for the beliefs of one `Bookkeeping`; `blocks` int64 has its identities up to `end`."""

    def __init__(self, book: Bookkeeping, room: int = 1 << 16) -> None:
        """room: identities that fit before the first compaction."""
        self._book = book
        self.blocks, self.end = np.zeros(room, np.int64), 0

    def stage(self, keys: np.ndarray) -> int:
        """Write `keys` behind the end, where the next `stage` overwrites them unless they are kept. Returns where."""
        if self.end + len(keys) > len(self.blocks):
            self._compact(len(keys))
        self.blocks[self.end : self.end + len(keys)] = keys
        return self.end

    def keep(self, count: int) -> None:
        """The first `count` keys that were staged last stay."""
        self.end += count

    def _compact(self, more: int) -> None:
        """Keep what some replica is believed to cache, and have room for as much again and `more`."""
        used = sum(_size(self._book, r) for r in range(len(self._book.views)))
        kept = np.zeros(max(len(self.blocks), 2 * used + more), np.int64)
        self.end = _move(self._book, self.blocks, kept)
        self.blocks = kept


@njit
def _size(book: Bookkeeping, r: int) -> int:
    return radix.head(bookkeeping.belief(book, r)).size


@njit
def _move(book: Bookkeeping, source: np.ndarray, target: np.ndarray) -> int:
    end = 0
    for r in range(len(book.views)):
        end = prefixes.move(bookkeeping.belief(book, r), source, target, end)
    return end
