"""A shadow: a policy that scores every request without deciding, and what its choices would have changed."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from steersman.runtime.deployment.ask import ask
from steersman.runtime.deployment.release import Release
from steersman.runtime.deployment.times import Times
from steersman.runtime.observation import COLUMN
from steersman.runtime.ticket import Fallback

MOST_WAITING = 64  # situations that it has not scored yet; more are skipped
FAILURES_TO_OFF = 20  # in a row
_TTFT, _TPOT = COLUMN["ttft_chance"], COLUMN["tpot_chance"]

Later = Callable[[Callable[[], None]], object]


class _Situation(NamedTuple):
    rows: np.ndarray
    mask: np.ndarray
    choice: int


class Shadow:
    """A release that is shown copies of what was decided on; rows (C, WIDTH) and mask (C,) give their size.

    It scores them when `later` calls back: in an event loop (`loop.call_soon`) after the decision went out, or at
    once. Whatever it does with its copies, no decision changes. After 20 failures or slow scores in a row it is
    switched off: `off` says why.

    predicted gain: the predicted chance to meet both SLOs (ttft_chance · tpot_chance) of its choice less that of the
    real one; a shed request has none. Where one of the two holds the request, neither is known, and it is not counted.
    """

    def __init__(
        self,
        release: Release,
        rows: np.ndarray,
        mask: np.ndarray,
        limit_s: float,
        later: Later,
        switched_off: Callable[[str], object] = lambda _why: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.release = release
        self.decisions = 0  # scored
        self.disagreements = 0
        self.compared = 0  # of the decisions: those that predicted gain is counted of
        self.gain = 0.0  # sum of predicted gains, in requests
        self.failures: Counter[Fallback] = Counter()
        self.skipped = 0  # too many were waiting
        self.last_failure = ""
        self.times = Times()
        self.off = ""
        self._limit_s = limit_s
        self._later = later
        self._switched_off = switched_off
        self._clock = clock
        self._waiting: deque[_Situation] = deque()
        self._rows, self._mask = rows.copy(), mask.copy()  # one memory for all: the cheapest for an ONNX graph
        self._failures_in_a_row = 0
        with contextlib.suppress(Exception):  # it is counted when a request is decided
            release.policy.score(self._rows, self._mask)  # the first scores take longer

    def show(self, rows: np.ndarray, mask: np.ndarray, choice: int) -> None:
        """A decision was taken: `choice` in `rows` float32 (C, WIDTH) under `mask` bool (C,)."""
        if self.off:
            return
        if len(self._waiting) >= MOST_WAITING:
            self.skipped += 1
            return
        self._waiting.append(_Situation(rows.copy(), mask.copy(), choice))
        if len(self._waiting) == 1:
            self._later(self._work)

    def _work(self) -> None:
        """Score one situation: what else waits in the event loop comes between two of them."""
        situation = self._waiting.popleft()
        if not self.off:
            self._score(situation)
        if self._waiting:
            self._later(self._work)

    def _score(self, situation: _Situation) -> None:
        self._rows[:], self._mask[:] = situation.rows, situation.mask
        started = self._clock()
        choice, _, failure, said = ask(
            self.release.policy.score, (self._rows, self._mask), situation.rows, situation.mask
        )
        elapsed = self._clock() - started
        self.times.add(elapsed)
        if failure is None and elapsed > self._limit_s:
            self._failed(Fallback.SLOW, f"slow ({1e3 * elapsed:.2g} ms)")
        elif failure is not None:
            self._failed(failure, said)
        else:
            self._failures_in_a_row = 0
        if choice >= 0:
            self._compare(situation, choice)

    def _failed(self, reason: Fallback, said: str) -> None:
        self.failures[reason] += 1
        if reason is Fallback.RANGE:
            return
        self._failures_in_a_row += 1
        self.last_failure = said or reason.value
        if self._failures_in_a_row >= FAILURES_TO_OFF:
            self.off = f"{self._failures_in_a_row} decisions in a row failed, at last: {self.last_failure}"
            self._switched_off(self.off)

    def _compare(self, situation: _Situation, choice: int) -> None:
        self.decisions += 1
        self.disagreements += choice != situation.choice
        hold = len(situation.mask) - 2
        if hold in (choice, situation.choice):
            return
        self.compared += 1
        if choice != situation.choice:
            self.gain += _chance(situation.rows, choice) - _chance(situation.rows, situation.choice)


def _chance(rows: np.ndarray, choice: int) -> float:
    """That the request meets both SLOs, as predicted; that of shed is 0."""
    return float(rows[choice, _TTFT]) * float(rows[choice, _TPOT])
