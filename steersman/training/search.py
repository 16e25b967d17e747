"""Direct policy search over the numbers of a compiled policy, be they a heuristic's or a network's.

Every candidate of a generation plays the same episodes; generations draw fresh ones from a pool, so that no draw can be
learned by heart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.training import checkpoint as checkpoint_file
from steersman.training.objective import Arena, Score, worth
from steersman.training.optimisers import Optimiser


class Generation(NamedTuple):
    """Progress of a search."""

    number: int
    evaluations: int  # episodes played so far
    best: float  # score of the generation's best
    mean: float
    sigma: float
    repeated: bool = False  # from a checkpoint: it was told of before


class Found(NamedTuple):
    """The result of a search."""

    policy: CompiledPolicy
    numbers: np.ndarray  # the point in the search space, (P,)
    evaluations: int  # episodes played


def search(
    make: Callable[[np.ndarray], CompiledPolicy],
    optimiser: Optimiser,
    *,
    generations: int,
    pool: Sequence[Requests],
    episodes: int,
    arena: Arena,
    seed: int,
    checkpoint: Path,
    progress: Callable[[Generation, CompiledPolicy], None],
    score: Score = worth,
) -> Found:
    """Let `optimiser` search, and return the policy that it comes to.

    make: numbers → policy. pool: episodes to draw from, `episodes` of them (spread over the pool) a generation.
    checkpoint: a file that holds the values told so far; where it exists the search repeats its generations from it
    without playing, and so goes on as if it had never stopped. score: of an episode, and what is maximised.
    """
    rng = np.random.default_rng(seed)
    told = _load(checkpoint, optimiser.population)
    for number in range(generations):
        # A stratified draw: one of each stretch of the pool, so that every load appears equally often.
        edges = np.linspace(0, len(pool), episodes + 1).astype(int)
        drawn = [pool[int(rng.integers(low, max(low + 1, high)))] for low, high in itertools.pairwise(edges)]
        asked = optimiser.ask()
        if repeated := number < len(told):
            values = told[number]
        else:
            values = arena.values([make(x) for x in asked], drawn, seed=number * 1000, score=score)
            told = np.vstack([told, values])
            checkpoint_file.save(checkpoint, partial(np.save, arr=told))
        optimiser.tell(values)
        played = (number + 1) * optimiser.population * episodes
        told_of = Generation(number + 1, played, values.max(), values.mean(), optimiser.spread, repeated)
        progress(told_of, make(optimiser.mean))
    return Found(make(optimiser.mean), optimiser.mean, generations * optimiser.population * episodes)


def _load(path: Path, population: int) -> np.ndarray:
    """The values told so far, (generations, population)."""

    def read(file: Path) -> np.ndarray:
        found: np.ndarray = np.load(file, allow_pickle=False)
        return found

    told = checkpoint_file.load(path, read)
    if told is None or told.ndim != 2 or told.shape[1] != population:
        return np.zeros((0, population))
    return told
