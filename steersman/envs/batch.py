"""Many simulated clusters, stepped in one compiled call."""

from __future__ import annotations

import numpy as np

from steersman.envs.reward import REWARD, Reward
from steersman.runtime.compiled import address_of, caller, carray, njit, pointer
from steersman.runtime.fleet import Fleet
from steersman.runtime.observation import WIDTH
from steersman.runtime.outcomes import Episode
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime, kernel
from steersman.runtime.simulator.state import open_state

_SHED = int(RequestState.SHED)


_call_worth = caller(REWARD)


@njit(nogil=False)  # one step is too short to let go of the lock for
def step(a, worth, action):  # type: ignore[no-untyped-def]
    """Step cluster `a`; `worth` is the address of a reward. Returns (whether a decision is due, reward, seconds).

    The observation is zero where no decision is due.
    """
    due = kernel.step(a, action, 1)
    s, total = open_state(a), 0.0
    c = s.cluster[0]
    for k in range(c.n_ended):
        o = s.outcomes[s.ended[k]]
        p = s.tenants[s.requests[s.ended[k]].tenant]
        attained, shed = 1.0 if o.attained else 0.0, 1.0 if o.state == _SHED else 0.0
        total += _call_worth(worth, (attained, shed, o.ttft_s, o.tpot_s, p.ttft_slo_s, p.tpot_slo_s, p.weight))
    if not due:
        rows = carray(pointer(c.p_rows), (c.n_candidates * WIDTH,), np.float32)
        rows[:] = 0.0
    return due != 0, total, c.now


@njit
def _step_all(addresses, actions, worth, rewards, due):  # type: ignore[no-untyped-def]
    for b in range(len(addresses)):
        due[b], rewards[b], _ = step(addresses[b], worth, actions[b])


class Batch:
    """B clusters of one fleet, each playing an episode of its own.

    rows float32 (B, C, WIDTH), masks bool (B, C), rewards float64 (B,) and due bool (B,) hold what the last `step`
    gave; rows of a cluster whose episode is over are zero.
    """

    def __init__(self, size: int, fleet: Fleet, candidates: int, reward: Reward) -> None:
        self.rows = np.zeros((size, candidates, WIDTH), np.float32)
        self.masks = np.zeros((size, candidates), np.bool_)
        self.rewards, self.due = np.zeros(size), np.zeros(size, np.bool_)
        reasons = np.zeros((size, candidates), np.int8)
        self.runtimes = [
            SimulatedRuntime(fleet, candidates, into=arrays)
            for arrays in zip(self.rows, self.masks, reasons, strict=True)
        ]
        self._addresses = np.zeros(size, np.int64)
        self._worth = address_of(reward.worth, REWARD)

    def reset(self, index: int, requests: Requests) -> None:
        """Start an episode, of at least one request, on cluster `index`, and observe its first decision."""
        runtime = self.runtimes[index]
        runtime.reset(requests)
        runtime.advance()
        self._addresses[index] = runtime.address

    def step(self, actions: np.ndarray) -> None:
        """Apply an action (B,) int64 to each cluster, and advance each to its next decision."""
        _step_all(self._addresses, actions, self._worth, self.rewards, self.due)

    def episode(self, index: int) -> Episode:
        """What happened on a cluster so far."""
        return self.runtimes[index].episode
