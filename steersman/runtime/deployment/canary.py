"""A canary: a policy that decides a share of the requests, and is taken back when it does worse than the current one.

Which requests: those for which the fractional part of n·φ (φ the golden ratio, n the request's number) is below the
share. The sequence is even over any stretch of requests, and in step with no period of theirs.

When it is taken back: see `CanaryBounds`. Attainment and errors are compared by a one-sided test of two proportions
(Wald, each with one success and one failure added: Agresti and Caffo, 2000) on the last requests of both arms.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import NormalDist
from typing import NamedTuple

from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.deployment.arm import Arm
from steersman.runtime.deployment.release import Release

CHECK_EVERY = 50  # ended requests of the canary
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


class CanaryBounds(Model):
    """What a canary must keep, or it is taken back."""

    least_requests: int = Field(default=200, ge=20, description="ended requests of each arm before it is judged")
    confidence: float = Field(default=0.99, gt=0.5, lt=1, description="of the tests of attainment and errors")
    max_attainment_loss: float = Field(default=0.02, ge=0, le=1, description="against the current policy")
    max_error_rise: float = Field(default=0.01, ge=0, le=1, description="share of failed requests, likewise")
    max_fallback_rise: float = Field(default=0.01, ge=0, le=1, description="share of failed decisions, likewise")
    max_decision_s: float = Field(default=5e-4, gt=0, description="median time of its decisions")
    max_failures_in_a_row: int = Field(default=20, ge=1, description="from the first decision on")
    memory_requests: int = Field(default=4000, ge=100, description="older requests of the canary do not count")


class _Mark(NamedTuple):
    """Counts of both arms at some time: what came since is a difference."""

    ended: int
    attained: int
    errors: int
    baseline_ended: int
    baseline_attained: int
    baseline_errors: int


class Canary:
    """A canary and the arm of the current policy that it is compared with, both counted from the same time on."""

    def __init__(self, release: Release, arm: Arm, baseline: Arm, share: float, bounds: CanaryBounds) -> None:
        self.release = release
        self.arm = arm
        self.baseline = baseline
        self.share = share
        self.bounds = bounds
        self._point = 0.5
        self._marks: deque[_Mark] = deque([_Mark(0, 0, 0, 0, 0, 0)], maxlen=2)

    def takes_next(self) -> bool:
        """Whether the next new request is the canary's."""
        self._point = (self._point + GOLDEN) % 1.0
        return self._point < self.share

    def after_failure(self) -> str | None:
        """Why it is taken back, now that it failed to decide; None while it is not."""
        arm, bounds = self.arm, self.bounds
        if arm.failures_in_a_row >= bounds.max_failures_in_a_row:
            return f"{arm.failures_in_a_row} decisions in a row failed, at last: {arm.last_failure}"
        rate, usual = arm.failure_rate, self.baseline.failure_rate  # a busy machine makes every policy slow
        if arm.decisions >= bounds.least_requests and rate > usual + bounds.max_fallback_rise:
            return (
                f"{rate:.1%} of {arm.decisions} decisions failed, but of {self.baseline.version} {usual:.1%}: "
                f"more than {bounds.max_fallback_rise:.1%} worse, at last: {arm.last_failure}"
            )
        return None

    def after_end(self) -> str | None:
        """Why it is taken back, now that one of its requests is over; looks at it after every `CHECK_EVERY`."""
        if self.arm.ended % CHECK_EVERY:
            return None
        median_s = self.arm.times.percentile(0.5)
        if self.arm.decisions >= self.bounds.least_requests and median_s > self.bounds.max_decision_s:
            return (
                f"its median decision takes {1e6 * median_s:.0f} µs, more than {1e6 * self.bounds.max_decision_s:.0f}"
            )
        recent = self._recent()
        if min(recent.ended, recent.baseline_ended) < self.bounds.least_requests:
            return None
        return self._less_attained(recent) or self._more_errors(recent)

    def _recent(self) -> _Mark:
        arm, base = self.arm, self.baseline
        now = _Mark(arm.ended, arm.attained, arm.errors, base.ended, base.attained, base.errors)
        if now.ended - self._marks[-1].ended >= self.bounds.memory_requests // 2:
            self._marks.append(now)
        return _Mark(*(later - earlier for later, earlier in zip(now, self._marks[0], strict=True)))

    def _less_attained(self, r: _Mark) -> str | None:
        loss = self.bounds.max_attainment_loss
        z = _excess_z(r.baseline_attained, r.baseline_ended, r.attained, r.ended, loss)
        if z <= self._critical_z:
            return None
        return (
            f"it attained {r.attained / r.ended:.1%} of its last {r.ended} requests, but "
            f"{self.baseline.version} {r.baseline_attained / r.baseline_ended:.1%} of {r.baseline_ended}: "
            f"more than {loss:.1%} lost (z = {z:.1f})"
        )

    def _more_errors(self, r: _Mark) -> str | None:
        rise = self.bounds.max_error_rise
        z = _excess_z(r.errors, r.ended, r.baseline_errors, r.baseline_ended, rise)
        if z <= self._critical_z:
            return None
        return (
            f"{r.errors / r.ended:.1%} of its last {r.ended} requests failed, but of {self.baseline.version} "
            f"{r.baseline_errors / r.baseline_ended:.1%} of {r.baseline_ended}: more than {rise:.1%} worse "
            f"(z = {z:.1f})"
        )

    @property
    def _critical_z(self) -> float:
        return NormalDist().inv_cdf(self.bounds.confidence)


def _excess_z(more: int, more_of: int, less: int, less_of: int, margin: float) -> float:
    """By how many standard errors more/more_of exceeds less/less_of + margin."""
    p, n = (more + 1) / (more_of + 2), more_of + 2
    q, m = (less + 1) / (less_of + 2), less_of + 2
    return (p - q - margin) / math.sqrt(p * (1 - p) / n + q * (1 - q) / m)
