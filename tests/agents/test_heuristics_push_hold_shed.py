"""push-hold-shed: who waits, and for how long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from situations import choice, situation
from test_heuristics_properties import observations

from steersman.agents.heuristics import push_hold_shed, push_shed
from steersman.agents.heuristics.push_hold_shed import PARAMS, POLICY
from steersman.runtime.policy import pick

HOLD, SHED = 2, 3
PLAIN = POLICY.with_params(strict_tpot_s=0.01, loose_tpot_s=1.0, room_strict=2.0, room_loose=0.9, urgency=0.3, hope=0.2)
LOOSE, STRICT = {"tpot_slo": 1.0}, {"tpot_slo": 0.01}


@pytest.mark.parametrize(("tpot_s", "chosen"), [(0.0089, 0), (0.0091, HOLD)])
def test_a_loose_request_is_held_while_no_replica_has_room_to_spare(tpot_s: float, chosen: int) -> None:
    assert choice(PLAIN, situation(2, predicted_tpot=[tpot_s, 0.001], ttft_slack=[0.9, 0.1], **LOOSE)) == chosen


def test_a_strict_one_is_sent_there() -> None:
    assert choice(PLAIN, situation(2, predicted_tpot=0.0199, **STRICT)) == 0
    assert choice(PLAIN, situation(2, predicted_tpot=0.0201, **STRICT)) == HOLD


def test_the_longer_it_has_waited_the_less_room_it_asks_for() -> None:
    # 0.9 + 0.3 · 0.5 = 1.05
    assert choice(PLAIN, situation(2, predicted_tpot=0.0104, patience=0.5, **LOOSE)) == 0
    assert choice(PLAIN, situation(2, predicted_tpot=0.0104, patience=0.6, **LOOSE)) == HOLD


@pytest.mark.parametrize(("patience", "chosen"), [(0.21, HOLD), (0.19, SHED), (None, SHED)])
def test_who_would_be_late_everywhere_is_held_while_there_is_hope_and_then_shed(
    patience: float | None, chosen: int
) -> None:
    assert choice(PLAIN, situation(2, ttft_slack=-1.0, patience=patience)) == chosen


def test_of_viable_and_other_replicas_only_the_viable_ones_count() -> None:
    full, spare = 0.02, 0.001
    assert choice(PLAIN, situation(2, ttft_slack=[-1.0, 0.5], predicted_tpot=[full, spare], **LOOSE)) == 1
    assert choice(PLAIN, situation(2, ttft_slack=[-1.0, 0.5], predicted_tpot=[spare, full], **LOOSE)) == HOLD


@given(observation=observations)
@settings(max_examples=200, deadline=None)
def test_where_it_may_not_hold_it_is_push_shed(observation: tuple[np.ndarray, np.ndarray]) -> None:
    rows, mask = observation
    mask[-2] = False
    assert pick(POLICY.bind().score(rows, mask), mask) == pick(push_shed.POLICY.bind().score(rows, mask), mask)


def test_its_parameters_are_those_of_push_shed_and_its_own() -> None:
    assert list(PARAMS)[: push_hold_shed.FIRST] == list(push_shed.PARAMS)
    assert list(PARAMS)[push_hold_shed.FIRST :] == ["room_strict", "room_loose", "urgency", "hope"]
