"""Holding: a request may wait at the gateway, and is decided anew after every pause.

A pause is a tenth of the tenant's TTFT target, so that who is in a hurry is asked again soon. Nobody is held
beyond that target: by then the promise is broken.
"""

from __future__ import annotations

from steersman.runtime.compiled import njit

PAUSES = 10
LEAST_S, MOST_S = 0.01, 1.0


@njit(forceinline=True)
def pause_s(ttft_slo_s):
    """Seconds until a held request is decided anew."""
    return min(MOST_S, max(LEAST_S, ttft_slo_s / PAUSES))


@njit(forceinline=True)
def may_hold(ttft_slo_s, waited_s):
    """Whether a request that has waited so long may be held once more."""
    return waited_s + pause_s(ttft_slo_s) < ttft_slo_s
