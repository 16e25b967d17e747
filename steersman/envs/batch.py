"""Many simulated clusters, stepped in one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import types

from steersman.envs.reward import REWARD, Reward
from steersman.runtime.compiled import carray, inner, njit, pointer
from steersman.runtime.fleet import Fleet
from steersman.runtime.observation import WIDTH
from steersman.runtime.outcomes import Episode
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime, kernel
from steersman.runtime.simulator.state import open_state

_SHED = int(RequestState.SHED)


@inner
def earned(a, worth):  # type: ignore[no-untyped-def]
    """What the requests that ended since the last decision are worth."""
    s, total = open_state(a), 0.0
    for k in range(s.cluster[0].n_ended):
        o = s.outcomes[s.ended[k]]
        p = s.tenants[s.requests[s.ended[k]].tenant]
        attained, shed = 1.0 if o.attained else 0.0, 1.0 if o.state == _SHED else 0.0
        total += worth(attained, shed, o.ttft_s, o.tpot_s, p.ttft_slo_s, p.tpot_slo_s, p.weight)
    return total


def _step(addresses, step, worth, actions, rewards, due):  # type: ignore[no-untyped-def]
    for b in range(len(addresses)):
        a = addresses[b]
        due[b] = step(a, actions[b], 1)
        rewards[b] = earned(a, worth)
        if not due[b]:
            c = open_state(a).cluster[0]
            rows = carray(pointer(c.p_rows), (c.n_candidates * WIDTH,), np.float32)
            rows[:] = 0.0


@functools.cache
def compiled_step() -> Callable[..., None]:
    """The compiled step of all clusters; it is compiled at the first call, once for every reward."""
    signature = types.void(
        types.int64[::1],
        types.FunctionType(kernel.STEP),
        types.FunctionType(REWARD),
        types.int64[::1],
        types.float64[::1],
        types.boolean[::1],
    )
    return njit(signature)(_step)


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
        self._worth, self._step, self._one = reward.worth, compiled_step(), kernel.step()

    def reset(self, index: int, requests: Requests) -> None:
        """Start an episode, of at least one request, on cluster `index`, and observe its first decision."""
        runtime = self.runtimes[index]
        runtime.reset(requests)
        runtime.advance()
        self._addresses[index] = runtime.address

    def step(self, actions: np.ndarray) -> None:
        """Apply an action (B,) int64 to each cluster, and advance each to its next decision."""
        self._step(self._addresses, self._one, self._worth, actions, self.rewards, self.due)

    def episode(self, index: int) -> Episode:
        """What happened on a cluster so far."""
        return self.runtimes[index].episode
