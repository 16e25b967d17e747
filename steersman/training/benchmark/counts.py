"""The table of counts: for each policy, load, held-out seed and tenant, what arrived and what was met.

Every statistic of the benchmark is computed from it; only latencies, which no counts give, are stored beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

METRICS = ("ttft_s", "tpot_s", "e2e_s")
OUTPUT_WEIGHT = 2.0  # of an output token, an input token's is 1 (Sheng et al., OSDI '24)


class Latency(NamedTuple):
    """Of completed requests, seconds; 0 where none was completed."""

    mean: float
    p50: float
    p99: float


class Cell(NamedTuple):
    """One policy at one load. S: held-out seeds, T: tenants in the workload's order."""

    attained: np.ndarray  # (S, T) requests that met both SLOs
    served: np.ndarray  # (S, T) weighted tokens of completed requests
    shed: np.ndarray  # (S, T) requests
    computed: np.ndarray  # (S,) tokens: outputs streamed and prompt tokens prefilled within the arrival window
    latency: Mapping[str, Latency]  # of each of METRICS

    def as_json(self) -> dict[str, Any]:
        arrays = {name: np.rint(getattr(self, name)).astype(int).tolist() for name in self._fields[:4]}
        return arrays | {"latency": {metric: list(found) for metric, found in self.latency.items()}}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Cell:
        attained, served, shed, computed = (np.array(data[name], float) for name in cls._fields[:4])
        return cls(attained, served, shed, computed, {k: Latency(*v) for k, v in data["latency"].items()})


class Load(NamedTuple):
    """All policies that played at one load, on the same episodes."""

    load: float  # times the workload's rate
    duration_s: float  # of the arrival window of one episode
    arrived: np.ndarray  # (S, T) requests
    demanded: np.ndarray  # (S, T) weighted tokens of arrived requests
    cells: dict[str, Cell]  # by the name of a contender's member

    def as_json(self) -> dict[str, Any]:
        return {
            "load": self.load,
            "duration_s": self.duration_s,
            "arrived": self.arrived.astype(int).tolist(),
            "demanded": np.rint(self.demanded).astype(int).tolist(),
            "cells": {name: cell.as_json() for name, cell in self.cells.items()},
        }

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Load:
        return cls(
            data["load"],
            data["duration_s"],
            np.array(data["arrived"], float),
            np.array(data["demanded"], float),
            {name: Cell.of_json(cell) for name, cell in data["cells"].items()},
        )


class Curve(NamedTuple):
    """One policy over loads, rising."""

    loads: np.ndarray  # (L,)
    arrived: np.ndarray  # (L, S, T)
    attained: np.ndarray  # (L, S, T)


def curve(loads: Sequence[Load], member: str) -> Curve:
    """The curve of one member over those of `loads` at which it played."""
    played = sorted((load for load in loads if member in load.cells), key=lambda load: load.load)
    return Curve(
        np.array([load.load for load in played]),
        np.array([load.arrived for load in played]),
        np.array([load.cells[member].attained for load in played]),
    )


def shares(attained: np.ndarray, arrived: np.ndarray) -> np.ndarray:
    """attained over arrived; 1 where nothing arrived."""
    return np.where(arrived > 0, attained / np.maximum(arrived, 1), 1.0)


def jain(served: np.ndarray, demanded: np.ndarray) -> float:
    """Jain's fairness index of what tenants got of what they asked for, (T,) weighted tokens each.

    x = served / demanded; (Σx)² / (n·Σx²): 1 if all got the same share, 1/n if one got everything. Source: Jain,
    Chiu and Hawe, "A Quantitative Measure of Fairness", DEC TR-301, 1984.
    """
    x = served[demanded > 0] / demanded[demanded > 0]
    return float(x.sum() ** 2 / (len(x) * (x**2).sum())) if x.any() else 0.0
