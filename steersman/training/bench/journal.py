"""What the decision journal costs: `steersman bench journal`.

Requests of a workload are decided by a heuristic and end after the predicted time, on a clock by hand, while the
journal writes. The two calls are timed in the thread that decides, packing and writing by the CPU time of the
journal's own.
"""

from __future__ import annotations

import heapq
import math
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from steersman.agents.policies import resolve
from steersman.runtime.configs import find_config
from steersman.runtime.draw import draw
from steersman.runtime.fleet import load_fleet
from steersman.runtime.journal import Journal, JournalConfig
from steersman.runtime.journal.segment import Batch
from steersman.runtime.requests import Requests
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Kind, LiveRequest
from steersman.runtime.workload import load_workload
from steersman.training.bench.machine import machine

LOAD = 1.2
TPOT_S = 0.03  # of every answer


class _Timed(Journal):
    """A journal that knows what its thread took."""

    writing_cpu_s = 0.0

    def _write(self, batch: Batch) -> None:
        before = time.thread_time()
        super()._write(batch)
        self.writing_cpu_s += time.thread_time() - before


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bench(requests: int) -> dict[str, Any]:
    """Every figure, as the one JSON object that the command prints; times in microseconds, a request or a decision."""
    fleet = load_fleet(find_config("fleets", "default"))
    workload = load_workload(find_config("workloads", "default"))
    played = draw(workload, fleet, 0, load=LOAD, duration_s=max(1.0, 1.2 * requests / (LOAD * workload.offered_rps)))
    clock = _Clock()
    policy, fallback = resolve("push-shed").bind(), resolve("least-requests").bind()
    scheduler = Scheduler(
        fleet,
        workload.tenants,
        policy,
        fallback,
        clock=clock,
        policy_limit_s=math.inf,
        prefix_block_tokens=played.block_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        journal = _Timed(JournalConfig(folder=Path(folder)), fleet, workload.tenants)
        decided, over = _play(journal, scheduler, clock, played, requests)
        journal.close()
        size = journal.bytes
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in ("steersman", "zstandard", "numpy")},
        "replicas": len(fleet.names),
        "requests": len(over),
        "decisions": len(decided),
        "dropped": journal.dropped,
        "decided_p50_us": float(np.percentile(decided, 50)),
        "decided_p99_us": float(np.percentile(decided, 99)),
        "over_p50_us": float(np.percentile(over, 50)),
        "over_p99_us": float(np.percentile(over, 99)),
        "per_request_us": float((decided.sum() + over.sum()) / len(over)),
        "writing_cpu_us_per_decision": 1e6 * journal.writing_cpu_s / max(1, journal.written),
        "bytes_per_decision": size / max(1, journal.written),
    }


def _play(
    journal: Journal, scheduler: Scheduler, clock: _Clock, played: Requests, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds of every call of `decided` and `over`."""
    decided: list[float] = []
    over: list[float] = []
    events: list[tuple[float, int, Callable[[], object]]] = []

    def timed(into: list[float], call: Callable[[], None]) -> None:
        started = time.perf_counter()
        call()
        into.append(1e6 * (time.perf_counter() - started))

    def at(after_s: float, what: Callable[[], object]) -> None:
        heapq.heappush(events, (clock.now + after_s, len(decided) + len(over) + len(events), what))

    def arrive(row: np.void) -> None:
        start = row["block_start"]
        keys = played.blocks[start : start + row["prompt_blocks"]]
        tenant, prompt, limit = (int(row[name]) for name in ("tenant", "prompt_tokens", "max_tokens"))
        ticket = scheduler.arrive(LiveRequest(tenant, prompt, limit, keys, played.block_tokens))
        output = int(row["output_tokens"])

        def decide() -> None:
            scheduler.resumed(ticket)
            decision = scheduler.decide(ticket)
            timed(decided, lambda: journal.decided(scheduler, ticket, decision))
            if decision.kind is Kind.DISPATCH:
                scheduler.dispatched(ticket, decision.replica)
                at(ticket.predicted_ttft_s, lambda: scheduler.first_token(ticket))
                at(ticket.predicted_ttft_s + TPOT_S * output, end)
            elif decision.kind is Kind.HOLD:
                at(scheduler.held(ticket), decide)
            else:
                scheduler.shed(ticket)
                timed(over, lambda: journal.over(ticket, decision.kind))

        def end() -> None:
            scheduler.streamed(ticket, output - 1)
            served = scheduler.ended(ticket, True, output)
            timed(over, lambda: journal.over(ticket, "done", served))

        decide()

    for row in played.table[:count]:
        while events and events[0][0] <= row["arrival_s"]:
            clock.now, _, what = heapq.heappop(events)
            what()
        clock.now = float(row["arrival_s"])
        arrive(row)
    while events:
        clock.now, _, what = heapq.heappop(events)
        what()
    return np.array(decided), np.array(over)
