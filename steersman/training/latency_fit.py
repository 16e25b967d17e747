"""Fit what `llmd-latency` predicts with: TTFT and TPOT as linear functions of what a router sees.

    python -m steersman.training.latency_fit --workload default --fleet default

plays training episodes under several dispatchers at several loads, so that every replica is seen idle and busy, and
prints the policy as `--policy` takes it. llm-d fits while it serves; this is the favourable case, in which all was
learned beforehand from the very workload.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steersman.agents.heuristics.llmd_latency import (
    AHEAD,
    CONTEXT,
    KV_USE,
    MATCHED,
    PROMPT,
    RUNNING,
    TERMS,
    WAITED,
    WAITING,
)
from steersman.agents.policies import resolve
from steersman.runtime.configs import find_config
from steersman.runtime.draw import draw
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, load_fleet
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import Workload, load_workload

DISPATCHERS = ("random", "power-of-two", "least-requests", "llmd-weighted", "jsed")
LOADS = (0.5, 0.75, 1.0, 1.25)


class Samples(NamedTuple):
    """Requests that were served: what was seen of their replica when they were sent, and how it went."""

    rows: np.ndarray  # float32 (n, WIDTH)
    ttft_s: np.ndarray  # float64 (n,)
    tpot_s: np.ndarray  # float64 (n,): 0 for a single output token


class Line(NamedTuple):
    """A fitted latency."""

    coefficients: np.ndarray  # float64 (7,), in the order of `TERMS`
    explained: float  # share of the variance, R²


def sample(
    workload: Workload, fleet: Fleet, *, dispatchers: Sequence[str] = DISPATCHERS, loads: Sequence[float] = LOADS
) -> Samples:
    """One training episode for each dispatcher at each load."""
    runtime, parts = SimulatedRuntime(fleet), []
    for seed, (name, load) in enumerate((name, load) for name in dispatchers for load in loads):
        requests = draw(workload, fleet, seed, load=load)
        runtime.reset(requests)
        rows, actions = runtime.record(resolve(name), seed)
        first = rows[:, -1, WAITED] == 0.0  # not where a request lost its replica and was decided again
        rows, actions, outcomes = rows[first], actions[first], runtime.outcomes()
        kept = (outcomes.replica == actions) & np.isfinite(outcomes.tpot_s)
        seen = rows[kept, actions[kept]]
        parts.append(Samples(seen, outcomes.ttft_s[kept], outcomes.tpot_s[kept]))
    return Samples(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def fit(rows: np.ndarray, tokens: int, times_s: np.ndarray) -> Line:
    """Least squares of `times_s` (n,) on the terms in `rows` (n, WIDTH); `tokens`: which column counts those in flight.

    A term that never varies gets the coefficient 0.
    """
    seen = rows.astype(np.float64)
    match = seen[:, MATCHED] / np.maximum(1.0, seen[:, PROMPT])
    terms = [seen[:, KV_USE], seen[:, PROMPT], seen[:, WAITING], seen[:, RUNNING], match, seen[:, tokens]]
    x = np.column_stack(terms)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    unit = np.where(spread > 0, spread, np.inf)
    slopes = np.linalg.lstsq((x - mean) / unit, times_s - times_s.mean(), rcond=None)[0] / unit
    coefficients = np.concatenate([[times_s.mean() - slopes @ mean], slopes])
    error = times_s - coefficients[0] - x @ slopes
    return Line(coefficients, 1.0 - float(error.var() / max(1e-12, times_s.var())))


def fit_both(samples: Samples) -> tuple[Line, Line]:
    """The lines for TTFT and for TPOT; the latter from requests of two output tokens or more."""
    several = samples.tpot_s > 0.0
    return (
        fit(samples.rows, AHEAD, samples.ttft_s),
        fit(samples.rows[several], CONTEXT, samples.tpot_s[several]),
    )


def spec(ttft: Line, tpot: Line) -> str:
    """The policy with these lines, as `--policy` takes it; 4 digits are more than a fit is good for."""
    lines = (("ttft", ttft), ("tpot", tpot))
    values = [f"{name}_{t}={b:.4g}" for name, line in lines for t, b in zip(TERMS, line.coefficients, strict=True)]
    return "llmd-latency?" + "&".join(values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m steersman.training.latency_fit", description=__doc__)
    parser.add_argument("--workload", default="default")
    parser.add_argument("--fleet", default="default")
    parser.add_argument("--traces", type=Path, default=os.environ.get("STEERSMAN_TRACES"))
    options = parser.parse_args()
    try:
        workload = load_workload(find_config("workloads", options.workload), traces=options.traces)
        samples = sample(workload, load_fleet(find_config("fleets", options.fleet)))
    except UserError as error:
        parser.exit(2, f"steersman: {error}\n")
    ttft, tpot = fit_both(samples)
    print(f"{len(samples.rows)} requests; R² {ttft.explained:.2f} (TTFT), {tpot.explained:.2f} (TPOT)")
    print(spec(ttft, tpot))


if __name__ == "__main__":
    main()
