"""A trace played in parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import FASTEST, PATIENT, episode, fleet

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import RandomFaults
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.simulator.stream import play

COLUMNS = ("state", "replica", "ttft_s", "tpot_s", "e2e_s", "attained", "cached_tokens")


def trace(count: int, seed: int) -> Requests:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.01, count))
    requests = episode(
        arrivals, rng.integers(1, 1500, count), rng.integers(1, 200, count), 0, rng.integers(0, 9, count)
    )
    requests.table["cancel_s"] = np.where(rng.random(count) < 0.2, rng.exponential(1.0, count), 0)
    return requests


def parts(requests: Requests, size: int) -> list[Requests]:
    """Parts that know nothing of each other's tables."""
    made = []
    for first in range(0, len(requests), size):
        table = requests.table[first : first + size].copy()
        low, high = table["block_start"].min(), (table["block_start"] + table["block_count"]).max()
        table["block_start"] -= low
        made.append(replace(requests, table=table, blocks=requests.blocks[low:high].copy()))
    return made


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 7, 60, 1000]),
    kv=st.sampled_from([3000, 20000]),
    policy=st.sampled_from([FASTEST, PATIENT]),
)
def test_parts_play_as_the_whole_does(seed: int, size: int, kv: int, policy: CompiledPolicy) -> None:
    requests, runtime = trace(150, seed), SimulatedRuntime(fleet({"kv_tokens": kv}, {}))
    runtime.reset(requests)
    runtime.run(policy)
    whole = runtime.outcomes()
    assert runtime.records["holds"].any() == (policy is PATIENT)
    ended = list(play(SimulatedRuntime(runtime.fleet), policy, parts(requests, size)))
    order = np.argsort(np.concatenate([e.table["arrival_s"] for e in ended]))
    for name in COLUMNS:
        joined = np.concatenate([getattr(e.outcomes, name) for e in ended])[order]
        assert np.array_equal(joined, getattr(whole, name), equal_nan=joined.dtype.kind == "f"), name


def test_memory_is_bounded_by_what_is_in_flight() -> None:
    """The buffer that a tenth of the trace needs is enough for all of it."""
    sizes = []
    for count in (400, 4000):
        runtime, requests = SimulatedRuntime(fleet({}, {})), trace(count, 0)
        requests.table["arrival_s"] *= 10
        assert sum(len(e.table) for e in play(runtime, FASTEST, parts(requests, 100))) == count
        sizes.append(len(runtime.clone()))
    assert sizes[1] <= 1.1 * sizes[0]


def test_a_part_that_goes_back_in_time_is_refused() -> None:
    first, second = parts(trace(20, 0), 10)
    with pytest.raises(UserError, match="before the last arrival"):
        list(play(SimulatedRuntime(fleet({})), FASTEST, [second, first]))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"gateways": 2}, "one gateway"), ({"random_faults": RandomFaults(mean_up_s=9, mean_down_s=1)}, "random faults")],
)
def test_what_cannot_be_streamed_is_refused(change: dict[str, object], said: str) -> None:
    runtime = SimulatedRuntime(fleet({}).model_copy(update=change))
    with pytest.raises(UserError, match=said):
        list(play(runtime, FASTEST, parts(trace(20, 0), 10)))
