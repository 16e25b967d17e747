"""Many simulated clusters, stepped in one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
from numba import types

from steersman.envs.reward import REWARD, Reward
from steersman.runtime.compiled import njit
from steersman.runtime.fleet import Fleet
from steersman.runtime.observation import WIDTH
from steersman.runtime.outcomes import USAGE, Episode
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.requests import REQUEST, Requests
from steersman.runtime.simulator import kernel
from steersman.runtime.simulator.simulator import new_outcomes, outcome_columns
from steersman.runtime.simulator.state import (
    CLUSTER,
    OUTCOME,
    buffer_size,
    header,
    open_state,
    reset_state,
    shape_of,
)
from steersman.runtime.tenant import TENANT

_SHED = int(RequestState.SHED)


def _step(buffers, requests, counts, blocks, outcomes, promises, worth, actions, rows, masks, reasons, rewards, due):  # type: ignore[no-untyped-def]
    for b in range(len(buffers)):
        n = counts[b]
        played = outcomes[b, :n]
        due[b] = kernel.step(buffers[b], requests[b, :n], blocks[b], played, actions[b], rows[b], masks[b], reasons[b])
        if not due[b]:
            rows[b] = 0.0
        s = open_state(buffers[b])
        rewards[b] = 0.0
        for k in range(s.cluster[0].n_ended):
            o = played[s.ended[k]]
            p = promises[requests[b, s.ended[k]].tenant]
            rewards[b] += worth(
                1.0 if o.attained else 0.0,
                1.0 if o.state == _SHED else 0.0,
                o.ttft_s,
                o.tpot_s,
                p.ttft_slo_s,
                p.tpot_slo_s,
                p.weight,
            )


@functools.cache
def compiled_step() -> Callable[..., None]:
    """The compiled step of all clusters; it is compiled at the first call, once for every reward."""
    signature = types.void(
        types.Array(types.uint8, 2, "C"),
        types.Array(numba.from_dtype(REQUEST), 2, "C"),
        types.int64[::1],
        types.Array(types.int64, 2, "C"),
        types.Array(numba.from_dtype(OUTCOME), 2, "C"),
        types.Array(numba.from_dtype(TENANT), 1, "C"),
        types.FunctionType(REWARD),
        types.int64[::1],
        types.Array(types.float32, 3, "C"),
        types.Array(types.boolean, 2, "C"),
        types.Array(types.int8, 2, "C"),
        types.float64[::1],
        types.boolean[::1],
    )
    return njit(signature)(_step)


class Batch:
    """B clusters of one fleet, each playing an episode of its own.

    rows float32 (B, C, WIDTH), masks bool (B, C), rewards float64 (B,) and due bool (B,) hold what the last `step`
    gave; rows of a cluster whose episode is over are zero.
    """

    def __init__(self, size: int, fleet: Fleet, candidates: int, promises: np.ndarray, reward: Reward) -> None:
        """promises: TENANT (T,), the same for every episode."""
        self.fleet = fleet
        self.rows = np.zeros((size, candidates, WIDTH), np.float32)
        self.masks = np.zeros((size, candidates), np.bool_)
        self.reasons = np.zeros((size, candidates), np.int8)
        self.rewards, self.due = np.zeros(size), np.zeros(size, np.bool_)
        self._promises, self._worth = promises, reward.worth
        self._replicas = fleet.table()
        self._counts = np.zeros(size, np.int64)
        self._buffers = np.zeros((size, 0), np.uint8)
        self._requests = np.zeros((size, 0), REQUEST)
        self._blocks = np.zeros((size, 0), np.int64)
        self._outcomes = np.zeros((size, 0), OUTCOME)
        self._episodes: list[Requests | None] = [None] * size
        self._step = compiled_step()

    def reset(self, index: int, requests: Requests) -> None:
        """Start an episode, of at least one request, on cluster `index`, and observe its first decision."""
        shape = shape_of(
            self._replicas, len(self._promises), len(requests), self.fleet.block_tokens, requests.block_tokens
        )
        n = len(requests)
        self._buffers = _widened(self._buffers, buffer_size(shape))
        self._requests, self._outcomes = _widened(self._requests, n), _widened(self._outcomes, n)
        self._blocks = _widened(self._blocks, len(requests.blocks))
        self._episodes[index], self._counts[index] = requests, n
        self._requests[index, :n], self._outcomes[index, :n] = requests.table, new_outcomes(n)
        self._blocks[index, : len(requests.blocks)] = requests.blocks
        buffer = self._buffers[index]
        reset_state(buffer, header(shape), self._replicas, self._promises, requests.block_tokens, requests.window_s)
        kernel.advance(buffer, self._requests[index, :n], self._blocks[index], self._outcomes[index, :n])
        kernel.observe(
            buffer,
            self._requests[index, :n],
            self._blocks[index],
            self.rows[index],
            self.masks[index],
            self.reasons[index],
        )

    def step(self, actions: np.ndarray) -> None:
        """Apply an action (B,) int64 to each cluster, and advance each to its next decision."""
        self._step(
            self._buffers,
            self._requests,
            self._counts,
            self._blocks,
            self._outcomes,
            self._promises,
            self._worth,
            actions,
            self.rows,
            self.masks,
            self.reasons,
            self.rewards,
            self.due,
        )

    def now(self, index: int) -> float:
        """Simulated seconds since the start of the cluster's episode."""
        return float(open_state(self._buffers[index]).cluster["now"][0])

    def episode(self, index: int) -> Episode:
        """What happened on a cluster so far; a copy."""
        requests = self._episodes[index]
        assert requests is not None
        state = open_state(self._buffers[index])
        assert state.cluster.dtype == CLUSTER
        assert state.usage.dtype == USAGE
        outcomes = outcome_columns(self._outcomes[index, : len(requests)].copy())
        return Episode(requests, outcomes, state.usage.copy(), requests.window_s)


def _widened(array: np.ndarray, width: int) -> np.ndarray:
    """`array` (B, N) with at least `width` columns, with room to spare where it grows."""
    if array.shape[1] >= width:
        return array
    wider = np.zeros((len(array), width + width // 8), array.dtype)
    wider[:, : array.shape[1]] = array
    return wider
