"""Which episode comes next: drawn from a workload, for a fleet, at a load."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from steersman.runtime.configs import find_config
from steersman.runtime.draw import draw
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, load_fleet
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Split, Workload, load_workload

# Away from the small seeds that evaluations use: no episode of training is ever one of those.
SEEDS = 10_000_000, 2**31


class Episodes:
    """Draws episodes.

    workload, fleet: a name, a file or the object. load: multiplies the rate; a pair is a range to draw from.

    Raises:
        UserError: an argument names nothing that exists, or a load is not positive.
    """

    def __init__(
        self,
        workload: str | Path | Workload,
        fleet: str | Path | Fleet,
        *,
        load: float | tuple[float, float] = 1.0,
        duration_s: float | None = None,
        split: Split = "train",
        traces: Path | None = None,
    ) -> None:
        self.workload = (
            workload
            if isinstance(workload, Workload)
            else load_workload(find_config("workloads", workload), traces=traces)
        )
        self.fleet = fleet if isinstance(fleet, Fleet) else load_fleet(find_config("fleets", fleet))
        self._low, self._high = (load, load) if isinstance(load, (int, float)) else load
        if not 0 < self._low <= self._high < float("inf"):
            raise UserError(f"load {load}: expected a positive number, or a pair of them that rises")
        self._duration_s, self._split = duration_s, split

    def draw(self, rng: np.random.Generator, load: float | None = None) -> Requests:
        """The next episode; the generator alone decides which, given the load."""
        seed = int(rng.integers(*SEEDS))
        drawn = float(rng.uniform(self._low, self._high))
        return draw(
            self.workload,
            self.fleet,
            seed,
            load=drawn if load is None else load,
            split=self._split,
            duration_s=self._duration_s,
        )
