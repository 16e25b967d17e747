"""The benchmarks measure what they say; how fast it is, no test says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated import fleet

from steersman.envs.sb3 import SB3VecEnv
from steersman.envs.vector import DispatchVectorEnv
from steersman.runtime.errors import UserError
from steersman.runtime.network import Architecture, parameters
from steersman.training.bench import canary, decision, journal, show
from steersman.training.bench.training import FreeVecEnv
from steersman.training.export import export_bundle


def test_a_decision_is_timed_in_all_its_parts() -> None:
    figures = decision.bench(None, rounds=20)
    for part in ("", "compiled_", "observe_", "decide_"):
        median, tail = figures[f"{part}p50_us"], figures[f"{part}p99_us"]
        assert set(median) == set(tail) == {"16", "256"}
        assert all(0 < median[size] <= tail[size] for size in median)
    assert figures["weights"] == parameters(Architecture())


def test_the_policy_that_is_timed_is_the_one_given(tmp_path: Path) -> None:
    architecture = Architecture(gates=(), hidden=(4,))
    facts: dict[str, Any] = {"fleet": {}, "workload": {}, "seeds": {}, "scorecard": {}, "command": "a test"}
    weights = np.zeros(parameters(architecture))
    export_bundle(tmp_path / "bundle", architecture=architecture, weights=weights, name="small", **facts)
    figures = decision.bench(tmp_path / "bundle", rounds=2)
    assert (figures["policy"], figures["weights"]) == ("small", parameters(architecture))
    with pytest.raises(UserError, match="nowhere"):
        decision.bench(tmp_path / "nowhere", rounds=2)


def test_the_journal_is_measured_with_every_decision_written() -> None:
    figures = journal.bench(requests=300)
    assert figures["requests"] == 300
    assert figures["decisions"] >= 300
    assert figures["dropped"] == 0
    assert 0 < figures["decided_p50_us"] <= figures["decided_p99_us"]
    assert figures["writing_cpu_us_per_decision"] > 0
    assert figures["bytes_per_decision"] > 50


@pytest.fixture
def recorded() -> tuple[SB3VecEnv, FreeVecEnv]:
    real = SB3VecEnv(DispatchVectorEnv(3, "smoke", fleet({}, {})))
    real.seed(5)
    return real, FreeVecEnv(real, 6)


def test_the_free_environment_hands_out_what_the_real_one_gave(recorded: tuple[SB3VecEnv, FreeVecEnv]) -> None:
    real, free = recorded
    assert free.observation_space == real.observation_space
    assert free.action_space == real.action_space
    again = SB3VecEnv(DispatchVectorEnv(3, "smoke", fleet({}, {})))
    again.seed(5)
    assert np.array_equal(again.reset(), free.reset())
    masks = np.stack(again.env_method("action_masks"))
    assert np.array_equal(masks, np.stack(free.env_method("action_masks")))
    chances = np.random.default_rng(0).random(masks.shape)
    for theirs, ours in zip(again.step((chances * masks).argmax(axis=1)), free.step(np.zeros(3)), strict=True):
        assert np.array_equal(theirs, ours)


def test_the_free_environment_goes_round_in_a_circle(recorded: tuple[SB3VecEnv, FreeVecEnv]) -> None:
    free = recorded[1]
    first = [free.step(np.zeros(3))[0] for _ in range(6)]
    second = [free.step(np.ones(3))[0] for _ in range(6)]
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], first[1])


def test_a_canary_that_is_worse_is_taken_back_more_often_than_one_that_is_not() -> None:
    rows = canary.bench(canaries=4, requests=6000)["rows"]
    shares = {(row["current"], row["canary"], row["share"]): row["taken_back"] for row in rows}
    assert shares[0.95, 0.95, 0.1] < shares[0.95, 0.9, 0.5]
    assert "taken back" in [
        column.header for column in show.canary_table({"canaries": 4, "requests": 6000, "rows": rows}).columns
    ]
