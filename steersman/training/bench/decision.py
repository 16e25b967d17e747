"""How long one decision takes in the gateway: `steersman bench decision`.

Each round is `Scheduler.decide` for a request: observe it and apply the guard, then score the candidates and pick one.
The policy is the bundle's graph under ONNX Runtime, loaded as the gateway loads it; beside it its compiled form,
observation and guard alone, and all of a decision by the form that the gateway takes.
"""

from __future__ import annotations

import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from steersman.runtime.bundle import Bundle, open_bundle
from steersman.runtime.network import Architecture, parameters
from steersman.runtime.policy import Policy
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.tenant import Tenant
from steersman.runtime.ticket import LiveRequest, Ticket
from steersman.training.bench.machine import machine
from steersman.training.bench.stream import PROMISE, fleet_of
from steersman.training.export import export_bundle

CANDIDATES = (16, 256)
WARM_UP = 200  # rounds that are not counted
PER_REPLICA = 4  # requests in flight
KINDS = 64  # of requests that are decided in turn


def bench(policy: Path | None, rounds: int) -> dict[str, Any]:
    """Every figure, as the one JSON object that the command prints; times in microseconds, by number of candidates.

    policy: a bundle; without one, a scorer of the default architecture with random weights. `p50_us` and `p99_us` are
    those of the policy: scores and pick. `compiled_…` are its compiled form's, `observe_…` those of observation and
    guard, `beside_…` those of all but scores, observation and guard, and `decide_…` those of all that a decision takes.
    """
    bundle = _random_bundle() if policy is None else open_bundle(policy)
    figures: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("steersman", "onnxruntime", "numba", "numpy")},
        "policy": bundle.manifest.name,
        "weights": len(bundle.manifest.weights),
        "rounds": rounds,
    }
    for candidates in CANDIDATES:
        times = _times(bundle, candidates, rounds)
        for step, taken in times.items():
            prefix = "" if step == "policy" else f"{step}_"
            for name, percent in (("p50_us", 50), ("p99_us", 99)):
                figures.setdefault(prefix + name, {})[str(candidates)] = float(np.percentile(taken, percent))
    return figures


def _random_bundle() -> Bundle:
    """Through a file, as every bundle comes."""
    architecture = Architecture()
    weights = np.random.default_rng(0).normal(size=parameters(architecture)).astype(np.float32).astype(float)
    facts: dict[str, Any] = {"fleet": {}, "workload": {}, "seeds": {}, "scorecard": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        export_bundle(
            path,
            architecture=architecture,
            weights=weights,
            name="random weights",
            command="steersman bench decision",
            **facts,
        )
        return open_bundle(path)


def _times(bundle: Bundle, candidates: int, rounds: int) -> dict[str, np.ndarray]:
    """Microseconds of each step, (rounds,)."""
    served, compiled = (_busy(policy, candidates) for policy in (bundle.serving, bundle.compiled.bind()))
    part = _decide_us(served, rounds)[1]
    observe, tickets = np.zeros(rounds), _tickets(served, KINDS)
    for i in range(rounds):
        started = time.perf_counter()
        served.observe(tickets[i % KINDS])
        observe[i] = 1e6 * (time.perf_counter() - started)
    beside = _decide_us(_busy(_Free(candidates), candidates), rounds)[0] - np.median(observe)
    return {
        "policy": part,
        "compiled": _decide_us(compiled, rounds)[1],
        "observe": observe,
        "beside": beside,
        "decide": _decide_us(_busy(bundle.fastest(), candidates), rounds)[0],
    }


class _Free:
    """A policy whose scores cost nothing."""

    name = "free"

    def __init__(self, candidates: int) -> None:
        self._scores = np.zeros(candidates)

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self._scores


def _decide_us(scheduler: Scheduler, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds of whole decisions, and of the policy's part in them, (rounds,) each."""
    tickets, whole, part = _tickets(scheduler, KINDS), np.zeros(rounds), np.zeros(rounds)
    for i in range(-WARM_UP, rounds):
        started = time.perf_counter()
        decision = scheduler.decide(tickets[i % KINDS])
        if i >= 0:
            whole[i], part[i] = 1e6 * (time.perf_counter() - started), 1e6 * decision.decision_s
    if scheduler.fallbacks:
        raise RuntimeError(f"the policy failed: {dict(scheduler.fallbacks)}")
    return whole, part


def _busy(policy: Policy, candidates: int) -> Scheduler:
    """A scheduler of a fleet with requests in flight on every replica, some of them still in prefill."""
    fleet = fleet_of(candidates - 2)
    scheduler = Scheduler(fleet, {"all": Tenant.model_validate({"slo": PROMISE})}, policy, policy, policy_limit_s=1.0)
    tickets = _tickets(scheduler, PER_REPLICA * len(fleet.groups))
    for i, ticket in enumerate(tickets):
        scheduler.observe(ticket)
        scheduler.dispatched(ticket, i % len(fleet.groups))
        if i % 3:
            scheduler.first_token(ticket)
            scheduler.streamed(ticket, 1 + i % 100)
    return scheduler


def _tickets(scheduler: Scheduler, count: int) -> list[Ticket]:
    """Requests that have arrived: prompts of 32 blocks, of which every eighth has the first eight in common."""
    blocks = np.arange(32, dtype=np.int64)
    keys = [blocks + np.where(blocks < 8, 1000 * (i % 8), 10_000 * (1 + i)) for i in range(count)]
    return [scheduler.arrive(LiveRequest(0, 2100, 256, k)) for k in keys]
