"""Distributions of lengths in tokens."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from pydantic import Field, model_validator

from steersman.runtime.config import Model

MAX_TOKENS = 10_000_000  # a longer request is taken for a mistake


class Lognormal(Model):
    """exp(N(ln median, sigma²)), cut off at `max`."""

    median: float = Field(ge=1)
    sigma: float = Field(ge=0, le=5)
    max: int = Field(ge=1, le=MAX_TOKENS)


class Lengths(Model):
    """A distribution of lengths: a table of quantiles, or a lognormal."""

    quantiles: dict[float, int] | None = Field(
        default=None,
        description="length at each probability from 0 to 1; in between, the length's logarithm is linear",
    )
    lognormal: Lognormal | None = None

    @model_validator(mode="after")
    def _one_and_valid(self) -> Lengths:
        if (self.quantiles is None) == (self.lognormal is None):
            raise ValueError("exactly one of quantiles and lognormal is needed")
        if self.quantiles is not None:
            probabilities, lengths = list(self.quantiles), list(self.quantiles.values())
            if not all(np.diff(probabilities) > 0) or [*probabilities[:1], *probabilities[-1:]] != [0, 1]:
                raise ValueError(f"quantiles: probabilities must rise from 0 to 1, got {probabilities}")
            if lengths != sorted(lengths) or not 1 <= lengths[0] <= lengths[-1] <= MAX_TOKENS:
                raise ValueError(f"quantiles: lengths must not fall, from 1 to {MAX_TOKENS:,}, got {lengths}")
        return self

    @property
    def mean(self) -> float:
        """Mean length in tokens, before rounding and (for a lognormal) the cut-off."""
        if self.lognormal is not None:
            return self.lognormal.median * math.exp(self.lognormal.sigma**2 / 2)
        probabilities, logs = self._table
        step = np.diff(logs)
        low, high = np.exp(logs[:-1]), np.exp(logs[1:])
        # The integral of exp of a straight line.
        means = np.where(step > 1e-12, (high - low) / np.maximum(step, 1e-12), low)
        return float((np.diff(probabilities) * means).sum())

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`n` lengths, int64, at least 1."""
        if self.lognormal is not None:
            mu, sigma = math.log(self.lognormal.median), self.lognormal.sigma
            logs = np.minimum(mu + sigma * rng.standard_normal(n), math.log(self.lognormal.max))
        else:
            logs = np.interp(rng.random(n), *self._table)
        return np.maximum(np.rint(np.exp(logs)).astype(np.int64), 1)

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.quantiles is not None
        return np.array(list(self.quantiles), float), np.log(np.array(list(self.quantiles.values()), float))
