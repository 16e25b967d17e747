"""A long trace in a process of its own, so that its peak memory is that of nothing else.

python -m steersman.training.bench.stream COUNT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from steersman.agents.policies import resolve
from steersman.runtime.fleet import Fleet
from steersman.runtime.requests import REQUEST, Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.simulator.stream import play
from steersman.runtime.tenant import Tenant
from steersman.training.bench.machine import resident_mib

PART = 50_000  # requests that are there at once, beside those in flight
PROMISE = {"ttft_s": 5.0, "tpot_s": 0.08}


def fleet_of(replicas: int) -> Fleet:
    """So many equal replicas."""
    group = {
        "name": "r",
        "count": replicas,
        "profile": "llama-3.1-8b-h100-bf16",
        "kv_tokens": 400_000,
        "max_num_seqs": 256,
        "token_budget": 2048,
    }
    return Fleet.model_validate({"description": "For the benchmark.", "replicas": [group]})


def synthetic(count: int, rate_rps: float, seed: int, start_s: float = 0.0) -> Requests:
    """`count` requests: Poisson arrivals, lengths as in chat, a system prompt of eight kinds."""
    rng = np.random.default_rng(seed)
    table = np.zeros(count, REQUEST)
    table["arrival_s"] = start_s + np.cumsum(rng.exponential(1 / rate_rps, count))
    table["prompt_tokens"] = np.clip(rng.lognormal(6.8, 0.8, count), 576, 8000)
    table["output_tokens"] = np.clip(rng.lognormal(5.0, 0.7, count), 1, 1024)
    table["max_tokens"], table["model"] = 1024, -1
    table["prompt_blocks"] = table["block_count"] = 8
    table["block_start"] = 8 * rng.integers(0, 8, count)
    return Requests(table, np.arange(64, dtype=np.int64), 64, {"all": Tenant.model_validate({"slo": PROMISE})})


def _parts(count: int, rate_rps: float) -> Iterator[Requests]:
    start_s = 0.0
    for first in range(0, count, PART):
        part = synthetic(min(PART, count - first), rate_rps, first, start_s)
        start_s = float(part.table["arrival_s"][-1])
        yield part


def play_stream(count: int) -> dict[str, Any]:
    """Figures of a streamed trace of `count` requests, MiB as resident between its parts."""
    runtime, policy = SimulatedRuntime(fleet_of(8)), resolve("jsed")
    list(play(runtime, policy, _parts(1000, 48.0)))
    before = most = resident_mib()
    started, ended = time.perf_counter(), 0
    for part in play(runtime, policy, _parts(count, 48.0)):
        ended += len(part.table)
        most = max(most, resident_mib())
    assert ended == count
    seconds = time.perf_counter() - started
    figures = {"stream_requests": count, "stream_requests_per_s": count / seconds}
    return {**figures, "peak_mib": most, "before_mib": before}


if __name__ == "__main__":
    print(json.dumps(play_stream(int(sys.argv[1]))))
