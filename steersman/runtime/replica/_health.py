"""Whether a replica gets requests: a circuit breaker, and a slow start after it was away.

up ───────failures──────► open ──backoff over, and healthy──► ramping ──nothing failed──► up
                            ▲──────── one failure ───────────────┘
"""

from __future__ import annotations

import math
from enum import StrEnum

from pydantic import Field

from steersman.runtime.config import Model


class HealthConfig(Model):
    """How replicas are watched."""

    scrape_s: float = Field(default=0.5, gt=0, description="between two readings of a replica's metrics")
    recheck_s: float = Field(
        default=1.0, gt=0, description="between two looks at a replica that is down or has no metrics"
    )
    failures_to_open: int = Field(
        default=3, ge=1, description="failed attempts that open the breaker; two answers make up for one"
    )
    backoff_s: float = Field(default=1.0, gt=0, description="first time that it stays open; doubles each time")
    backoff_max_s: float = Field(default=30.0, gt=0)
    ramp_s: float = Field(default=10.0, ge=0, description="of slow start after it was away")
    read_timeout_s: float = Field(default=300.0, gt=0, description="longest silence of a replica that owes an answer")
    down_timeout_s: float = Field(
        default=30.0, gt=0, description="longest silence in the middle of an answer while the replica is down"
    )


class Status(StrEnum):
    """What a replica is to the gateway."""

    UP = "up"
    DOWN = "down"  # not healthy
    OPEN = "open"  # its breaker is: requests to it failed
    RAMPING = "ramping"
    DRAINING = "draining"


class Health:
    """The breaker and slow start of one replica with `slots` (max_num_seqs). Times are any steady clock's, seconds."""

    def __init__(self, config: HealthConfig, slots: int) -> None:
        self._config, self._slots = config, slots
        self.draining = False  # an operator takes it out
        self.healthy = True  # as of the last look
        self._failures = 0.0
        self._opened = 0  # times in a row
        self._open_until_s = -math.inf
        self._ramp_from_s = -math.inf
        self._away_s = -math.inf  # when it was last taken out: what was sent before says nothing new

    def failed(self, now: float, sent_s: float) -> None:
        """An attempt that was sent at `sent_s` failed: no connection, no answer, 5xx, or an answer that broke off."""
        if sent_s < self._away_s:  # one replica that dies fails all that it holds, but only once
            return
        self._failures += 1.0
        if self._failures >= self._config.failures_to_open or self._ramping(now):
            self._opened += 1
            wait_s = min(self._config.backoff_max_s, self._config.backoff_s * 2.0 ** (self._opened - 1))
            self._away(now, now + wait_s)

    def cool(self, now: float, seconds: float) -> None:
        """It asked to be left alone for a while (429 with Retry-After). That is no failure, and makes up for none."""
        self._rest(now, now + min(60.0, max(0.0, seconds)))

    def answered(self, now: float, sent_s: float) -> None:
        """It answered, in full, a request that was sent at `sent_s`."""
        if sent_s < self._away_s:
            return
        # It fails some kinds of requests and not others, or every other one: none is forgotten at once.
        self._failures = max(0.0, self._failures - 0.5)
        if now >= self._ramp_from_s + self._config.ramp_s:
            self._opened = 0

    def looked(self, now: float, healthy: bool) -> None:
        """It was asked whether it is well."""
        if healthy and not self.healthy:
            self._away(now, now)
        self.healthy = healthy

    def _away(self, now: float, until_s: float) -> None:
        self._failures, self._away_s = 0.0, now
        self._rest(now, until_s)

    def _rest(self, now: float, until_s: float) -> None:
        self._open_until_s = max(self._open_until_s, until_s)
        self._ramp_from_s = max(now, self._open_until_s)

    def _ramping(self, now: float) -> bool:
        return self._ramp_from_s <= now < self._ramp_from_s + self._config.ramp_s

    def status(self, now: float) -> Status:
        if self.draining:
            return Status.DRAINING
        if not self.healthy:
            return Status.DOWN
        if now < self._open_until_s:
            return Status.OPEN
        return Status.RAMPING if self._ramping(now) else Status.UP

    def cap(self, now: float) -> float:
        """Requests that it may have in flight: while it ramps, from one up to its slots; else any number."""
        if not self._ramping(now):
            return math.inf
        return 1.0 + self._slots * (now - self._ramp_from_s) / self._config.ramp_s
