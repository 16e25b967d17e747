"""The policy contract: score the candidates, higher is better. The guard's mask is applied outside.

A policy is a compiled function with the signature `SCORE`, its parameters, and as much memory as it wants to keep
between decisions (a counter, a random state, scratch space):

    score(rows, mask, params, memory, scores)
        rows    float32 (C, WIDTH)  the observation (see `observation`)
        mask    bool (C,)           the guard's mask; the last two are hold and shed
        params  float64 (P,)        constant
        memory  float64 (M,)        zero at first, but for memory[0]: the seed
        scores  float64 (C,)        to be filled

The same function runs inside the simulator's compiled loop, in the environments and in the gateway. A policy
written in plain Python fits `Policy` too; only the compiled loop cannot run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import types

from steersman.runtime.compiled import entry, njit
from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest

SCORE = types.void(
    types.Array(types.float32, 2, "C"),
    types.boolean[::1],
    types.float64[::1],
    types.float64[::1],
    types.float64[::1],
)
NEVER = -1e30  # the score of a candidate that a policy would never choose


class Policy(Protocol):
    """Anything that scores candidates."""

    @property
    def name(self) -> str: ...

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Scores (C,) of the candidates in `rows` (C, WIDTH)."""
        ...


class Param(NamedTuple):
    """A tunable number of a heuristic: its default, and the range that a search may try."""

    default: float
    low: float
    high: float


@dataclass(frozen=True)
class CompiledPolicy:
    """A policy as a compiled function and its numbers."""

    name: str
    summary: str  # one sentence
    function: Any  # compiled with SCORE
    params: Mapping[str, Param] = field(default_factory=dict)
    memory_size: int = 1
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))  # params in order, or a network's weights

    def __post_init__(self) -> None:
        if self.params and not len(self.values):
            object.__setattr__(self, "values", np.array([p.default for p in self.params.values()]))

    def with_values(self, values: np.ndarray, name: str | None = None) -> CompiledPolicy:
        """The same policy with other numbers."""
        return replace(self, values=np.ascontiguousarray(values, np.float64), name=name or self.name)

    def with_params(self, **params: float) -> CompiledPolicy:
        """The same policy with some named numbers changed.

        Raises:
            UserError: it has no such parameter.
        """
        values = self.values.copy()
        for name, value in params.items():
            if name not in self.params:
                raise UserError(f"policy {self.name!r} has no parameter {name!r}; {nearest(name, list(self.params))}")
            values[list(self.params).index(name)] = value
        return self.with_values(values)

    def memory(self, seed: int = 0) -> np.ndarray:
        """Fresh memory."""
        memory = np.zeros(self.memory_size)
        memory[0] = seed
        return memory

    def bind(self, seed: int = 0) -> BoundPolicy:
        """The policy with a memory of its own, for calls from Python."""
        return BoundPolicy(self, self.memory(seed))


@dataclass(frozen=True)
class BoundPolicy:
    """A compiled policy with its memory: a `Policy`."""

    policy: CompiledPolicy
    memory: np.ndarray
    _function: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_function", entry(self.policy.function))

    @property
    def name(self) -> str:
        return self.policy.name

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        scores = np.empty(len(rows))
        self._function(rows, mask, self.policy.values, self.memory, scores)
        return scores


@njit
def pick(scores, mask):
    """The best allowed candidate, the first of equals; NaN never wins."""
    best, chosen = -np.inf, len(scores) - 1
    for c in range(len(scores)):
        if mask[c] and scores[c] > best:
            best, chosen = scores[c], c
    return chosen


@njit
def uniform(memory):
    """A random number in [0, 1) from the state in memory[0] (Park and Miller's minimal standard generator)."""
    state = np.int64(memory[0])
    if state < 1 or state >= 2147483647:
        state = (abs(state) * 1103515245 + 12345) % 2147483646 + 1
        for _ in range(3):  # small seeds give close first numbers
            state = state * 48271 % 2147483647
    state = state * 48271 % 2147483647
    memory[0] = state
    return state / 2147483647.0
