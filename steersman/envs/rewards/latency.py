"""Latency in units of what was promised: smoother than `slo`, and blind to neither near misses nor disasters.

Formula: −weight · (min(TTFT / TTFT target, 4) + min(TPOT / TPOT target, 4)) / 2; shed, failed, or given up before the
first token came and after it was promised: −weight · 2.
A request that just keeps both promises costs its weight, so shedding costs as much as being twice as slow.
"""

from __future__ import annotations

import numpy as np

from steersman.envs.reward import REWARD as SIGNATURE
from steersman.envs.reward import Reward
from steersman.runtime.compiled import njit

WORST = 4.0
TURNED_AWAY = 2.0


@njit(SIGNATURE)
def worth(
    attained: float, shed: float, ttft_s: float, tpot_s: float, ttft_slo_s: float, tpot_slo_s: float, weight: float
) -> float:
    if np.isnan(ttft_s):
        return 0.0 if attained else -weight * TURNED_AWAY
    return -weight * 0.5 * (min(ttft_s / ttft_slo_s, WORST) + min(tpot_s / tpot_slo_s, WORST))


REWARD = Reward("latency", "Minus the latency in units of the SLOs, weighted by tenant.", worth)
