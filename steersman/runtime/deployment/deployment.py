"""Who decides a request: the current policy or a canary, the fallback where it fails; a shadow looks on."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from steersman.runtime.deployment.arm import Arm
from steersman.runtime.deployment.ask import ask
from steersman.runtime.deployment.canary import Canary, CanaryBounds
from steersman.runtime.deployment.judge import choose
from steersman.runtime.deployment.release import Release, release_of
from steersman.runtime.deployment.shadow import Later, Shadow
from steersman.runtime.errors import UserError
from steersman.runtime.policy import Policy
from steersman.runtime.ticket import Fallback, Ticket

LIMIT_S = 1e-3
PREDECESSORS = 8  # that `rollback` can go back to
ARMS = 32  # whose counts are kept
EVENTS = 50
_array = np.ascontiguousarray


class Choice(NamedTuple):
    """What a policy chose."""

    candidate: int  # −1: not even the fallback could choose
    policy: str
    version: str
    arm: str
    decision_s: float  # that the policy, not the fallback, took
    fallback: Fallback | None
    scores: np.ndarray | None  # float64 (C,): of the one that chose


class Event(NamedTuple):
    """Something changed."""

    at_unix_s: float
    sentence: str


class Deployment:
    """The policies of one scheduler. Every change is a plain one between two decisions: no request waits for it.

    current, fallback: policies, or releases of them. rows float32 (C, WIDTH), mask bool (C,): where the scheduler
    writes what is to be decided. limit_s: a policy that takes longer does not decide. told: gets one sentence for each
    change.
    """

    def __init__(
        self,
        current: Policy | Release,
        fallback: Policy | Release,
        rows: np.ndarray,
        mask: np.ndarray,
        limit_s: float = LIMIT_S,
        told: Callable[[str, str], object] = lambda _event, _sentence: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limit_s = limit_s
        self.told = told
        # How a shadow's work is put off until the decision is out; a gateway sets `loop.call_soon`.
        self.later: Later = lambda work: work()
        self.fallback = release_of(fallback)
        self.predecessors: list[Release] = []  # the last one was current before
        self.shadow: Shadow | None = None
        self.canary: Canary | None = None
        self.decisions = 0
        self.fallbacks: Counter[Fallback] = Counter()
        self.changes: Counter[str] = Counter()
        self.events: deque[Event] = deque(maxlen=EVENTS)
        self.arms: deque[Arm] = deque()  # the last ARMS, those in use included
        self._rows, self._mask = rows, mask
        self._clock = clock
        self._warm(self.fallback)
        self.current = release_of(current)
        self._warm(self.current)
        self._arm = self._counted(Arm("current", self.current))

    @property
    def current_arm(self) -> Arm:
        """The counts of the current policy since it, or the canary beside it, was deployed."""
        return self._arm

    # Decisions

    def decide(self, ticket: Ticket) -> Choice:
        """Who decides `ticket`, as rows and mask show it, and what."""
        arm = self._arm if self.canary is None else self._arm_of(ticket, self.canary)
        ticket.arm = arm
        started = self._clock()
        candidate, scores, failure, said = ask(arm.score, (self._rows, self._mask), self._rows, self._mask)
        elapsed = self._clock() - started
        if failure is None and elapsed > self.limit_s:
            failure, said = Fallback.SLOW, f"slow ({1e3 * elapsed:.2g} ms)"
        self.decisions += 1
        arm.decisions += 1
        arm.times.add(elapsed)
        if failure is None:
            arm.failures_in_a_row = 0
            choice = Choice(candidate, arm.name, arm.version, arm.role, elapsed, None, scores)
        else:
            choice = self._fall_back(arm, elapsed, failure, said)
        if self.shadow is not None:
            self.shadow.show(self._rows, self._mask, choice.candidate)
        return choice

    def _arm_of(self, ticket: Ticket, canary: Canary) -> Arm:
        """A request that is decided anew stays with the policy that had it."""
        before = ticket.arm
        if before is None:
            return canary.arm if canary.takes_next() else self._arm
        return canary.arm if before.role == "canary" and before.version == canary.arm.version else self._arm

    def _fall_back(self, arm: Arm, elapsed: float, failure: Fallback, said: str) -> Choice:
        self.fallbacks[failure] += 1
        arm.failed(failure, said)
        if self.canary is not None and arm is self.canary.arm:
            why = self.canary.after_failure()
            if why is not None:
                self._take_back(self.canary, why)
        policy, version, _ = self.fallback
        try:
            scores = _array(policy.score(self._rows, self._mask), np.float64)
            candidate = choose(scores, self._mask) if scores.shape == self._mask.shape else -1
        except Exception:  # then not even this one; the caller knows what is left
            candidate = -1
        if candidate < 0:
            return Choice(-1, "", "", arm.role, elapsed, failure, None)
        return Choice(candidate, policy.name, version, arm.role, elapsed, failure, scores)

    def over(self, ticket: Ticket, attained: bool, failed: bool) -> None:
        """A request is over. attained: it met both SLOs; failed: no replica answered it whole."""
        arm = ticket.arm
        if arm is None:  # it was never decided
            return
        arm.over(attained, failed)
        canary = self.canary
        if canary is not None and arm is canary.arm:
            why = canary.after_end()
            if why is not None:
                self._take_back(canary, why)

    # Changes

    def activate(self, release: Release) -> None:
        """`release` decides from now on. A canary goes on, compared with it from now on; unless it is `release`."""
        before = self.current
        self.predecessors = [*self.predecessors, before][-PREDECESSORS:]
        self._replace(release)
        self.say("activated", f"{release.version} decides, in place of {before.version}")

    def rollback(self) -> Release:
        """The predecessor decides again. Returns it.

        Raises:
            UserError: there is none.
        """
        if not self.predecessors:
            raise UserError(f"nothing to roll back to: {self.current.version} has no predecessor")
        before = self.current
        self._replace(self.predecessors.pop())
        self.say("rolled_back", f"{self.current.version} decides again, {before.version} was rolled back")
        return self.current

    def promote(self) -> Release:
        """The canary becomes the current policy. Returns it.

        Raises:
            UserError: there is none.
        """
        if self.canary is None:
            raise UserError("there is no canary to promote; push one with `steersman policy push BUNDLE --as canary`")
        release, before = self.canary.release, self.current
        self.predecessors = [*self.predecessors, before][-PREDECESSORS:]
        self._replace(release)
        self.say("promoted", f"the canary {release.version} decides all requests, in place of {before.version}")
        return release

    def start_canary(self, release: Release, share: float, bounds: CanaryBounds | None = None) -> None:
        """`release` decides a `share` of the requests, in place of an earlier canary.

        Raises:
            UserError: the share is not above 0 and at most 1.
        """
        if not 0.0 < share <= 1.0:
            raise UserError(f"a canary's share must be above 0 and at most 1, got {share:g}")
        self._warm(release)
        self._compare(release, share, bounds or CanaryBounds())
        self.say("canary_started", f"{release.version} decides {share:.3g} of the requests as a canary")

    def stop_canary(self) -> Release:
        """The current policy decides all requests. Returns what was the canary.

        Raises:
            UserError: there is none.
        """
        if self.canary is None:
            raise UserError("there is no canary")
        release = self._end_canary(self.canary)
        self.say("canary_stopped", f"the canary {release.version} was stopped")
        return release

    def start_shadow(self, release: Release) -> None:
        """`release` scores every request without deciding, in place of an earlier shadow."""

        def switched_off(why: str) -> None:
            self.say("shadow_switched_off", f"the shadow {release.version} was switched off: {why}")

        self.shadow = Shadow(
            release, self._rows, self._mask, self.limit_s, lambda work: self.later(work), switched_off, self._clock
        )
        self.say("shadow_started", f"{release.version} scores every request as a shadow")

    def stop_shadow(self) -> Release:
        """Nobody looks on. Returns what was the shadow.

        Raises:
            UserError: there is none.
        """
        if self.shadow is None:
            raise UserError("there is no shadow")
        release, self.shadow = self.shadow.release, None
        self.say("shadow_stopped", f"the shadow {release.version} was stopped")
        return release

    def say(self, kind: str, sentence: str) -> None:
        """Count something that happened to the policies, under `kind`, and tell it."""
        self.changes[kind] += 1
        self.events.append(Event(time.time(), sentence))
        with contextlib.suppress(Exception):  # no request fails because nobody can be told
            self.told(kind, sentence)

    def _take_back(self, canary: Canary, why: str) -> None:
        self._end_canary(canary)
        self.say("canary_rolled_back", f"the canary {canary.release.version} was rolled back: {why}")

    def _end_canary(self, canary: Canary) -> Release:
        canary.arm.retire()
        self.canary = None
        return canary.release

    def _replace(self, release: Release) -> None:
        """Make `release` current, and let a canary that is another policy go on beside it."""
        self._warm(release)
        canary, self.current = self.canary, release
        self._count_anew()
        if canary is not None:
            self._end_canary(canary)
            if canary.release.version != release.version:
                self._compare(canary.release, canary.share, canary.bounds)

    def _compare(self, release: Release, share: float, bounds: CanaryBounds) -> None:
        """A canary beside the current policy, whose counts begin anew: both are measured over the same time."""
        if self.canary is not None:
            self._end_canary(self.canary)
        self._count_anew()
        self.canary = Canary(release, self._counted(Arm("canary", release)), self._arm, share, bounds)

    def _count_anew(self) -> None:
        self._arm.retire()
        self._arm = self._counted(Arm("current", self.current))

    def _counted(self, arm: Arm) -> Arm:
        if len(self.arms) == ARMS:  # the totals of a policy that goes on must not fall
            oldest = self.arms.popleft()
            heir = next((a for a in (*self.arms, arm) if (a.version, a.role) == (oldest.version, oldest.role)), None)
            if heir is not None:
                if oldest.earlier is not None:
                    oldest.absorb(oldest.earlier)
                    oldest.earlier = None
                heir.earlier = oldest
        self.arms.append(arm)
        return arm

    def _warm(self, release: Release) -> None:
        """The first scores take longer, of compiled code and of an ONNX graph: no request waits for them."""
        try:
            release.policy.score(self._rows, self._mask)
        except Exception:  # it is counted when a request is decided
            return
