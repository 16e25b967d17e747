"""The compiled loop over a cluster: advance to the next decision, apply it, or play a whole episode.

Episode data stand beside the state buffer and are only read, but for `outcomes`:
    requests REQUEST (N,), blocks int64 (K,), outcomes OUTCOME (N,)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
from numba import types

from steersman.runtime import bookkeeping
from steersman.runtime.compiled import njit
from steersman.runtime.guard import guard
from steersman.runtime.observation import encode
from steersman.runtime.outcomes import State as RequestState
from steersman.runtime.policy import SCORE, pick
from steersman.runtime.requests import REQUEST
from steersman.runtime.simulator.engine import complete, enqueue, plan, sync
from steersman.runtime.simulator.state import OUTCOME, open_state

_SHED = int(RequestState.SHED)


@njit(forceinline=True)
def advance_state(s, requests, blocks, outcomes):
    """Run until a request needs a decision. Returns whether there is one; False: every request has ended."""
    c = s.cluster[0]
    arrival = requests[c.next_request].arrival_s if c.next_request < len(requests) else np.inf
    while True:
        r, event = 0, s.engines[0].next_event
        for k in range(1, len(s.engines)):
            if s.engines[k].next_event < event:
                r, event = k, s.engines[k].next_event
        if event > arrival or event == np.inf:
            break
        complete(s, requests, blocks, outcomes, r)
        plan(s, requests, blocks, r, event)
    if arrival == np.inf:
        return False
    c.now = arrival
    c.pending = c.next_request
    c.next_request += 1
    bookkeeping.arrive(s.book, arrival, requests[c.pending].tenant)
    return True


@njit(forceinline=True)
def observe_state(s, requests, blocks, rows, mask, reasons):
    """Encode the pending request and its guard mask."""
    c = s.cluster[0]
    q = requests[c.pending]
    keys = blocks[q.block_start : q.block_start + q.prompt_blocks]
    for r in range(len(s.engines)):
        sync(s, r, c.now)
        s.matched[r] = bookkeeping.matched_tokens(s.book, r, keys, c.prefix_tokens, q.prompt_tokens)
    encode(c.now, s.replicas, s.book, q.tenant, q.prompt_tokens, q.max_tokens, s.matched, 0.0, q.priority, rows)
    guard(s.replicas, q.prompt_tokens, q.max_tokens, q.model, q.regions, mask, reasons)


@njit(forceinline=True)
def apply_state(s, requests, blocks, outcomes, action, mask):
    """Carry out a decision for the pending request. A masked action sheds: nothing overrides the guard."""
    c = s.cluster[0]
    index = c.pending
    q = requests[index]
    c.pending = -1
    c.decisions += 1
    c.n_ended = 0
    if 0 <= action < len(s.engines) and mask[action]:
        believed = int(s.matched[action])
        keys = blocks[q.block_start : q.block_start + q.prompt_blocks]
        bookkeeping.dispatch(s.book, c.now, action, q.tenant, q.prompt_tokens, q.prompt_tokens - believed, keys)
        outcomes[index].replica = action
        enqueue(s, requests, action, index, believed)
    else:
        outcomes[index].state = _SHED
        bookkeeping.settle(s.book, q.tenant, False)
        s.ended[0] = index
        c.n_ended = 1


# For calls from Python and for the environments: three compiled functions that hold all the code, so that what calls
# them is quick to compile. They take the buffer, since the many views in a state would be copied at every call.


@njit
def advance(buffer, requests, blocks, outcomes):
    """`advance_state` on a buffer."""
    return advance_state(open_state(buffer), requests, blocks, outcomes)


@njit
def observe(buffer, requests, blocks, rows, mask, reasons):
    """`observe_state` on a buffer."""
    observe_state(open_state(buffer), requests, blocks, rows, mask, reasons)


@njit
def apply(buffer, requests, blocks, outcomes, action, mask):
    """`apply_state` on a buffer."""
    apply_state(open_state(buffer), requests, blocks, outcomes, action, mask)


@njit
def step(buffer, requests, blocks, outcomes, action, rows, mask, reasons):
    """Apply `action`, then advance to the next decision and observe it. Returns whether there is one."""
    apply(buffer, requests, blocks, outcomes, action, mask)
    if not advance(buffer, requests, blocks, outcomes):
        return False
    observe(buffer, requests, blocks, rows, mask, reasons)
    return True


# Whole episodes in one piece: a third faster than through the functions above, but longer to compile.
def _run(buffer, requests, blocks, outcomes, rows, mask, reasons, function, params, memory, trace, actions):
    s = open_state(buffer)
    scores = np.empty(len(mask))
    decisions = 0
    while advance_state(s, requests, blocks, outcomes):
        observe_state(s, requests, blocks, rows, mask, reasons)
        function(rows, mask, params, memory, scores)
        action = pick(scores, mask)
        if decisions < len(trace):
            trace[decisions] = rows
            actions[decisions] = action
        apply_state(s, requests, blocks, outcomes, action, mask)
        decisions += 1
    return decisions


@functools.cache
def run() -> Callable[..., int]:
    """The compiled function that plays an episode to its end under any compiled policy.

    run()(buffer, requests, blocks, outcomes, rows, mask, reasons, function, params, memory, trace, actions)
    returns the number of decisions. The first observations, as many as `trace` float32 (D, C, WIDTH) has room for,
    and the actions int32 (D,) taken on them are kept. The policy is called through a pointer, so that one
    compilation serves them all; it happens at the first call, not on import.
    """
    signature = types.int64(
        types.uint8[::1],
        types.Array(numba.from_dtype(REQUEST), 1, "C"),
        types.int64[::1],
        types.Array(numba.from_dtype(OUTCOME), 1, "C"),
        types.Array(types.float32, 2, "C"),
        types.boolean[::1],
        types.int8[::1],
        types.FunctionType(SCORE),
        types.float64[::1],
        types.float64[::1],
        types.Array(types.float32, 3, "C"),
        types.int32[::1],
    )
    return njit(signature)(_run)
