"""The plan of `steersman bench ray`: what more cores would give, on paper."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("ray")

from steersman.training.bench.plan import CORES, SIZES, generation_s, plan
from steersman.training.bench.show import plan_table

EPISODES_S = np.full(1536, 0.006)
FREE_S = 1e-12


def test_what_costs_nothing_divides_the_time_by_the_cores() -> None:
    assert EPISODES_S.sum() / generation_s(EPISODES_S, 16, 0.0, FREE_S) == pytest.approx(16, rel=0.02)


def test_a_driver_gives_no_more_than_it_can_hand_out() -> None:
    """With more workers than episodes each part is one, and all of them go through the driver."""
    assert generation_s(EPISODES_S, 4096, 0.0, 1 / 2000) == pytest.approx(1536 / 2000 + 0.006)


def test_a_generation_cannot_end_before_its_longest_episode_is_back() -> None:
    assert generation_s(np.array([0.1, 0.001]), 4, 0.01, FREE_S) == pytest.approx(0.1 + 2 * 0.01)


def test_every_number_of_cores_has_a_row() -> None:
    found = plan([0.004, 0.008], 0.0008, 2000.0)
    assert [row["cores"] for row in found["rows"]] == list(CORES)
    assert plan_table({"plan": found}).row_count == len(CORES)
    assert all(len(row["generations"]) == len(SIZES) for row in found["rows"])
