"""How much load a fleet carries: the loads to train at are taken around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steersman.runtime.errors import UserError
from steersman.runtime.outcomes import Episode
from steersman.runtime.policy import CompiledPolicy
from steersman.training.objective import Arena, Sampler

OVERALL, EACH_TENANT = 0.95, 0.90  # the SLO capacity's demands


def margin(episode: Episode) -> float:
    """By how much attainment is above what the SLO capacity demands, the tighter of overall and worst tenant."""
    attained, tenant = episode.outcomes.attained, episode.requests.table["tenant"]
    if not len(attained):
        return 1.0
    good, count = np.bincount(tenant, weights=attained), np.bincount(tenant)
    worst = (good[count > 0] / count[count > 0]).min()
    return float(min(attained.mean() - OVERALL, worst - EACH_TENANT))


def capacity(policy: CompiledPolicy, sample: Sampler, arena: Arena, seeds: Sequence[int], steps: int = 9) -> float:
    """The highest load at which `policy` meets the demands on average, by bisection; within a few percent.

    Raises:
        UserError: not even a hundredth of the workload's rate is carried, or a hundred times it is.
    """

    def meets(load: float) -> bool:
        return float(np.mean(arena.play([(policy, sample(s, load), s) for s in seeds], margin))) >= 0

    low, high = 1.0, 1.0
    if meets(1.0):
        while meets(high := high * 2):
            low = high
            if high > 100:
                raise UserError(
                    "the fleet carries over 100 times the workload's rate: raise the rate or shrink the fleet"
                )
    else:
        while not meets(low := low / 2):
            high = low
            if low < 0.01:
                raise UserError(
                    f"under {policy.name} the fleet does not meet the tenants' SLOs even at a hundredth of the "
                    "workload's rate: loosen the SLOs or add replicas"
                )
    for _ in range(steps - 3):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low
