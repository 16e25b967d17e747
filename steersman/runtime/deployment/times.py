"""Times of decisions as a histogram: cheap enough to be filled at every decision."""

from __future__ import annotations

from bisect import bisect_left

# Upper bounds in seconds; one more bucket holds what takes longer.
BOUNDS_S = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.1)


class Times:
    """A histogram of times in seconds: `counts` of each bucket of `BOUNDS_S` and one above, and their `sum_s`."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def merge(self, other: Times) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s

    @property
    def count(self) -> int:
        return sum(self.counts)

    def percentile(self, share: float) -> float:
        """Seconds that `share` of the times do not exceed, interpolated within a bucket; 0 if there are none."""
        left = share * self.count
        if not left:
            return 0.0
        low = 0.0
        for bound, count in zip(BOUNDS_S, self.counts, strict=False):
            if count >= left:
                return low + (bound - low) * left / count
            left, low = left - count, bound
        return low
