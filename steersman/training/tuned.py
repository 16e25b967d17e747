"""A search over a heuristic's own numbers: the one way, for training, the benchmark and `steersman tune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steersman.agents.policies import resolve
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.training import tags
from steersman.training.job import Job
from steersman.training.optimisers import CmaEs
from steersman.training.progress import stage
from steersman.training.search import Found, Generation, search
from steersman.training.stages import Clock

SIGMA = 0.2  # of each parameter's range, at the start
STRETCH = 40  # generations over which worth is averaged: single ones draw easy and hard episodes
FEW, SHORT_STRETCH = 4, 20  # with so few numbers half a stretch is enough
GAIN = 5e-4  # of worth, from one stretch to the next: less is none

Ranges = Mapping[str, tuple[float, float]]  # by parameter


class Converged(Exception):
    """Raised out of a search that finds no more, with what it found."""

    def __init__(self, found: Found) -> None:
        self.found = found


def tune_heuristic(
    job: Job,
    name: str,
    pool: Sequence[Requests],
    *,
    generations: int | None = None,
    ranges: Ranges | None = None,
    title: str = "",
) -> dict[str, Any]:
    """The numbers of the heuristic `name` after CMA-ES over them. {"values", "episodes"}; episodes: simulated for it.

    It may have the budget of `search` in the training, or so many generations of it, and ends early when it has
    converged. With fewer generations than were played before, in the same folder, nothing is played again.
    ranges: of those to vary; by default all, over their own.
    """
    config = job.config.search
    most, means, clock = generations or config.generations, list[float](), Clock()
    shipped = resolve(name)
    stretch = SHORT_STRETCH if len(ranges or shipped.params) <= FEW else STRETCH
    with stage(job.console, f"{title}tuning {name}", most) as shown:

        def progress(generation: Generation, policy: CompiledPolicy) -> None:
            clock.count(generation.evaluations)
            shown.advance(generation.number, f"worth {generation.mean:.4f}  {clock.rate():.0f} episodes/s")
            if not generation.repeated:
                job.dashboard.scalars(generation.number, {f"{tags.TUNED}{name}/worth": generation.mean})
            means.append(generation.mean)
            if converged(means, stretch):
                raise Converged(Found(policy, policy.values, generation.evaluations))

        try:
            found = tune(
                shipped,
                ranges,
                population=config.population,
                seed=job.config.seed + 1,
                generations=most,
                episodes=config.episodes,
                pool=pool,
                arena=job.arena,
                checkpoint=job.run.checkpoints / f"tune-{name}.npy",
                progress=progress,
            )
        except Converged as end:
            found = end.found
            shown.advance(most, f"converged after {found.evaluations:,} episodes")
    return {"values": found.policy.values.tolist(), "episodes": found.evaluations}


def converged(means: Sequence[float], stretch: int = STRETCH) -> bool:
    """Whether a stretch of generations has just ended that was no better than the one before."""
    if len(means) % stretch or len(means) < 2 * stretch:
        return False
    return bool(np.mean(means[-stretch:]) < np.mean(means[-2 * stretch : -stretch]) + GAIN)


def tune(policy: CompiledPolicy, ranges: Ranges | None = None, *, population: int, seed: int, **options: Any) -> Found:
    """`search` by CMA-ES over a heuristic's parameters, each scaled to its range."""
    names = list(policy.params)
    ranges = ranges or {name: (param.low, param.high) for name, param in policy.params.items()}
    varied = [names.index(name) for name in ranges]
    low, high = np.array(list(ranges.values())).T

    def make(x: np.ndarray) -> CompiledPolicy:
        values = policy.values.copy()
        values[varied] = low + np.clip(x, 0, 1) * (high - low)
        return policy.with_values(values, f"{policy.name} (tuned)")

    start, bounds = np.clip((policy.values[varied] - low) / (high - low), 0, 1), np.tile([0.0, 1.0], (len(low), 1))
    optimiser = CmaEs(start, sigma=SIGMA, population=population, seed=seed, bounds=bounds)
    return search(make, optimiser, seed=seed, **options)
