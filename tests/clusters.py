"""Random small clusters with episodes for them: few KV blocks and small limits, so that everything collides.

Half of them have coefficients, arrivals, faults and cancellations on a coarse binary grid, where sums of seconds are
exact: events fall on the same instant, and each has to come in its order. So are the pauses of held requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from reference import Reference
from simulated import fleet

from steersman.runtime.requests import REQUEST, Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.simulator.faults import Kind, faults
from steersman.runtime.tenant import Tenant

GRID_S = 1 / 256
TENANTS = {  # a twentieth of a TTFT target is on the grid
    "quick": Tenant(slo={"ttft_s": 100 * GRID_S, "tpot_s": 0.04}, expected_output_tokens=6.0),
    "slow": Tenant(slo={"ttft_s": 760 * GRID_S, "tpot_s": 0.2}, expected_output_tokens=12.0),
    "middle": Tenant(slo={"ttft_s": 280 * GRID_S, "tpot_s": 0.1}, expected_output_tokens=9.0),
}
# Of a cost profile, with the most that each is, and what it is on the grid in units of GRID_S.
COSTS: dict[str, tuple[float, tuple[float, ...]]] = {
    "overhead_s": (0.003, (0, 1)),
    "decode_a_s": (0.02, (1, 5)),
    "decode_b_s": (0.002, (0, 1 / 16, 1)),
    "decode_c_s": (1e-4, (0, 1 / 256, 1 / 16)),
    "decode_many_s": (0.005, (0, 2)),
    "prefill_a_s": (0.02, (1, 3)),
    "prefill_b_s": (0.002, (1 / 16, 1)),
    "prefill_c_s": (1e-5, (0, 1 / 256)),
    "prefill_d_s": (0.005, (0, 1 / 2)),
    "latency_s": (0.005, (0, 1)),
}


@dataclass(frozen=True)
class Situation:
    """A cluster, an episode on it, and the actions that play it."""

    groups: list[dict[str, Any]]  # differences to the default replica
    costs: list[dict[str, float]]  # the coefficients of each replica
    block_tokens: int
    gateways: int
    scrape_s: float
    requests: Requests
    faults: np.ndarray
    actions: list[int]  # a replica, the number after the last to hold, or −1 to shed

    @property
    def hold(self) -> int:
        return len(self.groups)

    def runtime(self) -> SimulatedRuntime:
        changes = {"block_tokens": self.block_tokens, "gateways": self.gateways, "scrape_s": self.scrape_s}
        runtime = SimulatedRuntime(fleet(*self.groups).model_copy(update=changes))
        for row, costs in zip(runtime.replicas, self.costs, strict=True):
            for name, seconds in costs.items():
                row[name] = seconds
        runtime.reset(self.requests, self.faults)
        return runtime

    def reference(self) -> Reference:
        replicas = self.runtime().replicas
        return Reference(replicas, self.block_tokens, self.requests, self.faults, self.gateways)


def _one(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def _group(rng: np.random.Generator, prefix_tokens: int) -> dict[str, Any]:
    seqs = int(rng.integers(1, 7))
    return {
        "kv_tokens": int(rng.integers(max(70, 2 * prefix_tokens), 220)),
        "max_num_seqs": seqs,
        "token_budget": seqs + int(rng.integers(0, 30)),
        "max_model_len": _one(rng, 1000, 1000, 1000, 80),
        "queue": _one(rng, "fcfs", "priority", "edf", "sjf", "vtc"),
        "batching": _one(rng, "continuous", "continuous", "continuous", "static", "dynamic"),
        "batch_wait_s": _one(rng, 0.0, 0.25, 1.0),
        "swap_s_per_token": _one(rng, 0.0, 0.0, GRID_S / 32),
        "host_tokens": int(rng.integers(0, 100)),
        "model": _one(rng, "default", "default", "default", "default", "default", "other"),
        "region": _one(rng, "here", "here", "there"),
        "backup": _one(rng, 0, 0, 0, 1),
    }


def _costs(rng: np.random.Generator, on_grid: bool) -> dict[str, float]:
    """On the grid, many an iteration takes a multiple of it."""
    if on_grid:
        return {name: GRID_S * _one(rng, *numbers) for name, (_, numbers) in COSTS.items()}
    return {name: most * rng.uniform(0.05, 1) for name, (most, _) in COSTS.items()}


def _requests(rng: np.random.Generator, count: int, prefix_tokens: int, on_grid: bool) -> Requests:
    def seconds(mean: float) -> float:
        drawn = rng.exponential(mean)
        return round(drawn / GRID_S) * GRID_S if on_grid else drawn

    spread_s = _one(rng, 0.005, 0.03, 0.1)
    table, blocks, now = np.zeros(count, REQUEST), [], 0.0
    for number, row in enumerate(table):
        now += _one(rng, 0, seconds(spread_s))
        prompt, output = int(rng.integers(1, 60)), int(rng.integers(1, 40))
        row["arrival_s"], row["tenant"], row["priority"] = now, rng.integers(3), rng.integers(3)
        row["prompt_tokens"], row["output_tokens"] = prompt, output
        row["max_tokens"] = output + _one(rng, 0, 10)
        row["model"] = _one(rng, -1, -1, -1, -1, 0)
        row["regions"] = _one(rng, 0, 0, 0, 1, 3, 2)  # of two zones, of which a fleet may have one
        row["cancel_s"] = _one(rng, 0, 0, 0, seconds(0.5))
        row["block_start"], row["prompt_blocks"] = len(blocks), prompt // prefix_tokens
        row["block_count"] = (prompt + _one(rng, 0, output)) // prefix_tokens
        family, shared = rng.integers(3), _one(rng, 100, rng.integers(10))  # it leaves the family's trunk somewhere
        blocks += [1000 * (family if k < shared else 10 + number) + k for k in range(row["block_count"])]
    before = table[rng.integers(count, size=_one(rng, 0, 0, 5, 30))]
    window_s = _one(rng, now + 100.0, now, now / 2)
    return Requests(table, np.array(blocks, np.int64), prefix_tokens, TENANTS, window_s, before)


def _faults(rng: np.random.Generator, replicas: int, end_s: float, on_grid: bool) -> np.ndarray:
    rows = []
    for _ in range(_one(rng, 0, 0, 2, 5)):
        time_s = rng.uniform(0, end_s)
        time_s = round(time_s / GRID_S) * GRID_S if on_grid else time_s
        kind = _one(rng, Kind.CRASH, Kind.START, Kind.START, Kind.SLOW, Kind.DRAIN, Kind.RESUME, Kind.RESUME)
        rows.append((time_s, int(rng.integers(replicas)), kind, _one(rng, 0.5, 2.0, 3.0)))
    return faults(rows)


def situation(seed: int, requests: int) -> Situation:
    """Of up to three replicas."""
    rng = np.random.default_rng(seed)
    on_grid, block_tokens = bool(rng.integers(2)), _one(rng, 1, 2, 4, 16)
    prefix_tokens = block_tokens * _one(rng, 1, 2, 4)
    groups = [_group(rng, prefix_tokens) for _ in range(rng.integers(1, 4))]
    episode = _requests(rng, requests, prefix_tokens, on_grid)
    struck = _faults(rng, len(groups), float(episode.table["arrival_s"][-1]) + 0.5, on_grid)
    decisions = requests * (1 + int((struck["kind"] == Kind.CRASH).sum()))
    actions = rng.integers(len(groups), size=decisions)
    actions[rng.random(decisions) < 0.02] = -1
    held = rng.geometric(_one(rng, 1.0, 1.0, 0.8, 0.3), size=decisions) - 1  # before a request goes somewhere
    return Situation(
        groups=groups,
        costs=[_costs(rng, on_grid) for _ in groups],
        block_tokens=block_tokens,
        gateways=_one(rng, 1, 1, 3),
        scrape_s=_one(rng, 0.0, 0.125),
        requests=episode,
        faults=struck,
        actions=[action for n, goes in zip(held, actions, strict=True) for action in [len(groups)] * n + [int(goes)]],
    )


def situations(most: int = 40) -> st.SearchStrategy[Situation]:
    """Drawn by numpy, denser and faster than number by number; what hypothesis shrinks is how many requests."""
    return st.builds(situation, seed=st.integers(0, 2**32 - 1), requests=st.integers(1, most))
