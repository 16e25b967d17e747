"""What proposes the numbers that a search tries: a population at a time, told what each was worth."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from cmaes import CMA, SepCMA

DECAY = 0.003  # ARS: the part of the way back to the start at which each step ends


class Optimiser(Protocol):
    """Maximises. `ask` and `tell` take turns."""

    population: int  # how many `ask` gives

    @property
    def mean(self) -> np.ndarray:
        """What it would give if it ended now, (P,)."""
        ...

    @property
    def spread(self) -> float:
        """How far it looks, in units of the search."""
        ...

    def ask(self) -> list[np.ndarray]:
        """The population, each (P,)."""
        ...

    def tell(self, values: np.ndarray) -> None:
        """What each of the last `ask` was worth, (population,)."""
        ...


class CmaEs:
    """CMA-ES: Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, by the library `cmaes`.

    Above 200 numbers only the diagonal of the covariance is learned. bounds: (P, 2) or None.
    """

    def __init__(
        self, start: np.ndarray, *, sigma: float, population: int, seed: int, bounds: np.ndarray | None = None
    ) -> None:
        kind = SepCMA if len(start) > 200 else CMA
        self._cma = kind(mean=start.astype(float), sigma=sigma, seed=seed, population_size=population, bounds=bounds)
        self.population, self._sigma = population, sigma
        self._asked: list[np.ndarray] = []

    @property
    def mean(self) -> np.ndarray:
        return np.array(self._cma.mean, dtype=float)

    @property
    def spread(self) -> float:
        return float(getattr(self._cma, "_sigma", self._sigma))

    def ask(self) -> list[np.ndarray]:
        self._asked = [self._cma.ask() for _ in range(self.population)]
        return self._asked

    def tell(self, values: np.ndarray) -> None:
        self._cma.tell([(x, -float(v)) for x, v in zip(self._asked, values, strict=True)])


class Ars:
    """Augmented random search: Mania, Guy and Recht, "Simple random search of static policies", 2018 (ARS V1).

    Half of the population are random directions, the other half their opposites. All of them move it, each by the
    difference that it made, in units of the standard deviation of what they were worth. sigma: both the size of a
    direction and of a step.

    Steps do not shrink, so that it wanders about what it seeks: it gives the mean of the last half of where it was
    (Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992). And it wanders off where
    nothing that it is told makes a difference, so each step ends a little of the way back to the start (weight decay).
    """

    def __init__(self, start: np.ndarray, *, sigma: float, population: int, seed: int) -> None:
        self._visited = [start.astype(float)]
        self._sigma, self.population = sigma, 2 * (population // 2)
        self._rng = np.random.default_rng(seed)
        self._directions = np.zeros((0, len(start)))

    @property
    def mean(self) -> np.ndarray:
        last = self._visited[-max(1, len(self._visited) // 2) :]
        return np.asarray(np.mean(last, axis=0))

    @property
    def spread(self) -> float:
        return self._sigma

    def ask(self) -> list[np.ndarray]:
        self._directions = self._rng.normal(size=(self.population // 2, len(self._visited[-1])))
        steps = np.concatenate([self._directions, -self._directions])
        return list(self._visited[-1] + self._sigma * steps)

    def tell(self, values: np.ndarray) -> None:
        pairs = values.reshape(2, -1)
        deviation = pairs.std()
        step = np.zeros_like(self._visited[-1])
        if deviation > 0:
            gain = (pairs[0] - pairs[1]) @ self._directions
            step = self._sigma / (len(self._directions) * deviation) * gain
        back = self._visited[0] - self._visited[-1]
        self._visited.append(self._visited[-1] + step + DECAY * back)
