"""Whether this process stood still for a while: frozen, starved, or on a machine that was moved."""

from __future__ import annotations

import asyncio
import math

BEAT_S = 0.25
STILL_S = 1.0  # a beat that is so late


class Pulse:
    """Beats as long as the event loop turns. Timers that ran out meanwhile prove nothing of anybody else."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._still_until_s = -math.inf
        self._next = self._loop.call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        now = self._loop.time()
        if now - self._last_s > BEAT_S + STILL_S:
            self._still_until_s = now
        self._last_s = now
        self._next = self._loop.call_later(BEAT_S, self._beat)

    def stopped_since(self, when_s: float) -> bool:
        """Whether the loop stood still at some time after `when_s`, of its clock."""
        return self._still_until_s > when_s

    def close(self) -> None:
        self._next.cancel()
