"""The space in which a search over the scorer's weights moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from steersman.agents.scorer import Scorer
from steersman.runtime.network import Architecture, behind, parameters
from steersman.runtime.observation import CANDIDATE_FEATURES, COLUMN, WIDTH
from steersman.training.config import TrainingConfig, VariantsConfig
from steersman.training.directions import covariance, directions, whitening
from steersman.training.job import Job
from steersman.training.run import Run

ARCHITECTURE = Architecture(gates=("burst",))


def small(folder: Path, architecture: Architecture) -> Job:
    config = TrainingConfig(
        description="Small.",
        workload="smoke",
        episode_s=5,
        architecture=architecture,
        variants=VariantsConfig(share=0),
    )
    return Job(Run(folder, config), Console(quiet=True), None)


def observations(decisions: int = 400, replicas: int = 4) -> np.ndarray:
    """Two features of replicas that differ, one a hundred times as much as the other; hold is over."""
    rng = np.random.default_rng(0)
    rows = np.zeros((decisions, replicas + 2, WIDTH), np.float32)
    rows[:, :replicas, COLUMN["is_replica"]] = 1
    rows[:, :replicas, COLUMN["price"]] = 0.01 * rng.normal(size=(decisions, replicas))
    rows[:, :replicas, COLUMN["prefill_load"]] = 0.25 * rng.normal(size=(decisions, replicas))
    rows[..., COLUMN["burst"]] = rng.uniform(size=(decisions, 1))
    return rows


def scores(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    scorer = Scorer(ARCHITECTURE)
    scorer.set_weights(weights)
    with torch.no_grad():
        return scorer(torch.from_numpy(rows)).double().numpy()


def spread(scores: np.ndarray) -> float:
    """Mean square of the differences between real candidates: all rows but hold, which is no candidate here."""
    real = np.delete(scores, -2, axis=1)
    return float(np.square(real - real.mean(axis=1, keepdims=True)).mean())


def test_the_covariance_is_that_of_the_scores() -> None:
    rows, weights = observations(), np.random.default_rng(1).normal(size=parameters(ARCHITECTURE))
    assert weights @ covariance(rows, ARCHITECTURE) @ weights == pytest.approx(spread(scores(rows, weights)), rel=1e-4)


def test_a_feature_that_differs_little_gets_the_larger_steps() -> None:
    rows = observations()
    steps = whitening(covariance(rows, ARCHITECTURE))
    size = np.sqrt(np.square(steps).sum(axis=1)).reshape(CANDIDATE_FEATURES, -1)
    assert size[COLUMN["price"], 0] > 3 * size[COLUMN["prefill_load"], 0]


def test_steps_in_all_directions_change_scores_as_much_as_steps_in_all_weights() -> None:
    rows, rng = observations(), np.random.default_rng(2)
    steps = whitening(covariance(rows, ARCHITECTURE))
    drawn = rng.normal(size=(300, len(steps)))
    plain, whitened = (
        np.mean([spread(scores(rows, basis @ z)) for z in drawn]) for basis in (np.eye(len(steps)), steps)
    )
    assert whitened == pytest.approx(plain, rel=0.2)


def test_where_no_candidate_differs_weights_are_searched_as_they_are() -> None:
    same = np.zeros((5, 4, WIDTH), np.float32)
    assert (whitening(covariance(same, ARCHITECTURE)) == np.eye(parameters(ARCHITECTURE))).all()


def test_an_mlp_is_searched_in_typical_weights(tmp_path: Path) -> None:
    architecture = Architecture(hidden=(2,))
    job = small(tmp_path, architecture)
    start = np.random.default_rng(0).normal(size=parameters(architecture))
    found = directions(job, start)
    searched = ~behind(architecture, "slo_guessed")
    bilinear, mlp = CANDIDATE_FEATURES * (1 + len(architecture.gates)), 2 * WIDTH + 2 + 2
    unit = np.sqrt(np.mean(start[searched] ** 2))
    assert found[bilinear:, -mlp:] == pytest.approx(unit * np.eye(mlp))
    assert not found[:bilinear, -mlp:].any()
    moved = found[np.flatnonzero(searched[:bilinear])]
    assert (np.sqrt(np.square(moved).sum(axis=1)) > 2 * unit).all()  # most hardly move scores
    job.close()


@pytest.mark.parametrize("guessed", [False, True])
def test_what_counts_where_slos_are_guesses_is_searched_alone(tmp_path: Path, guessed: bool) -> None:
    architecture = Architecture(gates=("burst", "slo_guessed"))
    job = small(tmp_path, architecture)
    own = behind(architecture, "slo_guessed")
    start = np.where(own, 0.0, np.random.default_rng(0).normal(size=parameters(architecture)))
    found = directions(job, start, guessed=guessed)
    job.close()
    assert found.shape == (len(start), (own if guessed else ~own).sum())
    assert (found.any(axis=1) == (own if guessed else ~own)).all()
