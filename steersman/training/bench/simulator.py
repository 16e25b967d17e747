"""How fast the simulator and the environments are, and how much memory they take: `steersman bench simulator`.

Each figure is taken after compilation, on one core, and comes as the best and the median of several repeats. The
scenarios play a whole trace; the peer, where it is installed, plays the same file on the same machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from steersman.agents.policies import resolve
from steersman.envs.dispatch import DispatchEnv
from steersman.envs.vector import DispatchVectorEnv
from steersman.runtime.draw import draw
from steersman.runtime.errors import UserError
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import load_workload
from steersman.training.bench.machine import machine
from steersman.training.bench.stream import PROMISE, fleet_of, synthetic

CLUSTERS, IN_FLIGHT = 64, 500
SIZES = (4, 16, 64, 256)


class Scenario(NamedTuple):
    """A trace, the fleet that serves it, and who routes."""

    name: str
    replicas: int
    policy: str
    block_tokens: int
    source: dict[str, Any]
    duration_s: float  # nearly all of the recorded time


SCENARIOS = (
    Scenario(
        "mooncake-conversation-8",
        8,
        "dynamo-kv",
        512,
        {"kind": "mooncake", "file": "mooncake_conversation.jsonl", "spread_s": 3.0},
        3530.0,
    ),
    Scenario(
        "azure-conversation-4",
        4,
        "least-requests",
        64,
        {"kind": "azure", "file": "AzureLLMInferenceTrace_conv.csv"},
        3500.0,
    ),
)


class Timing(NamedTuple):
    """Repeats of one measurement."""

    best: float
    median: float


def bench(
    traces: Path | None, peer: Path | None, repeats: int, stream: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every figure, as the one JSON object that the command prints.

    traces: the folder of trace files; without it there are no scenarios. peer: a Python that has `ai-dynamo`.
    stream: requests of the streamed trace. say: told what is being measured.
    """
    scenarios = []
    for scenario in SCENARIOS if traces else ():
        say(f"{scenario.name} …")
        scenarios.append(_scenario(scenario, traces, repeats))
    if peer is not None:
        if traces is None:
            raise UserError("the peer plays a trace: name their folder with --traces")
        say("the peer on mooncake-conversation-8 …")
        rate = _peer(peer, traces / "mooncake_conversation.jsonl", repeats)
        scenarios[0] |= {"peer_requests_per_s": rate, "ratio": scenarios[0]["requests_per_s"] / rate}
    say("environments …")
    step, batched = _env_step_us(repeats), _batched_decision_us(repeats)
    say("clones …")
    clone, restore = _clone_us(repeats)
    say("fleets of growing size …")
    scaling = [_scaling(size, repeats) for size in SIZES]
    say(f"a trace of {stream:,} requests …")
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in ("steersman", "numba", "numpy")},
        "repeats": repeats,
        "scenarios": scenarios,
        "env_step_us": step.median,
        "env_step_best_us": step.best,
        "batched_decision_us": batched.median,
        "batched_decision_best_us": batched.best,
        "clone_us": clone.median,
        "restore_us": restore.median,
        "scaling": scaling,
        **_streamed(stream),
    }


def _repeated(once: Callable[[], float], repeats: int) -> Timing:
    """`once` returns a figure; the first call is for the compiler and caches."""
    once()
    figures = [once() for _ in range(repeats)]
    return Timing(min(figures), median(figures))


def _run_s(runtime: SimulatedRuntime, requests: Requests, policy: str) -> float:
    runtime.reset(requests)
    chosen = resolve(policy)
    started = time.perf_counter()
    runtime.run(chosen)
    return time.perf_counter() - started


def _scenario(scenario: Scenario, traces: Path | None, repeats: int) -> dict[str, Any]:
    source = scenario.source | {"train_share": 0.9999}
    tenants = {"all": {"slo": PROMISE, "source": source}}
    file = {"description": "A trace.", "block_tokens": scenario.block_tokens, "tenants": tenants}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as written:
        json.dump(file, written)
        written.flush()
        workload = load_workload(written.name, traces=traces)
    fleet = fleet_of(scenario.replicas)
    requests = draw(workload, fleet, 0, duration_s=scenario.duration_s)
    runtime = SimulatedRuntime(fleet)
    seconds = _repeated(lambda: _run_s(runtime, requests, scenario.policy), repeats)
    return {
        "name": scenario.name,
        "policy": scenario.policy,
        "requests": len(requests),
        "requests_per_s": len(requests) / seconds.median,
        "best_requests_per_s": len(requests) / seconds.best,
        "iterations": int(runtime.usage()["iterations"].sum()),
    }


def _peer(python: Path, trace: Path, repeats: int) -> float:
    """Requests per second of NVIDIA Dynamo's offline replay, by its own clock: the median."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(python), "-m", "dynamo.replay", str(trace), "--num-workers", "8", "--replay-mode", "offline"]
        command += ["--router-mode", "kv_router", "--extra-engine-args", '{"block_size":512}']
        command += ["--report-json", str(report)]
        rates = []
        for _ in range(repeats):
            try:
                done = subprocess.run(command, env=os.environ | {"DYN_LOG": "error"}, capture_output=True, text=True)
            except OSError as error:
                raise UserError(f"{python}: cannot be run: {error.strerror}") from None
            if done.returncode or not report.exists():
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"{python} -m dynamo.replay failed: {last}; install ai-dynamo==1.2.1 there")
            figures = json.loads(report.read_text())
            rates.append(figures["completed_requests"] / figures["wall_time_ms"] * 1e3)
    return median(rates)


def _env_step_us(repeats: int) -> Timing:
    """`DispatchEnv.step`: 8 replicas, the default workload, actions of a good heuristic, without drawing episodes."""
    env = DispatchEnv()
    env.reset(seed=0)
    assert isinstance(env.runtime, SimulatedRuntime)
    actions = env.runtime.routes(resolve("jsed")).tolist()[:-1]  # the last step also sums the episode up

    def once() -> float:
        env.reset(seed=0)
        started = time.perf_counter()
        for action in actions:
            env.step(action)
        return 1e6 * (time.perf_counter() - started) / len(actions)

    return _repeated(once, repeats)


def _batched_decision_us(repeats: int) -> Timing:
    """`DispatchVectorEnv.step` over `CLUSTERS` clusters as in `_env_step_us`, for each decision."""
    env = DispatchVectorEnv(CLUSTERS)
    env.reset(seed=0)
    routes = [runtime.routes(resolve("jsed")) for runtime in env.runtimes]
    steps = min(len(route) for route in routes) - 1
    actions = np.stack([route[:steps] for route in routes], axis=1).astype(np.int64)

    def once() -> float:
        env.reset(seed=0)
        started = time.perf_counter()
        for step in actions:
            env.step(step)
        return 1e6 * (time.perf_counter() - started) / actions.size

    return _repeated(once, repeats)


def _clone_us(repeats: int) -> tuple[Timing, Timing]:
    """`clone` into an older one, and `restore`: 8 replicas with `IN_FLIGHT` requests in flight."""
    runtime = SimulatedRuntime(fleet_of(8))
    runtime.reset(synthetic(20_000, 400.0, 0))
    more, policy = runtime.advance(), resolve("jsed").bind()
    while more and runtime.view("cluster")["inflight"][0] < IN_FLIGHT:
        more = runtime.step(int(np.argmax(np.where(runtime.mask, policy.score(runtime.rows, runtime.mask), -np.inf))))
    if not more:
        raise RuntimeError(f"there were never {IN_FLIGHT} requests in flight")
    clone = runtime.clone()

    def timed(copy: Callable[[np.ndarray], object]) -> float:
        started = time.perf_counter()
        for _ in range(100):
            copy(clone)
        return 1e4 * (time.perf_counter() - started)

    return _repeated(lambda: timed(runtime.clone), repeats), _repeated(lambda: timed(runtime.restore), repeats)


def _scaling(replicas: int, repeats: int) -> dict[str, Any]:
    """Equal load on each of more and more replicas."""
    runtime, requests = SimulatedRuntime(fleet_of(replicas)), synthetic(20_000, 6.0 * replicas, 0)
    seconds = _repeated(lambda: _run_s(runtime, requests, "jsed"), repeats)
    return {"replicas": replicas, "requests_per_s": len(requests) / seconds.median}


def _streamed(count: int) -> dict[str, Any]:
    """Peak memory of a process that does nothing but play a trace of `count` requests in parts."""
    command = [sys.executable, "-m", "steersman.training.bench.stream", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
