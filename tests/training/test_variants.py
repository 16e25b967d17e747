"""Variants of a workload and its fleet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from steersman.agents.policies import resolve
from steersman.runtime.configs import find_config
from steersman.runtime.fleet import Fault, load_fleet
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import Workload, load_workload
from steersman.training.config import TrainingConfig, VariantsConfig
from steersman.training.drawn import Drawn, Recipe, drawn
from steersman.training.job import Job
from steersman.training.objective import Arena
from steersman.training.run import Run
from steersman.training.variants import told_alike, variant

WORKLOAD = load_workload(find_config("workloads", "default"))
FLEET = load_fleet(find_config("fleets", "default"))
MANY = 60


def episode(number: int | None, seed: int = 0, guessed: bool = False) -> Drawn:
    return drawn(WORKLOAD, FLEET, Recipe(seed, 0.5, "train", 5.0, number, guessed))


@pytest.mark.parametrize("number", range(0, MANY, 7))
def test_a_variant_is_the_same_each_time_and_no_other(number: int) -> None:
    made, again, other = (variant(WORKLOAD, FLEET, n) for n in (number, number, number + 1))
    assert made == again
    assert made.fleet != other.fleet
    assert made.workload.tenants != other.workload.tenants


def test_every_variant_is_a_valid_workload_and_fleet_that_holds_its_requests() -> None:
    for number in range(MANY):
        made = variant(WORKLOAD, FLEET, number)
        assert type(FLEET).model_validate(made.fleet.model_dump()) == made.fleet
        written = made.workload.model_dump()
        assert Workload.model_validate(written).model_dump() == written
        assert len(episode(number)) > 0


def test_a_fault_of_a_replica_that_the_variant_lacks_is_left_out() -> None:
    faulty = FLEET.model_copy(update={"faults": [Fault(at_s=1, replica=name, kind="crash") for name in FLEET.names]})
    for number in range(MANY):
        made = variant(WORKLOAD, faulty, number).fleet
        assert [fault.replica for fault in made.faults] == [name for name in FLEET.names if name in made.names]
        SimulatedRuntime(made).reset(episode(number))


def test_the_total_rate_stays() -> None:
    for number in range(MANY):
        assert variant(WORKLOAD, FLEET, number).workload.offered_rps == pytest.approx(WORKLOAD.offered_rps)


@pytest.mark.parametrize("number", range(0, MANY, 7))
def test_with_guessed_slos_a_variant_differs_in_what_is_told_alone(number: int) -> None:
    plain, guessed = (variant(WORKLOAD, FLEET, number, g) for g in (False, True))
    assert plain.told is None
    assert guessed.told is not None
    assert guessed._replace(told=None) == plain
    true = [t.slo.ttft_s for t in guessed.workload.tenants.values()]
    told = {t.slo for t in guessed.told.values()}
    assert len(told) == 1
    assert min(true) <= min(s.ttft_s for s in told) <= max(true)
    assert all(s.guessed for s in told)


def test_the_fleet_does_not_depend_on_the_workload() -> None:
    shorter = WORKLOAD.model_copy(update={"tenants": {"chat": WORKLOAD.tenants["chat"]}})
    assert variant(shorter, FLEET, 5).fleet == variant(WORKLOAD, FLEET, 5).fleet


def test_the_variants_differ_in_all_that_they_are_said_to() -> None:
    made = [variant(WORKLOAD, FLEET, number) for number in range(MANY)]
    fleets = [v.fleet for v in made]
    assert {f.gateways for f in fleets} == {1, 2, 3}
    assert min(f.scrape_s for f in fleets) == 0 < max(f.scrape_s for f in fleets) < 6
    assert {f.random_faults is None for f in fleets} == {True, False}
    assert {f.replicas[1].count for f in fleets} == {2, 4, 8}
    fast = [f.replicas[0].cost.decode_a_s / FLEET.replicas[0].cost.decode_a_s for f in fleets]
    assert min(fast) < 0.7 < 1.4 < max(fast)
    assert all(
        1 <= b[0] <= b[1] for b in (v.workload.tenants["chat"].source["arrivals"]["bursts"]["factor"] for v in made)
    )


def test_told_alike_says_the_same_slos_of_all_tenants_and_nothing_else() -> None:
    told = told_alike(WORKLOAD.tenants)
    assert {t.slo.ttft_s for t in told.values()} == {2.1}  # between the agents' 1.2 and the documents' 3
    assert all(t.slo.guessed for t in told.values())
    assert [t.expected_output_tokens for t in told.values()] == [
        t.expected_output_tokens for t in WORKLOAD.tenants.values()
    ]


def test_a_policy_that_is_told_wrong_slos_is_judged_by_the_true_ones() -> None:
    requests = episode(0, guessed=True)
    assert requests.judged is not None
    assert len({t.slo.ttft_s for t in requests.tenants.values()}) == 1
    arena = Arena(FLEET, 1)
    played = arena.episode(resolve("round-robin"), requests, 0)
    arena.close()
    slo = np.array([t.slo.ttft_s for t in requests.judged.values()])[requests.table["tenant"]]
    assert (played.outcomes.ttft_s[played.outcomes.attained] <= slo[played.outcomes.attained]).all()
    assert played.outcomes.attained.any()


@pytest.mark.parametrize("number", [None, 3, 11])
def test_an_arena_plays_a_variant_on_its_own_fleet(number: int | None) -> None:
    requests, policy = episode(number), resolve("push-hold-shed")
    arena = Arena(FLEET, 1)
    arena.episode(policy, episode(7), 0)  # another fleet's episode before it changes nothing
    played = arena.episode(policy, requests, 0)
    arena.close()
    alone = SimulatedRuntime(FLEET if number is None else variant(WORKLOAD, FLEET, number).fleet)
    alone.reset(requests)
    alone.run(policy, 0)
    assert played.outcomes.e2e_s.tobytes() == alone.episode.outcomes.e2e_s.tobytes()
    assert played.outcomes.replica.max() < len(alone.replicas)


def test_a_pool_has_variants_behind_the_episodes_of_each_load(tmp_path: Path) -> None:
    config = TrainingConfig(description="", loads=[1, 2], episode_s=5.0, variants=VariantsConfig(share=0.25, count=2))
    job = Job(Run(tmp_path, config), Console(quiet=True), None)
    job.load, job.variants = 0.1, [(3, 0.5), (5, 0.2)]
    pool = job.pool(100, 8)
    job.close()
    recipes = [one.recipe for one in pool if isinstance(one, Drawn)]
    assert [r.seed for r in recipes if r] == list(range(100, 108))
    assert [r.variant for r in recipes if r] == [None, None, None, 5, None, None, None, 5]
    assert [r.load for r in recipes if r] == [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.4]
