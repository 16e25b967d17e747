"""Episodes into counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from steersman.runtime.outcomes import Episode, State
from steersman.runtime.policy import CompiledPolicy
from steersman.training.benchmark.counts import METRICS, OUTPUT_WEIGHT, Cell, Latency, Load
from steersman.training.benchmark.scenario import Setting
from steersman.training.objective import Arena


def play(
    setting: Setting,
    arena: Arena,
    policies: Sequence[CompiledPolicy],
    load: float,
    seeds: Sequence[int],
    told: Callable[[int], None] = lambda done: None,
) -> Load:
    """Every policy plays the same held-out episodes at `load`. told(policies done)."""
    requests = [setting.draw(seed, load) for seed in seeds]
    tenants = len(setting.workload.tenants)
    tables = [r.table for r in requests]
    arrived = np.array([np.bincount(t["tenant"], minlength=tenants) for t in tables])
    demanded = np.array([np.bincount(t["tenant"], weights=_tokens(t), minlength=tenants) for t in tables])
    cells = {}
    for done, policy in enumerate(policies, 1):
        cells[policy.name] = cell(setting, arena.episodes(policy, requests, seeds[0]))
        told(done)
    return Load(load, requests[0].window_s, arrived, demanded, cells)


def cell(setting: Setting, episodes: Sequence[Episode]) -> Cell:
    """The counts of one policy at one load."""
    tenants = len(setting.workload.tenants)

    def by_tenant(weights: Callable[[Episode], np.ndarray]) -> np.ndarray:
        return np.array(
            [np.bincount(e.requests.table["tenant"], weights=weights(e), minlength=tenants) for e in episodes]
        )

    return Cell(
        by_tenant(lambda e: e.outcomes.attained),
        by_tenant(lambda e: _tokens(e.requests.table) * (e.outcomes.state == State.DONE)),
        by_tenant(lambda e: e.outcomes.state == State.SHED),
        np.array([_computed(e) for e in episodes]),
        {metric: _latency(episodes, metric) for metric in METRICS},
    )


def _tokens(table: np.ndarray) -> np.ndarray:
    """Weighted tokens of each request of a REQUEST array."""
    return table["prompt_tokens"] + OUTPUT_WEIGHT * table["output_tokens"]


def _computed(episode: Episode) -> float:
    """Tokens computed within the arrival window: outputs, and prompts whose first token came in it, less the cached."""
    table, outcomes = episode.requests.table, episode.outcomes
    with np.errstate(invalid="ignore"):
        begun = table["arrival_s"] + outcomes.ttft_s <= episode.duration_s
    prompts = np.where(begun, table["prompt_tokens"] - outcomes.cached_tokens, 0).sum()
    return float(prompts + episode.usage["output_tokens"].sum())


def _latency(episodes: Sequence[Episode], metric: str) -> Latency:
    values = np.concatenate([getattr(e.outcomes, metric)[e.outcomes.state == State.DONE] for e in episodes])
    if not len(values):
        return Latency(0.0, 0.0, 0.0)
    p50, p99 = np.percentile(values, [50, 99])
    return Latency(float(values.mean()), float(p50), float(p99))
