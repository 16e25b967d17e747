"""Fidelity: errors, orders and the report, with a simulated fleet in the part of the real one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated import FASTEST, episode, fleet

from steersman.agents.policies import resolve
from steersman.runtime.configs import find_config
from steersman.runtime.draw import draw
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import load_fleet, with_profiles
from steersman.runtime.outcomes import Episode
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import load_workload
from steersman.training.fidelity import Played, as_report, kendall, measures, occupancy, throughput
from steersman.training.fidelity_report import cdf_figure, metrics_table, ranks_table
from steersman.training.validate import at_rate, capacity_rps, simulate

TWO = fleet({}, {"profile": "llama-3.1-8b-l40s-bf16"})
LIMITS = TWO.table()["max_num_seqs"]


def real(policy: str = "round-robin", seed: int = 0) -> Episode:
    rng = np.random.default_rng(seed)
    requests = episode(np.sort(rng.uniform(0, 20, 200)), rng.integers(20, 2000, 200), rng.integers(1, 120, 200))
    runtime = SimulatedRuntime(TWO)
    runtime.reset(requests)
    runtime.run(resolve(policy))
    return runtime.episode


def played(load: float = 1.0, policy: str = "round-robin", seed: int = 0) -> Played:
    return simulate(TWO, load, resolve(policy), real(policy, seed), 0)


def slower(one: Played, factor: float) -> Played:
    columns = {name: getattr(one.real.outcomes, name) / factor for name in ("ttft_s", "tpot_s", "e2e_s")}
    return one._replace(real=replace(one.real, outcomes=replace(one.real.outcomes, **columns)))


@pytest.mark.parametrize("policy", ["round-robin", "simulated:PATIENT"])
def test_an_engine_like_the_simulator_gives_no_error(policy: str) -> None:
    assert real(policy).outcomes.holds.any() == (policy == "simulated:PATIENT")
    for name, one in measures([played(policy=policy)], LIMITS).items():
        assert one.error == pytest.approx(0.0, abs=1e-9), name
        assert one.low == pytest.approx(0.0, abs=1e-9)


def test_the_error_is_a_fraction_of_the_real_figure_and_has_an_interval() -> None:
    found = measures([slower(played(), 1.25)], LIMITS)
    for name in ("ttft_mean", "ttft_p90", "e2e_p99", "tpot_p50"):
        assert found[name].error == pytest.approx(0.25)
        assert found[name].low <= found[name].error + 1e-9
        assert found[name].high >= found[name].error - 1e-9


def test_throughput_and_occupancy_are_counted_within_the_window() -> None:
    kept = real()
    assert throughput(kept) <= kept.requests.table["output_tokens"].sum() / kept.duration_s
    assert 0 < occupancy(kept, LIMITS) < 1
    held = kept.outcomes.e2e_s.sum() / kept.duration_s / LIMITS.sum()
    assert 0.8 * held < occupancy(kept, LIMITS) <= held  # less what ends after the window


def test_kendalls_tau() -> None:
    a = {"x": 1.0, "y": 2.0, "z": 3.0}
    assert kendall(a, a) == (1.0, [])
    assert kendall(a, {"x": 3.0, "y": 2.0, "z": 1.0}) == (-1.0, [("x", "y"), ("x", "z"), ("y", "z")])
    tau, disagree = kendall(a, {"x": 2.0, "y": 1.0, "z": 3.0})
    assert tau == pytest.approx(1 / 3)
    assert disagree == [("x", "y")]
    assert np.isnan(kendall({"x": 1.0}, {"x": 1.0})[0])
    assert kendall(a, {"x": 1.0, "y": 1.0, "z": 2.0})[0] == pytest.approx(2 / 6**0.5)


def test_the_report_has_the_stated_shape_and_is_json(tmp_path: Path) -> None:
    some = [played(load, policy) for load in (0.5, 0.8) for policy in ("round-robin", "least-requests", "jsed")]
    report = json.loads(json.dumps(as_report(some, LIMITS)))
    assert [one["load"] for one in report["loads"]] == [0.5, 0.8]
    assert set(report["loads"][0]["metrics"]["ttft_mean"]) == {"real", "simulated", "error", "low", "high"}
    names = {f"{m}_{s}" for m in ("ttft", "tpot", "e2e") for s in ("mean", "p50", "p90", "p99")}
    assert set(report["loads"][0]["metrics"]) == names | {"throughput", "occupancy", "prefix_hit"}
    assert report["kendall_tau"] == 1.0
    assert [(r["load"], r["by"]) for r in report["ranks"]] == [
        (load, by) for load in (0.5, 0.8) for by in ("ttft_mean", "goodput")
    ]
    assert metrics_table(report).row_count == 15
    assert ranks_table(report).row_count == 4
    cdf_figure(some).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_one_policy_is_not_ranked() -> None:
    report = as_report([played()], LIMITS)
    assert report["kendall_tau"] is None
    assert all(rank["tau"] is None for rank in report["ranks"])


def test_the_capacity_is_what_is_completed_under_a_flood() -> None:
    local, workload = load_fleet(find_config("fleets", "local")), load_workload(find_config("workloads", "local"))
    capacity = capacity_rps(local, workload, 0)
    assert 0.5 < capacity < 50


def test_profiles_are_given_for_all_groups_or_for_one() -> None:
    local = load_fleet(find_config("fleets", "local"))
    assert [g.profile for g in with_profiles(local, ["smollm2-q4_1"]).groups] == ["smollm2-q4_1"] * 2
    assert [g.profile for g in with_profiles(local, ["slow=smollm2-q8_0"]).groups] == ["smollm2-q8_0"] * 2
    with pytest.raises(UserError, match="no group 'sloww'; did you mean 'slow'"):
        with_profiles(local, ["sloww=smollm2-q8_0"])
    with pytest.raises(UserError, match="there is no cost profile 'nothing'"):
        with_profiles(local, ["nothing"])


def test_the_policy_in_use_is_any() -> None:
    assert simulate(TWO, 1.0, FASTEST, real(), 0).policy == "fastest"


def test_arrivals_are_stretched_to_the_rate() -> None:
    drawn = draw(load_workload(find_config("workloads", "local")), load_fleet(find_config("fleets", "local")), 1)
    stretched = at_rate(drawn, 3.5)
    assert len(stretched) / stretched.window_s == pytest.approx(3.5)
    assert stretched.table["arrival_s"][-1] < stretched.window_s
    gaps = np.diff(stretched.table["arrival_s"]) / np.diff(drawn.table["arrival_s"])
    assert gaps == pytest.approx(stretched.window_s / drawn.window_s)
