"""What the prompts of a synthetic tenant share with one another."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.workload._lengths import MAX_TOKENS

Tokens = Field(ge=1, le=MAX_TOKENS)


class Prefixes(NamedTuple):
    """The shared beginnings of n prompts. Chains are numbered from 0 to below `chains`."""

    chain: np.ndarray  # (n,) int64
    tokens: np.ndarray  # (n,) int64
    chains: int


class NoPrefix(Model):
    """Prompts share nothing."""

    kind: Literal["none"] = "none"

    def sample(self, rng: np.random.Generator, n: int) -> Prefixes:
        return Prefixes(np.zeros(n, np.int64), np.zeros(n, np.int64), 0)


class System(Model):
    """Every prompt starts with the same system prompt."""

    kind: Literal["system"]
    tokens: int = Tokens

    def sample(self, rng: np.random.Generator, n: int) -> Prefixes:
        return Prefixes(np.zeros(n, np.int64), np.full(n, self.tokens), 1)


class Documents(Model):
    """Every prompt starts with one of `count` documents; the k-th has a share ∝ k^-exponent (Zipf)."""

    kind: Literal["documents"]
    count: int = Field(ge=1, le=1_000_000)
    exponent: float = Field(default=1.0, ge=0, le=10)
    tokens: int = Tokens

    def sample(self, rng: np.random.Generator, n: int) -> Prefixes:
        cumulative = np.cumsum(np.arange(1, self.count + 1) ** -self.exponent)
        document = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
        return Prefixes(np.minimum(document, self.count - 1), np.full(n, self.tokens), self.count)


class Session(Model):
    """Conversations: the prompt of a turn is the whole history and the turn's new text.

    A turn arrives when the one before would have been answered, at an assumed speed whatever the fleet does,
    and a thinking time has passed. All sessions start with the same `system_tokens`.
    """

    kind: Literal["session"]
    system_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    turns: tuple[int, int] = Field(description="[low, high], uniform")
    think_s: float = Field(ge=0, le=1e5, description="mean of the exponential time between an answer and the next turn")
    assumed_ttft_s: float = Field(default=0.5, ge=0, le=1e4)
    assumed_tpot_s: float = Field(default=0.03, ge=0, le=1e3)
