"""push-shed: what is viable, what is cheapest, and what is shed."""

from __future__ import annotations

import numpy as np
import pytest
from situations import choice, situation

from steersman.agents.heuristics.push_shed import PARAMS, POLICY

SHED = 3
# No cost but that of the times, and no threshold but those that a test sets.
PLAIN = POLICY.with_params(
    **dict.fromkeys(("harm", "lost", "prefill", "load", "kv", "match", "miss", "fairness"), 0.0),
    ttft_strict=1.0,
    ttft_loose=1.0,
    tpot_strict=1.0,
    tpot_loose=1.0,
    strict_tpot_s=0.01,
    loose_tpot_s=1.0,
    shed_harm=1e9,
    shed_ttft_strict=1.5,
    shed_ttft_loose=1.5,
    shed_tpot_strict=1.5,
    shed_tpot_loose=1.5,
)


def test_sends_to_the_least_time_relative_to_the_targets() -> None:
    # u + v: 0.9 + 0.2, 0.3 + 0.7
    assert choice(PLAIN, situation(2, ttft_slack=[0.1, 0.7], tpot_slack=[0.8, 0.3])) == 1


@pytest.mark.parametrize("column", ["ttft_slack", "tpot_slack"])
def test_sheds_exactly_beyond_the_threshold(column: str) -> None:
    assert choice(PLAIN, situation(2, **{column: -0.499})) != SHED
    assert choice(PLAIN, situation(2, **{column: -0.501})) == SHED


def test_pushes_while_one_replica_is_viable() -> None:
    assert choice(PLAIN, situation(2, ttft_slack=[-0.6, -0.4])) == 1
    assert choice(PLAIN, situation(2, ttft_slack=[-0.6, -0.4], masked=(1,))) == SHED


def test_a_viable_replica_wins_whatever_it_costs() -> None:
    policy = PLAIN.with_params(kv=20.0, kv_reserve=0.6)
    assert choice(policy, situation(2, ttft_slack=[0.9, 0.0], tpot_slack=[-0.6, 0.0], kv_headroom=[1, -9e3])) == 1


@pytest.mark.parametrize(
    ("tpot_slo", "threshold"),
    [
        (0.01, 1.0),
        (0.1, 2.0),
        (1.0, 3.0),
        (0.001, 1.0),
        (50.0, 3.0),
    ],  # by the logarithm of the target, clipped
)
@pytest.mark.parametrize("time", ["ttft", "tpot"])
def test_thresholds_lie_between_those_of_the_strict_and_the_loose_class(
    time: str, tpot_slo: float, threshold: float
) -> None:
    policy = PLAIN.with_params(**{f"shed_{time}_strict": 1.0, f"shed_{time}_loose": 3.0})
    for excess, shed in ((-0.01, False), (0.01, True)):
        observation = situation(2, tpot_slo=tpot_slo, **{f"{time}_slack": 1 - threshold - excess})
        assert (choice(policy, observation) == SHED) is shed


def test_sheds_what_would_harm_too_many_others() -> None:
    policy = PLAIN.with_params(shed_harm=3)
    assert choice(policy, situation(2, others_harmed=[4, 3])) == 1
    assert choice(policy, situation(2, others_harmed=[4, 4])) == SHED


def test_a_tenant_that_fares_better_than_the_worst_is_shed_earlier() -> None:
    policy = PLAIN.with_params(fairness=1.0)
    slack = {"ttft_slack": -0.3, "worst_attainment": 0.6}  # u = 1.3 against 1.5 · f
    assert choice(policy, situation(2, tenant_attainment=0.6, **slack)) != SHED  # f = 1
    assert choice(policy, situation(2, tenant_attainment=0.8, **slack)) == SHED  # f = 0.8: 1.2


@pytest.mark.parametrize(
    ("weight", "column", "worse"),
    [
        ("harm", "others_harmed", [2, 1]),
        ("lost", "others_lost", [1, 2]),
        ("prefill", "prefill_time", [0.5, 0.2]),
        ("load", "prefill_load", [0.5, 0.2]),
        ("kv", "kv_headroom", [0.01, 0.02]),
        ("match", "matched_tokens", [100, 900]),
    ],
)
def test_each_weight_moves_the_choice(weight: str, column: str, worse: list[float]) -> None:
    observation = situation(2, **{"kv_headroom": 1, column: worse})
    assert choice(PLAIN.with_params(kv_reserve=0.1), observation) == 0  # a tie without the weight
    assert choice(PLAIN.with_params(kv_reserve=0.1, **{weight: 1.0}), observation) == 1


def test_the_miss_term_grows_beyond_the_margin() -> None:
    observation = situation(2, ttft_slack=[-0.2, 0.3], tpot_slack=[0.8, 0.2])  # u + v: 1.4, 1.5; u: 1.2, 0.7
    assert choice(PLAIN, observation) == 0
    assert choice(PLAIN.with_params(miss=1.0, ttft_margin=1.0, tpot_margin=1.0, sharpness=40), observation) == 1


@pytest.mark.parametrize("edge", ["low", "high"])
def test_scores_are_finite_at_the_ends_of_every_range(edge: str) -> None:
    policy = POLICY.with_values(np.array([getattr(param, edge) for param in PARAMS.values()]))
    rows, mask = situation(3, ttft_slack=[-1e4, 0, 1], tpot_slack=[-1e4, 1, 0], kv_headroom=[-1e4, 0, 1], tpot_slo=1e-4)
    assert np.isfinite(policy.bind().score(rows, mask)).all()


def test_every_default_lies_in_its_range() -> None:
    assert all(param.low <= param.default <= param.high for param in PARAMS.values())
