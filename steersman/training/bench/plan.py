"""On paper: what a search would gain by more cores than there are, from what parts and episodes were measured to take.

The hand-out of `cluster.py`, without a cluster: one driver that needs some time for each part, workers that have up to
two of them, parts cut by `cuts`. Left out: that the driver looks at every worker for each part, and networks.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

CORES = (2, 16, 256, 4096)
SIZES = ((16, 6), (64, 24), (64, 240))  # candidates and episodes of a generation


def plan(episodes_s: Sequence[float], part_s: float, parts_per_s: float) -> dict[str, Any]:
    """Speed-ups over one core by cores and size of a generation, beside what they are computed from.

    episodes_s: what single episodes took; others are drawn from them. part_s: of a part without jobs, there and back.
    parts_per_s: that a driver manages.
    """
    rng = np.random.default_rng(0)
    drawn = {size: rng.choice(np.asarray(episodes_s), size[0] * size[1]) for size in SIZES}
    rows = [
        {
            "cores": cores,
            "generations": [
                {
                    "candidates": size[0],
                    "episodes": size[1],
                    "one_core_s": float(took.sum()),
                    "speed_up": float(took.sum() / generation_s(took, cores, part_s / 2, 1 / parts_per_s)),
                }
                for size, took in drawn.items()
            ],
        }
        for cores in CORES
    ]
    mean_s = float(np.mean(episodes_s))
    return {"episode_ms": mean_s * 1000, "part_ms": part_s * 1000, "parts_per_s": parts_per_s, "rows": rows}


def generation_s(episodes_s: np.ndarray, cores: int, trip_s: float, driver_s: float) -> float:
    """Until the last episode's score is back.

    trip_s: of a part to its worker, or of what came of it back. driver_s: what the driver needs for each.
    """
    from steersman.training.cluster.arena import cuts
    from steersman.training.cluster.cluster import AHEAD

    free_s, driver, end = np.zeros(cores), 0.0, 0.0
    # Places for a part: when it is free, then everyone's first before anyone's second.
    places = [(0.0, depth, worker) for depth in range(AHEAD) for worker in range(cores)]
    for first, last in itertools.pairwise(cuts(len(episodes_s), cores)):
        at, depth, worker = heapq.heappop(places)
        driver = max(driver, at) + driver_s
        free_s[worker] = max(free_s[worker], driver + trip_s) + float(episodes_s[first:last].sum())
        end = max(end, free_s[worker] + trip_s)
        heapq.heappush(places, (free_s[worker] + trip_s, depth, worker))
    return end
