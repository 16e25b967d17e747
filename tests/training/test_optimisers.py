"""What proposes the numbers of a search."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.training.optimisers import DECAY, Ars, CmaEs, Optimiser

BEST = np.array([1.0, -2.0, 0.5, 0.0])


def make(kind: str, seed: int = 0) -> Optimiser:
    return (CmaEs if kind == "cma-es" else Ars)(np.zeros(4), sigma=0.3, population=8, seed=seed)


def distance(x: np.ndarray) -> float:
    return float(np.square(x - BEST).sum())


@pytest.mark.parametrize("kind", ["cma-es", "ars"])
def test_it_climbs_to_the_top_of_a_hill(kind: str) -> None:
    optimiser = make(kind)
    for _ in range(80):
        optimiser.tell(np.array([-distance(x) for x in optimiser.ask()]))
    assert distance(optimiser.mean) < 0.15 * distance(np.zeros(4))


@pytest.mark.parametrize("kind", ["cma-es", "ars"])
def test_the_seed_alone_decides_what_is_asked(kind: str) -> None:
    asked = [np.stack(make(kind, seed).ask()) for seed in (3, 3, 4)]
    assert asked[0].shape == (8, 4)
    assert (asked[0] == asked[1]).all()
    assert (asked[0] != asked[2]).any()


def test_ars_asks_for_opposites() -> None:
    optimiser = make("ars")
    asked = np.stack(optimiser.ask())
    assert asked[:4] + asked[4:] == pytest.approx(2 * optimiser.mean + np.zeros((4, 4)))


def test_ars_stays_where_nothing_makes_a_difference() -> None:
    optimiser = make("ars")
    optimiser.ask()
    optimiser.tell(np.full(8, 0.7))
    assert (optimiser.mean == 0).all()


def test_ars_moves_towards_the_better_of_two_opposites() -> None:
    optimiser = Ars(np.zeros(1), sigma=0.1, population=2, seed=0)
    up, _ = sorted((float(x[0]) for x in optimiser.ask()), reverse=True)
    optimiser.tell(np.array([x[0] for x in optimiser.mean + optimiser.spread * np.stack([[up], [-up]])]))
    assert optimiser.mean[0] != 0


def test_ars_goes_back_where_nothing_makes_a_difference_any_more() -> None:
    optimiser = make("ars")
    for _ in range(5):
        optimiser.tell(np.array([x[0] for x in optimiser.ask()]))
    reached = np.mean(optimiser.ask(), axis=0)
    optimiser.tell(np.zeros(8))
    assert np.mean(optimiser.ask(), axis=0) == pytest.approx((1 - DECAY) * reached)


def test_ars_gives_the_mean_of_the_last_half_of_where_it_was() -> None:
    optimiser = make("ars")
    centres = []
    for _ in range(12):
        asked = np.stack(optimiser.ask())
        centres.append(asked.mean(axis=0))
        given = optimiser.mean
        optimiser.tell(np.array([-distance(x) for x in asked]))
    assert given == pytest.approx(np.mean(centres[-6:], axis=0))
    assert given != pytest.approx(centres[-1])
