"""Random small clusters with episodes for them: few KV blocks and small limits, so that everything collides.

Half of them have coefficients, arrivals, faults and cancellations on a coarse binary grid, where sums of seconds are
exact: events fall on the same instant, and each has to come in its order.
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

TENANTS = {
    "quick": Tenant(slo={"ttft_s": 0.4, "tpot_s": 0.04}, expected_output_tokens=6.0),
    "slow": Tenant(slo={"ttft_s": 3.0, "tpot_s": 0.2}, expected_output_tokens=12.0),
    "middle": Tenant(slo={"ttft_s": 1.1, "tpot_s": 0.1}, expected_output_tokens=9.0),
}
FAULTS = [Kind.SLOW, Kind.START, Kind.CRASH, Kind.RESUME, Kind.DRAIN]  # drawn more often from the front
GRID_S = 1 / 256
COEFFICIENTS = ("overhead_s", "decode_a_s", "decode_b_s", "decode_c_s", "prefill_a_s", "prefill_b_s", "prefill_c_s")


@dataclass(frozen=True)
class Situation:
    """A cluster, an episode on it, and the actions that play it."""

    groups: list[dict[str, Any]]  # differences to the default replica
    costs: list[tuple[float, ...]]  # COEFFICIENTS of each replica
    block_tokens: int
    gateways: int
    scrape_s: float
    requests: Requests
    faults: np.ndarray
    actions: list[int]

    def runtime(self) -> SimulatedRuntime:
        changes = {"block_tokens": self.block_tokens, "gateways": self.gateways, "scrape_s": self.scrape_s}
        runtime = SimulatedRuntime(fleet(*self.groups).model_copy(update=changes))
        for row, costs in zip(runtime.replicas, self.costs, strict=True):
            for name, seconds in zip(COEFFICIENTS, costs, strict=True):
                row[name] = seconds
        runtime.reset(self.requests, self.faults)
        return runtime

    def reference(self) -> Reference:
        replicas = self.runtime().replicas
        return Reference(replicas, self.block_tokens, self.requests, self.faults, self.gateways)


def _seconds(on_grid: bool, most: float) -> st.SearchStrategy[float]:
    if on_grid:
        return st.integers(0, int(most / GRID_S)).map(lambda n: n * GRID_S)
    return st.floats(0, most)


def _costs(on_grid: bool) -> st.SearchStrategy[tuple[float, ...]]:
    """COEFFICIENTS; on the grid, many an iteration takes a multiple of it."""
    if not on_grid:
        scales = (0.003, 0.02, 0.002, 1e-4, 0.02, 0.002, 1e-5)
        return st.tuples(*(st.floats(0.05 * scale, scale) for scale in scales))
    choices = ((0, 1), (1, 5), (0, 1 / 16, 1), (0, 1 / 256, 1 / 16), (1, 3), (1 / 16, 1), (0, 1 / 256))
    return st.tuples(*(st.sampled_from([GRID_S * n for n in numbers]) for numbers in choices))


@st.composite
def _groups(draw: st.DrawFn, prefix_tokens: int) -> dict[str, Any]:
    seqs = draw(st.integers(1, 5))
    return {
        "kv_tokens": draw(st.integers(max(64, 2 * prefix_tokens), 200)),
        "max_num_seqs": seqs,
        "token_budget": draw(st.integers(seqs, 40)),
        "max_model_len": draw(st.sampled_from([1000, 1000, 1000, 80])),
        "queue": draw(st.sampled_from(["fcfs", "priority", "edf", "sjf", "vtc"])),
        "batching": draw(st.sampled_from(["continuous", "continuous", "static", "dynamic"])),
        "batch_wait_s": draw(st.sampled_from([0.25, 0.0, 1.0])),
        "swap_s_per_token": draw(st.sampled_from([0.0, GRID_S / 32])),
        "host_tokens": draw(st.integers(0, 100)),
        "model": draw(st.sampled_from(["default", "default", "default", "default", "other"])),
    }


@st.composite
def _requests(draw: st.DrawFn, prefix_tokens: int, on_grid: bool, most: int) -> Requests:
    count, spread_s = draw(st.integers(1, most)), draw(st.sampled_from([0.01, 0.1, 0.5]))
    table, blocks, now = np.zeros(count, REQUEST), [], 0.0
    for number, row in enumerate(table):
        now += draw(st.sampled_from([0, 0, 1])) and draw(_seconds(on_grid, spread_s))
        prompt, output = draw(st.integers(1, 50)), draw(st.integers(1, 40))
        row["arrival_s"], row["tenant"], row["priority"] = now, draw(st.integers(0, 2)), draw(st.integers(0, 2))
        row["prompt_tokens"], row["output_tokens"] = prompt, output
        row["max_tokens"] = output + draw(st.sampled_from([0, 0, 5, 20]))
        row["model"] = draw(st.sampled_from([-1, -1, -1, 0]))
        row["cancel_s"] = draw(st.sampled_from([0, 0, 1])) and draw(_seconds(on_grid, 1.0))
        row["block_start"], row["prompt_blocks"] = len(blocks), prompt // prefix_tokens
        row["block_count"] = (prompt + draw(st.sampled_from([0, output]))) // prefix_tokens
        family, shared = draw(st.integers(0, 2)), draw(st.integers(0, 20))  # it leaves the family's trunk somewhere
        blocks += [1000 * (family if k < shared else 10 + number) + k for k in range(row["block_count"])]
    window_s = draw(st.sampled_from([now + 100.0, 0.0, now / 2]))
    return Requests(table, np.array(blocks, np.int64), prefix_tokens, TENANTS, window_s)


@st.composite
def situations(draw: st.DrawFn, most: int = 20) -> Situation:
    """Up to three replicas and `most` requests."""
    on_grid, block_tokens = draw(st.booleans()), draw(st.sampled_from([1, 2, 4, 16]))
    prefix_tokens = block_tokens * draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.lists(_groups(prefix_tokens), min_size=1, max_size=3))
    requests = draw(_requests(prefix_tokens, on_grid, most))
    replica = st.integers(0, len(groups) - 1)
    struck_s = _seconds(on_grid, float(requests.table["arrival_s"][-1]) + 0.5)
    fault = st.tuples(struck_s, replica, st.sampled_from(FAULTS), st.sampled_from([0.5, 2.0, 3.0]))
    struck = draw(st.lists(fault, max_size=5))
    decisions = len(requests) * (1 + sum(kind == Kind.CRASH for _, _, kind, _ in struck))
    choices = draw(st.lists(st.integers(-1, 5 * len(groups) - 1), min_size=1, max_size=12))
    return Situation(
        groups=groups,
        costs=[draw(_costs(on_grid)) for _ in groups],
        block_tokens=block_tokens,
        gateways=draw(st.sampled_from([1, 1, 3])),
        scrape_s=draw(st.sampled_from([0.0, 0.125])),
        requests=requests,
        faults=faults(struck),
        actions=[choice if choice < 0 else choice % len(groups) for choice in np.resize(choices, decisions)],
    )
