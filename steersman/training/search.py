"""Direct policy search: CMA-ES over the numbers of a compiled policy, be they a heuristic's or a network's.

Hansen, "The CMA Evolution Strategy: A Tutorial", 2016; the library `cmaes` does the search. Every candidate of a
generation plays the same episodes; generations draw fresh ones from a pool, so that no draw can be learned by heart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cmaes import CMA, SepCMA

from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.training.objective import Arena


class Generation(NamedTuple):
    """Progress of a search."""

    number: int
    evaluations: int  # episodes played so far
    best: float  # worth of the generation's best
    mean: float
    sigma: float


class Found(NamedTuple):
    """The result of a search."""

    policy: CompiledPolicy
    numbers: np.ndarray  # the point in the search space, (P,)
    evaluations: int  # episodes played


def search(
    make: Callable[[np.ndarray], CompiledPolicy],
    start: np.ndarray,
    *,
    sigma: float,
    population: int,
    generations: int,
    pool: Sequence[Requests],
    episodes: int,
    arena: Arena,
    seed: int,
    checkpoint: Path,
    progress: Callable[[Generation, CompiledPolicy], None],
    bounds: np.ndarray | None = None,
) -> Found:
    """Search from `start` (P,) and return the policy of the final mean.

    make: numbers → policy. pool: episodes to draw from, `episodes` of them (spread over the pool) a generation.
    bounds: (P, 2) or None. checkpoint: a file that holds the values told so far; where it exists the search repeats
    its generations from it without playing, and so goes on as if it had never stopped.
    """
    kind = SepCMA if len(start) > 200 else CMA
    optimiser = kind(mean=start.astype(float), sigma=sigma, seed=seed, population_size=population, bounds=bounds)
    rng = np.random.default_rng(seed)
    told = _load(checkpoint, population)
    mean = start
    for number in range(generations):
        # A stratified draw: one of each stretch of the pool, so that every load appears equally often.
        edges = np.linspace(0, len(pool), episodes + 1).astype(int)
        drawn = [pool[int(rng.integers(low, max(low + 1, high)))] for low, high in itertools.pairwise(edges)]
        asked = [optimiser.ask() for _ in range(population)]
        if number < len(told):
            values = told[number]
        else:
            values = arena.values([make(x) for x in asked], drawn, seed=number * 1000)
            told = np.vstack([told, values])
            _save(checkpoint, told)
        optimiser.tell([(x, -float(v)) for x, v in zip(asked, values, strict=True)])
        mean = np.array(optimiser.mean, dtype=float)
        spread = float(getattr(optimiser, "_sigma", sigma))
        progress(
            Generation(number + 1, (number + 1) * population * episodes, values.max(), values.mean(), spread),
            make(mean),
        )
    return Found(make(mean), mean, generations * population * episodes)


def tune(policy: CompiledPolicy, **options: object) -> Found:
    """`search` over a heuristic's own parameters, each scaled to its range."""
    params = list(policy.params.values())
    low, high = np.array([p.low for p in params]), np.array([p.high for p in params])
    start = (policy.values - low) / (high - low)

    def make(x: np.ndarray) -> CompiledPolicy:
        return policy.with_values(low + np.clip(x, 0, 1) * (high - low), f"{policy.name} (tuned)")

    bounds = np.tile([0.0, 1.0], (len(params), 1))
    return search(make, start, bounds=bounds, **options)  # type: ignore[arg-type]


def _load(path: Path, population: int) -> np.ndarray:
    if not path.exists():
        return np.zeros((0, population))
    told = np.load(path, allow_pickle=False)
    return told if told.ndim == 2 and told.shape[1] == population else np.zeros((0, population))


def _save(path: Path, told: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, told)
    temporary.replace(path)
