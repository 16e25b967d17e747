"""Tuning a heuristic: a search over its own parameters that may stop when it has converged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from steersman.agents.policies import resolve
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.training import tags
from steersman.training.benchmark.budget import Budget
from steersman.training.job import Job
from steersman.training.progress import stage
from steersman.training.search import Generation, tune

SIGMA = 0.2  # of each parameter's range, at the start
EVEN = 5e-4  # of worth: a generation whose best is no further from its mean has nothing left to choose from
PATIENCE = 3  # such generations in a row


class Converged(Exception):
    """Raised out of a search that has nothing left to find."""


class Watch:
    """Follows a search: tells when it has converged, and keeps what it had found when half of it was done."""

    def __init__(self, generations: int) -> None:
        self._half = generations // 2
        self._even = 0
        self.values: list[float] = []
        self.episodes = 0
        self.half_values: list[float] = []
        self.half_episodes = 0

    def see(self, generation: Generation, policy: CompiledPolicy) -> None:
        """Raises Converged after `PATIENCE` generations of equals."""
        self.values, self.episodes = policy.values.tolist(), generation.evaluations
        if generation.number <= self._half:
            self.half_values, self.half_episodes = self.values, self.episodes
        self._even = self._even + 1 if generation.best - generation.mean < EVEN else 0
        if self._even >= PATIENCE:
            raise Converged


def tuned(job: Job, name: str, budget: Budget, pool: Sequence[Requests]) -> dict[str, Any]:
    """The heuristic's numbers after the search, and after half of its budget.

    {"values", "episodes", "half_values", "half_episodes"}; episodes: simulated for it.
    """
    watch = Watch(budget.generations)
    with stage(job.console, f"{job.run.folder.name}: tuning {name}", budget.generations) as shown:

        def progress(generation: Generation, policy: CompiledPolicy) -> None:
            shown.advance(generation.number, f"worth {generation.mean:.4f}")
            job.dashboard.scalars(generation.number, {f"{tags.TUNED}{name}/worth": generation.mean})
            watch.see(generation, policy)

        try:
            tune(
                resolve(name),
                sigma=SIGMA,
                population=budget.population,
                generations=budget.generations,
                episodes=budget.episodes,
                pool=pool,
                arena=job.arena,
                seed=job.config.seed + 1,
                checkpoint=job.run.checkpoints / f"tune-{name}.npy",
                progress=progress,
            )
        except Converged:
            shown.advance(budget.generations, f"converged after {watch.episodes:,} episodes")
    return {
        "values": watch.values,
        "episodes": watch.episodes,
        "half_values": watch.half_values,
        "half_episodes": watch.half_episodes,
    }


def with_numbers(name: str, values: Sequence[float], label: str) -> CompiledPolicy:
    """The heuristic `name` with other numbers, called `label`."""
    return resolve(name).with_values(np.array(values), label)
