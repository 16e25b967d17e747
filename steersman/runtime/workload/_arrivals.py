"""Arrival times: a Poisson or gamma renewal process whose rate is multiplied during bursts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydantic import Field, model_validator

from steersman.runtime.config import Model

Range = tuple[float, float]


class Bursts(Model):
    """Times of a higher rate. The mean rate stays what it is: between bursts there are fewer requests."""

    factor: Range = Field(description="the rate in a burst over the rate outside; drawn anew for each, [low, high]")
    duration_s: Range = Field(description="length of a burst, [low, high]")
    every_s: float = Field(gt=0, le=1e6, description="mean time from the start of one burst to the start of the next")

    @model_validator(mode="after")
    def _ranges(self) -> Bursts:
        if not 1 <= self.factor[0] <= self.factor[1] <= 1000:
            raise ValueError(f"factor {list(self.factor)} must be [low, high] with 1 <= low <= high <= 1000")
        if not 0 < self.duration_s[0] <= self.duration_s[1] < self.every_s:
            raise ValueError(
                f"duration_s {list(self.duration_s)} must be [low, high] with 0 < low <= high < every_s {self.every_s}"
            )
        return self

    @property
    def mean_factor(self) -> float:
        """The mean rate over the rate outside bursts."""
        share = sum(self.duration_s) / 2 / self.every_s
        return 1 + share * (sum(self.factor) / 2 - 1)

    def intensity(self, rng: np.random.Generator, start_s: float, end_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Times to beyond `end_s` and, at each, the integral since `start_s` of a rate whose mean is 1.

        Bursts alternate with exponential pauses from ten cycles before `start_s`, so they have no set phase.
        """
        warm_s = start_s - 10 * self.every_s
        pause_s = self.every_s - sum(self.duration_s) / 2
        cycles = _reach(
            end_s - warm_s,
            self.every_s,
            lambda n: np.stack([rng.exponential(pause_s, n), rng.uniform(*self.duration_s, n)], axis=1),
        )
        times = warm_s + np.concatenate([[0.0], np.cumsum(cycles)])
        rates = np.ones_like(cycles)
        rates[:, 1] = rng.uniform(*self.factor, len(cycles))
        integral = np.concatenate([[0.0], np.cumsum(cycles * rates)]) / self.mean_factor
        return times, integral - np.interp(start_s, times, integral)


class Arrivals(Model):
    """How requests (or sessions) arrive."""

    cv: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="coefficient of variation of the gaps; 1: Poisson, above: clumps",
    )
    bursts: Bursts | None = None

    def sample(self, rng: np.random.Generator, rate_rps: float, start_s: float, end_s: float) -> np.ndarray:
        """Times in [start_s, end_s), sorted; `rate_rps` a second in the mean."""
        times, integral = np.array([start_s, end_s]), np.array([0.0, end_s - start_s])
        if self.bursts is not None:
            times, integral = self.bursts.intensity(rng, start_s, end_s)
        # Unit-rate renewals, mapped through the inverse of the rate's integral. The first ones are cut off:
        # a renewal process that starts with an arrival gives too many at first where cv is above 1.
        warm = 0.0 if self.cv == 1 else 10 * (1 + self.cv**2)
        total = rate_rps * np.interp(end_s, times, integral)
        shape = self.cv**-2
        gaps = _reach(total + warm, 1.0, lambda n: rng.standard_gamma(shape, n) / shape, spread=self.cv)
        units = np.cumsum(gaps) - warm
        return np.interp(units[(units >= 0) & (units < total)] / rate_rps, integral, times)


def _reach(total: float, mean: float, draw: Callable[[int], np.ndarray], spread: float = 1.0) -> np.ndarray:
    """Draws, (n, ...), that sum to `total` or more; `mean` and `spread` guess a row's sum and variation."""
    expected = total / mean
    parts, reached = [], 0.0
    while reached < total:
        parts.append(draw(int(expected + 4 * spread * expected**0.5) + 4))
        reached += float(parts[-1].sum())
    return np.concatenate(parts)
