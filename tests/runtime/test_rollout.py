"""What would have come of each candidate."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from simulated import FASTEST, PATIENT, episode, fleet

from steersman.runtime.outcomes import State
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.simulator.faults import Kind, faults
from steersman.runtime.simulator.rollout import Rollouts

MEMORY = FASTEST.memory()[None]
either = pytest.mark.parametrize("policy", [FASTEST, PATIENT], ids=lambda policy: policy.name)


def trace(seed: int = 0, count: int = 200) -> Requests:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.02, count))
    return episode(arrivals, rng.integers(1, 1500, count), rng.integers(1, 300, count), 0, rng.integers(0, 9, count))


def played_to(
    decision: int, requests: Requests | None = None, policy: CompiledPolicy = FASTEST
) -> tuple[SimulatedRuntime, np.ndarray, np.ndarray]:
    """A runtime at a decision, the actions of the whole episode, and what came of it."""
    runtime = SimulatedRuntime(fleet({}, {"profile": "llama-3.1-8b-l40s-bf16"}, {}))
    requests = requests or trace()
    runtime.reset(requests)
    routes = runtime.routes(policy)
    truth = runtime.records.copy()
    runtime.reset(requests)
    runtime.advance()
    for action in routes[:decision]:
        runtime.step(int(action))
    return runtime, routes, truth


def pending(runtime: SimulatedRuntime) -> int:
    return int(runtime.view("cluster")["pending"][0])


def holding(policy: CompiledPolicy) -> tuple[SimulatedRuntime, np.ndarray, int, np.ndarray]:
    """As `played_to`, at the first decision from the 80th on that holds, while others are held."""
    runtime, routes, truth = played_to(80, policy=policy)
    decision = 80
    while routes[decision] != runtime.hold or not runtime.view("cluster")["n_held"]:
        runtime.step(int(routes[decision]))
        decision += 1
    return runtime, routes, decision, truth


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") for n in a.dtype.names or ())


@either
def test_the_action_that_was_taken_gives_what_came(policy: CompiledPolicy) -> None:
    runtime, routes, truth = played_to(80, policy=policy)
    rolled = Rollouts(runtime, policy, arrivals=1000).full(MEMORY)
    taken = rolled.outcomes[list(rolled.actions).index(routes[80])]
    rows = np.searchsorted(trace().table["arrival_s"], rolled.table["arrival_s"])
    assert same(taken, truth[rows])
    assert rolled.table["arrival_s"][rolled.decided] == trace().table["arrival_s"][pending(runtime)]
    sent = rolled.actions < len(runtime.replicas)
    assert rolled.outcomes["replica"][sent, rolled.decided].tolist() == [0, 1, 2]
    assert rolled.outcomes["state"][rolled.actions == runtime.shed, rolled.decided].tolist() == [State.SHED]


def test_a_request_that_is_held_comes_back_to_the_policy() -> None:
    runtime, _, _, truth = holding(PATIENT)
    rolled = Rollouts(runtime, PATIENT, arrivals=1000).full(MEMORY)
    held = rolled.outcomes[list(rolled.actions).index(runtime.hold)]
    rows = np.searchsorted(trace().table["arrival_s"], rolled.table["arrival_s"])
    assert same(held, truth[rows])
    assert held["holds"][rolled.decided] > 0
    assert held["replica"][rolled.decided] >= 0


@either
def test_the_runtime_stays_as_it_is(policy: CompiledPolicy) -> None:
    runtime, routes, truth = played_to(80, policy=policy)
    before = runtime.clone().tobytes()
    rollouts = Rollouts(runtime, policy)
    first = rollouts.full(MEMORY)
    rollouts.frozen(int(routes[80]), MEMORY)
    assert runtime.clone().tobytes() == before
    assert same(rollouts.full(MEMORY).outcomes, first.outcomes)
    runtime.replay(routes[80:])
    assert same(runtime.records, truth)


def replayed(decision: int, routes: np.ndarray, action: int) -> SimulatedRuntime:
    """The whole episode with another action at a decision; every other request does what it did."""
    before, _, _ = played_to(0)
    does: dict[int, list[int]] = defaultdict(list)
    decided = -1
    for k, route in enumerate(routes):
        if k == decision:
            decided = pending(before)
            does[decided].append(action)
        elif pending(before) != decided:
            does[pending(before)].append(int(route))
        before.step(int(route))
    runtime, more = played_to(0)[0], True
    while more:
        more = runtime.step(does[pending(runtime)].pop(0))
    return runtime


@pytest.mark.parametrize("at", ["fastest", "patient", "patient, holding"])
def test_frozen_routes_replay_as_given(at: str) -> None:
    """The touched replicas do what a whole replay of the frozen routes gives; the others what the baseline gives."""
    decision, policy = 80, FASTEST if at == "fastest" else PATIENT
    if at == "patient, holding":
        runtime, routes, decision, _ = holding(PATIENT)
    else:
        runtime, routes, _ = played_to(80, policy=policy)
    rolled = Rollouts(runtime, policy, arrivals=1000).frozen(int(routes[decision]), MEMORY)
    rows = np.searchsorted(trace().table["arrival_s"], rolled.table["arrival_s"])
    assert set(rolled.actions) == {0, 1, 2, int(routes[decision]), runtime.shed}
    for action, outcomes in zip(rolled.actions, rolled.outcomes, strict=True):
        if action != runtime.hold:
            records = replayed(decision, routes, int(action)).records[rows]
            for name in ("state", "replica", "ttft_s", "e2e_s", "cached_tokens", "holds"):
                both = outcomes[name], records[name]
                assert np.array_equal(*both, equal_nan=both[0].dtype.kind == "f"), (action, name)


def test_a_request_that_a_crash_brought_back_can_be_frozen() -> None:
    runtime = SimulatedRuntime(fleet({}, {}))
    requests = episode([0.0, 0.1], [9000, 10], [5, 5])
    runtime.reset(requests, faults([(0.15, 0, Kind.CRASH, 1.0), (0.15, 0, Kind.START, 1.0)]))
    runtime.advance()
    runtime.step(0)
    assert runtime.step(1)
    assert pending(runtime) == 0
    rolled = Rollouts(runtime, FASTEST).frozen(1, MEMORY)
    assert rolled.actions.tolist() == [0, 1, 3]
    assert rolled.outcomes["state"][:, rolled.decided].tolist() == [State.DONE, State.DONE, State.SHED]


@either
def test_another_future_replaces_what_would_have_arrived(policy: CompiledPolicy) -> None:
    runtime, routes, _ = played_to(80, policy=policy)
    future = trace(seed=1, count=30)
    rollouts = Rollouts(runtime, policy, arrivals=20)
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
