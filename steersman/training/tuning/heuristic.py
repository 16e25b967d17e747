"""A heuristic's own numbers, by the search that training and the benchmark tune it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from steersman.agents.policies import resolve, spec_of
from steersman.training.job import TRAINING, VALIDATION, Job
from steersman.training.objective import ArenaMaker
from steersman.training.run import Run
from steersman.training.stages import prepare
from steersman.training.tuned import tune_heuristic
from steersman.training.tuning.folder import TOLD, opened, traces_of, write
from steersman.training.tuning.space import TuningConfig


def tune_policy(folder: Path, console: Console, arenas: ArenaMaker) -> list[dict[str, Any]]:
    """Run, or go on with, the tuning of a heuristic in `folder`. Returns it tuned and as shipped, the better first.

    {"trial", "worth": on validation episodes, "rounds": generations, and its numbers}. Files as `folder.write`.

    Raises:
        UserError: it is no folder of a tuning, or the fleet carries the workload at no load.
    """
    tuning, traces = opened(folder), traces_of(folder)
    settings = tuning.settings()
    assert tuning.policy is not None
    name, shipped = tuning.policy, resolve(tuning.policy)
    job = Job(Run(folder, settings), console, Path(traces) if traces else None, arenas)
    try:
        with console.status("sizing the load …"):
            prepare(job)
        pool = job.pool(TRAINING, settings.search.pool)
        found = job.run.once(f"tune-{name}", lambda: tune_heuristic(job, name, pool, ranges=tuning.numbers()))
        both = [shipped.with_values(np.array(found["values"])), shipped]
        worths = job.arena.values(both, job.validation, VALIDATION)
    finally:
        job.close()
    rounds = found["episodes"] // (settings.search.population * settings.search.episodes)
    rows = [
        {"trial": trial, TOLD: float(worth), "rounds": played}
        | dict(zip(shipped.params, policy.values.tolist(), strict=True))
        for trial, worth, played, policy in zip(("tuned", "shipped"), worths, (rounds, 0), both, strict=True)
    ]
    rows.sort(key=lambda row: -row[TOLD])
    write(folder, rows)
    return rows


def best_spec(tuning: TuningConfig, rows: list[dict[str, Any]]) -> str:
    """The better of both as `resolve` takes it; its numbers keep 6 digits."""
    assert tuning.policy is not None
    shipped = resolve(tuning.policy)
    best = shipped.with_params(**{name: rows[0][name] for name in shipped.params})
    return spec_of(tuning.policy.partition("?")[0], best)
