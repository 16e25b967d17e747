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
STRETCH = 20  # generations over which worth is averaged: single ones draw easy and hard episodes
GAIN = 5e-4  # of worth, from one stretch to the next: less is none


class Converged(Exception):
    """Raised out of a search that finds no more."""


class Watch:
    """Follows a search: tells when it has converged, and keeps what it had found after `early` generations."""

    def __init__(self, early: int) -> None:
        self._early = early
        self._means: list[float] = []
        self.values: list[float] = []
        self.episodes = 0
        self.early_values: list[float] = []
        self.early_episodes = 0

    def see(self, generation: Generation, policy: CompiledPolicy) -> None:
        """Raises Converged after a stretch of generations that was no better than the one before."""
        self.values, self.episodes = policy.values.tolist(), generation.evaluations
        if generation.number <= self._early:
            self.early_values, self.early_episodes = self.values, self.episodes
        self._means.append(generation.mean)
        if generation.number % STRETCH == 0 and len(self._means) >= 2 * STRETCH:
            before, last = np.mean(self._means[-2 * STRETCH : -STRETCH]), np.mean(self._means[-STRETCH:])
            if last < before + GAIN:
                raise Converged


def tuned(job: Job, name: str, budget: Budget, pool: Sequence[Requests]) -> dict[str, Any]:
    """The heuristic's numbers after the search, and after the teacher's share of its budget.

    {"values", "episodes", "early_values", "early_episodes"}; episodes: simulated for it.
    """
    watch = Watch(budget.teacher_generations)
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
        "early_values": watch.early_values,
        "early_episodes": watch.early_episodes,
    }


def with_numbers(name: str, values: Sequence[float], label: str) -> CompiledPolicy:
    """The heuristic `name` with other numbers, called `label`."""
    return resolve(name).with_values(np.array(values), label)
