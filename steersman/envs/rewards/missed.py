"""Minus the worth of the requests that did not meet both of their SLOs: as `slo`, but for a constant a request.

Formula: 0 if attained, else −weight.
A sum of it differs from that of `slo` by the worth of all requests, which no policy changes. But its steps vary less:
under a good policy nearly all of them are 0, where those of `slo` count how many requests happened to end.
"""

from __future__ import annotations

from steersman.envs.reward import REWARD as SIGNATURE
from steersman.envs.reward import Reward
from steersman.runtime.compiled import njit


@njit(SIGNATURE)
def worth(
    attained: float, shed: float, ttft_s: float, tpot_s: float, ttft_slo_s: float, tpot_slo_s: float, weight: float
) -> float:
    return weight * (attained - 1.0)


REWARD = Reward("missed", "Minus the weight of each request that did not meet both SLOs.", worth)
