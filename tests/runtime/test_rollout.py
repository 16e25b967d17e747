"""What would have come of each candidate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import FASTEST, episode, fleet

from steersman.runtime.outcomes import State
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.simulator.rollout import Rollouts

MEMORY = FASTEST.memory()[None]


def trace(seed: int = 0, count: int = 200) -> Requests:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.02, count))
    return episode(arrivals, rng.integers(1, 1500, count), rng.integers(1, 300, count), 0, rng.integers(0, 9, count))


def played_to(decision: int, requests: Requests | None = None) -> tuple[SimulatedRuntime, np.ndarray, np.ndarray]:
    """A runtime at a decision, the routes of the whole episode, and what came of it."""
    runtime = SimulatedRuntime(fleet({}, {"profile": "llama-3.1-8b-l40s-bf16"}, {}))
    requests = requests or trace()
    runtime.reset(requests)
    routes = runtime.routes(FASTEST)
    truth = runtime.records.copy()
    runtime.reset(requests)
    runtime.advance()
    for action in routes[:decision]:
        runtime.step(int(action))
    return runtime, routes, truth


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") for n in a.dtype.names or ())


def test_the_action_that_was_taken_gives_what_came() -> None:
    runtime, routes, truth = played_to(80)
    rolled = Rollouts(runtime, FASTEST, arrivals=1000).full(MEMORY)
    taken = rolled.outcomes[list(rolled.actions).index(routes[80])]
    rows = np.searchsorted(trace().table["arrival_s"], rolled.table["arrival_s"])
    assert same(taken, truth[rows])
    assert rolled.table["arrival_s"][rolled.decided] == trace().table["arrival_s"][80]
    assert rolled.outcomes["replica"][:, rolled.decided].tolist() == [0, 1, 2, -1]


def test_the_runtime_stays_as_it_is() -> None:
    runtime, routes, truth = played_to(80)
    before = runtime.clone().tobytes()
    rollouts = Rollouts(runtime, FASTEST)
    first = rollouts.full(MEMORY)
    rollouts.frozen(int(routes[80]), MEMORY)
    assert runtime.clone().tobytes() == before
    assert same(rollouts.full(MEMORY).outcomes, first.outcomes)
    runtime.replay(routes[80:])
    assert same(runtime.records, truth)


def test_frozen_routes_replay_as_given() -> None:
    """The touched replicas do what a whole replay of the frozen routes gives; the others what the baseline gives."""
    runtime, routes, _ = played_to(80)
    taken = int(routes[80])
    rolled = Rollouts(runtime, FASTEST, arrivals=1000).frozen(taken, MEMORY)
    rows = np.searchsorted(trace().table["arrival_s"], rolled.table["arrival_s"])
    for action, outcomes in zip(rolled.actions, rolled.outcomes, strict=True):
        replayed = SimulatedRuntime(runtime.fleet)
        replayed.reset(trace())
        replayed.replay(np.concatenate([routes[:80], [action], routes[81:]]))
        for name in ("state", "replica", "ttft_s", "e2e_s", "cached_tokens"):
            both = outcomes[name], replayed.records[rows][name]
            assert np.array_equal(*both, equal_nan=both[0].dtype.kind == "f"), (action, name)


def test_another_future_replaces_what_would_have_arrived() -> None:
    runtime, routes, _ = played_to(80)
    future = trace(seed=1, count=30)
    rollouts = Rollouts(runtime, FASTEST, arrivals=20)
    for rolled in (rollouts.full(MEMORY, future=future), rollouts.frozen(int(routes[80]), MEMORY, future=future)):
        assert (rolled.table["prompt_tokens"][-20:] == future.table["prompt_tokens"][:20]).all()
        assert rolled.table["arrival_s"][-20:] == pytest.approx(runtime.now + future.table["arrival_s"][:20])
        assert (rolled.outcomes["state"] != State.PENDING).all()


def test_only_so_many_requests_come() -> None:
    runtime, _, _ = played_to(80)
    rolled = Rollouts(runtime, FASTEST, arrivals=5).full(MEMORY, [0, 1])
    assert rolled.outcomes.shape == (2, len(rolled.table))
    assert len(rolled.table) - rolled.decided - 1 == 5
    assert (rolled.outcomes["state"] == State.DONE).all()


def test_without_a_decision_there_is_nothing_to_roll_out() -> None:
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(replace(trace(), table=trace().table[:1]))
    with pytest.raises(RuntimeError, match="no decision is due"):
        Rollouts(runtime, FASTEST).full(MEMORY)
