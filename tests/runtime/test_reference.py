"""The compiled simulator equals its reference: random small clusters under random episodes and actions.

Half of the clusters have coefficients, arrivals, faults and cancellations on a coarse binary grid, where sums of seconds
are exact: events fall on the same instant, and each has to come in its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
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
GRID_S = 1 / 256
COEFFICIENTS = ("overhead_s", "decode_a_s", "decode_b_s", "decode_c_s", "prefill_a_s", "prefill_b_s", "prefill_c_s")


@dataclass(frozen=True)
class Situation:
    """An episode on a cluster, with the actions that play it."""

    groups: list[dict[str, Any]]
    costs: list[list[float]]  # COEFFICIENTS of each replica
    block_tokens: int
    requests: Requests
    faults: np.ndarray
    actions: list[int]
    gateways: int

    def runtime(self) -> SimulatedRuntime:
        made = fleet(*self.groups)
        runtime = SimulatedRuntime(made.model_copy(update={"block_tokens": self.block_tokens}), gateways=self.gateways)
        for row, costs in zip(runtime.replicas, self.costs, strict=True):
            for name, seconds in zip(COEFFICIENTS, costs, strict=True):
                row[name] = seconds
            row["kv_tokens"] -= row["kv_tokens"] % self.block_tokens
        runtime.reset(self.requests, self.faults)
        return runtime

    def reference(self, runtime: SimulatedRuntime) -> Reference:
        return Reference(runtime.replicas, self.block_tokens, self.requests, self.faults, self.gateways)


def _times(on_grid: bool, most: float) -> st.SearchStrategy[float]:
    if on_grid:
        return st.integers(0, int(most / GRID_S)).map(lambda n: n * GRID_S)
    return st.floats(0, most)


def _costs(on_grid: bool) -> st.SearchStrategy[list[float]]:
    """COEFFICIENTS; on the grid, an iteration takes a multiple of it, or of a 16th, but for the square of a chunk."""
    if on_grid:
        unit = st.sampled_from([0.0, GRID_S / 16, GRID_S])
        return st.tuples(
            st.sampled_from([0.0, GRID_S]),
            st.sampled_from([GRID_S, 5 * GRID_S]),
            unit,
            unit.map(lambda s: s / 16),
            st.sampled_from([GRID_S, 3 * GRID_S]),
            st.sampled_from([GRID_S / 16, GRID_S]),
            st.sampled_from([0.0, GRID_S / 256]),
        ).map(list)
    scales = (0.003, 0.02, 0.002, 1e-4, 0.02, 0.002, 1e-5)
    return st.tuples(*(st.floats(0.05 * scale, scale) for scale in scales)).map(list)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    on_grid = draw(st.booleans())
    block_tokens = draw(st.sampled_from([1, 2, 4, 16]))
    prefix_tokens = block_tokens * draw(st.sampled_from([1, 2, 4]))
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        seqs = draw(st.integers(1, 5))
        groups.append(
            {
                "kv_tokens": draw(st.integers(max(24, 2 * prefix_tokens), 160)),
                "max_num_seqs": seqs,
                "token_budget": draw(st.integers(seqs, 40)),
                "max_model_len": draw(st.sampled_from([60, 1000])),
                "queue": draw(st.sampled_from(["fcfs", "priority", "edf", "sjf", "vtc"])),
                "batching": draw(st.sampled_from(["continuous", "continuous", "static", "dynamic"])),
                "batch_wait_s": draw(st.sampled_from([0.0, 0.25, 1.0])),
                "swap_s_per_token": draw(st.sampled_from([0.0, GRID_S / 32])),
                "host_tokens": draw(st.integers(0, 100)),
                "model": draw(st.sampled_from(["default", "default", "default", "other"])),
            }
        )
    costs = [draw(_costs(on_grid)) for _ in groups]
    requests = draw(_requests(prefix_tokens, on_grid))
    end_s = float(requests.table["arrival_s"][-1]) + 0.5
    struck = [
        (draw(_times(on_grid, end_s)), draw(st.integers(0, len(groups) - 1)), kind, draw(st.sampled_from([0.5, 2.0, 3.0])))
        for kind in draw(st.lists(st.sampled_from(list(Kind)), max_size=5))
    ]
    crashes = sum(kind == Kind.CRASH for _, _, kind, _ in struck)
    decisions = len(requests) * (1 + crashes)
    actions = draw(st.lists(st.integers(-1, 12), min_size=decisions, max_size=decisions))
    return Situation(
        groups,
        costs,
        block_tokens,
        requests,
        faults(struck),
        [action if action < 0 else action % len(groups) for action in actions],
        draw(st.sampled_from([1, 1, 3])),
    )


@st.composite
def _requests(draw: st.DrawFn, prefix_tokens: int, on_grid: bool) -> Requests:
    count = draw(st.integers(1, 20))
    table, blocks, now = np.zeros(count, REQUEST), [], 0.0
    spread = draw(st.sampled_from([0.01, 0.1, 0.5]))
    for number, row in enumerate(table):
        now += draw(st.sampled_from([0, 0, 1])) and draw(_times(on_grid, spread))
        prompt, output = draw(st.integers(1, 60)), draw(st.integers(1, 25))
        row["arrival_s"], row["tenant"], row["priority"] = now, draw(st.integers(0, 2)), draw(st.integers(0, 2))
        row["prompt_tokens"], row["output_tokens"] = prompt, output
        row["max_tokens"] = output + draw(st.sampled_from([0, 0, 5, 20]))
        row["model"] = draw(st.sampled_from([-1, -1, -1, 0]))
        row["cancel_s"] = draw(st.sampled_from([0, 0, 1])) and draw(_times(on_grid, 1.0))
        row["block_start"], row["prompt_blocks"] = len(blocks), prompt // prefix_tokens
        row["block_count"] = (prompt + draw(st.sampled_from([0, output]))) // prefix_tokens
        # A family has a common trunk, from which each request branches off somewhere.
        family, shared = draw(st.integers(0, 2)), draw(st.integers(0, 20))
        blocks += [
            1000 * (family if k < shared else 10 + number) + k for k in range(row["block_count"])
        ]
    window_s = draw(st.sampled_from([0.0, now / 2, now + 100.0]))
    return Requests(table, np.array(blocks, np.int64), prefix_tokens, TENANTS, window_s)


def assert_equal(runtime: SimulatedRuntime, reference: Reference) -> None:
    fast, slow = runtime.outcomes(), reference.outcomes
    for name in ("state", "replica", "cached_tokens", "attained"):
        assert getattr(fast, name).tolist() == [getattr(outcome, name) for outcome in slow], name
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        times = [getattr(outcome, name) for outcome in slow]
        np.testing.assert_allclose(getattr(fast, name), times, rtol=1e-9, atol=1e-12, err_msg=name)
    for row, engine in zip(runtime.usage(), reference.engines, strict=True):
        for name in ("output_tokens", "iterations", "preemptions"):
            assert row[name] == getattr(engine.usage, name), name
        for name in ("busy_s", "sequence_s"):
            np.testing.assert_allclose(row[name], getattr(engine.usage, name), rtol=1e-9, atol=1e-12, err_msg=name)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(situations())
def test_replaying_gives_what_the_reference_gives(situation):
    runtime = situation.runtime()
    reference = situation.reference(runtime)
    assert runtime.replay(situation.actions) == reference.play(situation.actions)
    assert_equal(runtime, reference)
