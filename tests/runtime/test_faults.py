"""Faults, stale metrics and several gateways, as a fleet file says them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from simulated import FASTEST, episode, fleet

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, load_fleet
from steersman.runtime.observation import COLUMN
from steersman.runtime.outcomes import State
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.simulator.faults import Kind, faults, faults_of


def cluster(**changes: object) -> Fleet:
    return Fleet.model_validate({**fleet({}, {}).model_dump(), **changes})


def trace(count: int = 400, seed: int = 0) -> Requests:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.05, count))
    return episode(arrivals, rng.integers(1, 1500, count), rng.integers(1, 200, count))


def played(made: Fleet, requests: Requests) -> SimulatedRuntime:
    runtime = SimulatedRuntime(made)
    runtime.reset(requests)
    runtime.run(FASTEST)
    return runtime


def test_a_crash_loses_what_has_begun_and_sends_the_rest_elsewhere() -> None:
    made = cluster(
        faults=[{"at_s": 5, "replica": "r0", "kind": "crash"}, {"at_s": 9, "replica": "r0", "kind": "start"}]
    )
    outcomes = played(made, trace()).outcomes()
    arrival = trace().table["arrival_s"]
    assert set(outcomes.state) == {State.DONE, State.FAILED}
    failed = outcomes.state == State.FAILED
    assert (arrival[failed] < 5).all()
    assert (outcomes.replica[failed] == 0).all()
    assert (outcomes.replica[(arrival > 5) & (arrival < 9)] == 1).all()
    assert (outcomes.replica[arrival > 9] == 0).any()


def test_a_drained_replica_finishes_what_it_has() -> None:
    outcomes = played(cluster(faults=[{"at_s": 5, "replica": "r1", "kind": "drain"}]), trace()).outcomes()
    assert (outcomes.state == State.DONE).all()
    assert (outcomes.replica[trace().table["arrival_s"] > 5] == 0).all()


def test_a_slow_replica_takes_so_many_times_as_long() -> None:
    lone = episode(1.0, 700, 50)
    well = played(cluster(), lone).outcomes()
    slow = [{"at_s": 0, "replica": r, "kind": "slow", "factor": 3} for r in ("r0", "r1")]
    unwell = played(cluster(faults=slow), lone).outcomes()
    assert unwell.e2e_s[0] == pytest.approx(3 * well.e2e_s[0])


def test_random_faults_are_the_same_for_the_same_requests() -> None:
    made = cluster(random_faults={"mean_up_s": 5, "mean_down_s": 1})
    table = faults_of(made, trace())
    assert len(table) > 2
    assert (np.diff(table["time_s"]) >= 0).all()
    assert faults_of(made, trace()).tobytes() == table.tobytes()
    assert faults_of(made, trace(seed=1)).tobytes() != table.tobytes()
    state = played(made, trace()).outcomes().state
    assert (state != State.PENDING).all()


def test_metrics_are_as_old_as_the_last_scrape() -> None:
    runtime = SimulatedRuntime(cluster(scrape_s=1.0))
    runtime.reset(trace())
    more, ages = runtime.advance(), []
    while more:
        ages.append(runtime.rows[:2, COLUMN["metrics_age"]].copy())
        more = runtime.step(0)
    assert np.max(ages) <= 1.0
    assert np.mean(ages) == pytest.approx(0.5, abs=0.1)


def test_gateways_do_not_know_of_each_others_requests() -> None:
    alone, two = SimulatedRuntime(cluster()), SimulatedRuntime(cluster(gateways=2))
    seen = []
    for runtime in (alone, two):
        runtime.reset(episode(np.arange(200) * 1e-3, 1000, 200))
        more, most = runtime.advance(), 0.0
        while more:
            most = max(most, float(runtime.rows[0, COLUMN["inflight"]]))
            more = runtime.step(0)
        seen.append(most)
    assert seen[0] == 199
    assert 80 < seen[1] < 120


def test_a_fault_of_no_replica_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        yaml.safe_dump(fleet({}).model_dump() | {"faults": [{"at_s": 1, "replica": "r7", "kind": "crash"}]})
    )
    with pytest.raises(UserError, match="there is no replica 'r7'"):
        load_fleet(path)


def test_time_does_not_run_back_for_a_retry_whose_client_has_left() -> None:
    """The other retry waits behind it for an iteration of a replica that decodes all the time."""
    requests = episode([0.0, 0.1, 0.1], [10, 9000, 10], [500, 5, 5])
    requests.table["cancel_s"] = [0.0, 0.01, 0.0]
    runtime = SimulatedRuntime(fleet({"token_budget": 20000}, {"token_budget": 20000}))
    runtime.reset(requests, faults([(0.25, 0, Kind.CRASH, 1.0)]))
    runtime.replay(np.array([1, 0, 0, 1, 1]))
    outcomes = runtime.outcomes()
    assert outcomes.state.tolist() == [State.DONE, State.CANCELLED, State.DONE]
    assert 0.1 + outcomes.ttft_s[2] > 0.25


def test_a_crash_forgets_who_was_served() -> None:
    """The first tenant was served before the crash; after it, the first request in the queue is the next."""
    requests = episode([0.0, 3.0, 3.001, 3.002], [400, 10, 10, 10], [1, 20, 1, 1], tenant=[0, 1, 0, 1])
    runtime = SimulatedRuntime(fleet({"max_num_seqs": 1, "queue": "vtc"}))
    runtime.reset(requests, faults([(1.0, 0, Kind.CRASH, 1.0), (2.0, 0, Kind.START, 1.0)]))
    runtime.replay(np.zeros(4))
    first_token_s = requests.table["arrival_s"] + runtime.outcomes().ttft_s
    assert first_token_s[2] < first_token_s[3]
