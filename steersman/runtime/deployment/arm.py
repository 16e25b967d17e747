"""What is counted of one deployed policy since it took its place: its decisions, and how their requests fared."""

from __future__ import annotations

from collections import Counter
from typing import Literal, NoReturn

import numpy as np

from steersman.runtime.deployment.release import Release
from steersman.runtime.deployment.times import Times
from steersman.runtime.ticket import Fallback

Role = Literal["current", "canary"]


def _retired(rows: np.ndarray, mask: np.ndarray) -> NoReturn:
    raise RuntimeError("a retired arm decides nothing")


class Arm:
    """A release that decides requests, and the counts of them. A request belongs to the arm that decided it last."""

    __slots__ = (
        "attained",
        "decisions",
        "earlier",
        "ended",
        "errors",
        "failures_in_a_row",
        "fallbacks",
        "last_failure",
        "name",
        "role",
        "score",
        "times",
        "version",
    )

    def __init__(self, role: Role, release: Release) -> None:
        self.role: Role = role
        # Looked up once, for the sake of the fast path.
        self.score, self.name, self.version = release.policy.score, release.policy.name, release.version
        self.decisions = 0
        self.fallbacks: Counter[Fallback] = Counter()
        self.failures_in_a_row = 0
        self.last_failure = ""
        self.times = Times()
        self.ended = 0  # requests that are over: served, failed, shed or given up
        self.attained = 0  # of these, met both SLOs
        self.errors = 0  # of these, failed: no replica answered them whole
        self.earlier: Arm | None = None  # of the same policy, and no longer kept: its counts go on

    def retire(self) -> None:
        """It decides no more, and lets go of its policy; requests that it decided are still counted."""
        self.score = _retired

    def absorb(self, other: Arm) -> None:
        """Count what `other` has counted as well."""
        self.decisions += other.decisions
        self.fallbacks.update(other.fallbacks)
        self.times.merge(other.times)
        self.ended += other.ended
        self.attained += other.attained
        self.errors += other.errors

    @property
    def failure_rate(self) -> float:
        """Share of its decisions that fell back, but for those where what it was shown is to blame."""
        failures = sum(self.fallbacks.values()) - self.fallbacks[Fallback.RANGE]
        return failures / self.decisions if self.decisions else 0.0

    def failed(self, reason: Fallback, said: str) -> None:
        """The fallback decided in place of this policy."""
        self.fallbacks[reason] += 1
        if reason is not Fallback.RANGE:
            self.failures_in_a_row += 1
            self.last_failure = said or reason.value

    def over(self, attained: bool, failed: bool) -> None:
        """A request is over."""
        self.ended += 1
        self.attained += attained
        self.errors += failed
