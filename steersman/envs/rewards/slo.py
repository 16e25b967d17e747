"""The worth of the requests that met both of their SLOs: what goodput counts, weighted by tenant.

Formula: weight if attained, else 0.
"""

from __future__ import annotations

from steersman.envs.reward import REWARD as SIGNATURE
from steersman.envs.reward import Reward
from steersman.runtime.compiled import njit


@njit(SIGNATURE)
def worth(
    attained: float, shed: float, ttft_s: float, tpot_s: float, ttft_slo_s: float, tpot_slo_s: float, weight: float
) -> float:
    return weight * attained


REWARD = Reward("slo", "The weight of each request that met both SLOs.", worth)
