"""Whole episodes in compiled code: under a compiled policy, or with given actions.

All functions take the address `a` of the cluster's buffer; see `state`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import types

from steersman.runtime.compiled import carray, copy_bytes, njit, pointer
from steersman.runtime.observation import WIDTH
from steersman.runtime.policy import SCORE, pick
from steersman.runtime.simulator.kernel import STAY, gateway_of, step
from steersman.runtime.simulator.state import open_state


@njit
def replay(a, actions):
    """Play an episode with given actions, int32 (D,), without observing. Returns the number of decisions."""
    decisions = 0
    more = step(a, STAY, 0)
    while more and decisions < len(actions):
        more = step(a, actions[decisions], 0)
        decisions += 1
    return decisions


@njit
def replay_each(a, routes, holds):
    """Play an episode in which request i is held `holds[i]` times, then goes to `routes[i]`, or is shed if that is −1.

    Both are int32 (N,).
    """
    c = open_state(a).cluster[0]
    more = step(a, STAY, 0)
    while more:
        waits = c.holds < holds[c.pending]
        more = step(a, c.n_candidates - 2 if waits else routes[c.pending], 0)


@njit
def replay_one(a, r, routes, holds):
    """Play replica `r` alone, with the requests that `routes`, int32 (N,), sends there; no other one runs on.

    holds: int32 (N,), how often each is held before.
    """
    s = open_state(a)
    c = s.cluster[0]
    begun = c.decisions
    for k in range(c.n_replicas):
        if k != r:
            s.due[k] = np.inf
    more = step(a, STAY, 0)
    while more:
        action = -1
        if routes[c.pending] == r and (c.retried != 1 or c.decisions == begun):
            action = r if c.holds >= holds[c.pending] else c.n_candidates - 2
        more = step(a, action, 0)


def _run(a, function, params, memory, trace, actions):
    s = open_state(a)
    c = s.cluster[0]
    rows = carray(pointer(c.p_rows), (c.n_candidates, WIDTH), np.float32)
    mask = carray(pointer(c.p_mask), (c.n_candidates,), np.bool_)
    scores = np.empty(len(mask))
    decisions = 0
    more = step(a, STAY, 1)
    while more:
        function(rows, mask, params, memory[gateway_of(c, c.pending)], scores)
        action = pick(scores, mask)
        if decisions < len(actions):
            actions[decisions] = action
            if decisions < len(trace):
                copy_bytes(trace[decisions].ctypes.data, c.p_rows, 4 * rows.size)
        more = step(a, action, 1)
        decisions += 1
    return decisions


@functools.cache
def run() -> Callable[..., int]:
    """The compiled function that plays an episode to its end under any compiled policy.

    run()(a, function, params, memory, trace, actions) returns the number of decisions. `memory` float64 (G, M):
    one a gateway. The first observations, as many as `trace` float32 (D, C, WIDTH) has room for, and the first actions,
    int32 (E,), are kept. The policy is called through a pointer, so that one compilation serves them all.
    """
    signature = types.int64(
        types.int64,
        types.FunctionType(SCORE),
        types.float64[::1],
        types.float64[:, ::1],
        types.Array(types.float32, 3, "C"),
        types.int32[::1],
    )
    return njit(signature)(_run)
