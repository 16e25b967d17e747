"""Decisions that the scorer imitates."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.training.imitate import thinned

HOLD = 3  # of five candidates


def decisions(held: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    actions = np.array([HOLD] * held + [0, 1, 4] * (other // 3), np.int32)
    np.random.default_rng(1).shuffle(actions)
    rows = np.zeros((len(actions), 5, 2), np.float32)
    rows[:, 0, 0] = np.arange(len(actions))
    return rows, actions


@pytest.mark.parametrize(("share", "left"), [(0.0, 0), (0.1, 3), (1.0, 30), (9.0, 90)])
def test_decisions_to_hold_are_thinned(share: float, left: int) -> None:
    rows, actions = thinned(*decisions(90, 30), share, np.random.default_rng(0))
    assert (actions == HOLD).sum() == left
    assert (actions != HOLD).sum() == 30
    assert len(rows) == len(actions)


def test_a_decision_keeps_its_observation_and_its_place() -> None:
    before = decisions(90, 30)
    rows, actions = thinned(*before, 0.5, np.random.default_rng(0))
    numbers = rows[:, 0, 0].astype(int)
    assert (before[1][numbers] == actions).all()
    assert (np.diff(numbers) > 0).all()
