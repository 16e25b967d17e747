"""The jump: many iterations of an engine at once.

Iterations that decode the same sequences, beside full chunks of one partial prefill, form an arithmetic series: n of
them take n·alpha + beta·n(n−1)/2 seconds.
"""

from __future__ import annotations

import numpy as np

from steersman.runtime.compiled import inner, njit
from steersman.runtime.simulator.state import open_state

NEVER = 1 << 62  # more iterations than there are


@inner(inline=True)
def span(e, steps):
    """Seconds that the first `steps` iterations of the running jump take."""
    return steps * e.alpha + e.beta * (0.5 * steps * (steps - 1))


@inner(inline=True)
def steps_within(e, seconds):
    """How many whole iterations of the running jump end within `seconds` of its start."""
    if seconds < e.alpha:
        return 0
    if e.beta <= 0.0:
        n = int(min(seconds / e.alpha, 1e9))
    else:
        b = e.alpha - 0.5 * e.beta
        n = int(min((np.sqrt(b * b + 2.0 * e.beta * seconds) - b) / e.beta, 1e9))
    n = max(0, min(n, e.steps))
    while n < e.steps and span(e, n + 1) <= seconds:  # rounding of the closed form
        n += 1
    while n > 0 and span(e, n) > seconds:
        n -= 1
    return n


@inner(inline=True)
def cut(s, r, time, at_boundary):
    """End the running jump with the iteration that runs at `time`.

    at_boundary: 1 if an iteration that ends exactly then is early enough.
    """
    e = s.engines[r]
    if e.mixed == 0 and e.steps > 1:
        n = steps_within(e, time - e.start)
        if n < e.steps and (at_boundary == 0 or span(e, n) < time - e.start):
            n += 1
        e.steps = max(1, n)
        s.due[r] = e.start + span(e, e.steps)


@njit
def interrupt(a, r):
    """Replica `r` was changed: it plans anew when the iteration that runs now ends, or at once where none does.

    A decision that is due is guarded anew.
    """
    s = open_state(a)
    s.cluster[0].observed = 0
    now, e = s.cluster[0].now, s.engines[r]
    cut(s, r, now, 0)
    if e.steps == 0 and e.n_waiting > 0:
        s.due[r] = now
