"""What is learned for SLOs that are guesses, and where nothing is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from steersman.agents.policies import resolve
from steersman.runtime.network import Architecture, behind, parameters
from steersman.training.config import SearchConfig, TrainingConfig, VariantsConfig
from steersman.training.guesses import learn_guesses, prepare_guesses
from steersman.training.job import Job
from steersman.training.run import Run

SEARCH = SearchConfig(population=4, generations=1, episodes=3, pool=6, guessed=3)
GATED = Architecture(gates=("slo_guessed",))
WANTED = {"search": SEARCH, "architecture": GATED, "variants": VariantsConfig(count=2)}


def job(folder: Path, **changes: object) -> Job:
    config = TrainingConfig(description="Small.", workload="smoke", episode_s=5, **(WANTED | changes))  # type: ignore[arg-type]
    made = Job(Run(folder, config), Console(quiet=True), None)
    made.load = 1.0
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"search": SEARCH.model_copy(update={"guessed": 0})},
        {"architecture": Architecture(gates=("burst",))},
        {"variants": VariantsConfig(share=0)},
    ],
    ids=["no generations", "no gate", "no variants"],
)
def test_where_nothing_is_wanted_the_weights_stay_and_nothing_is_played(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    made = job(tmp_path, **changes)
    prepare_guesses(made, resolve("jsed"))
    weights = np.arange(parameters(made.config.architecture), dtype=float)
    found = learn_guesses(made, weights, 0)
    made.close()
    assert found == {"weights": weights.tolist(), "episodes": 0, "worths": []}


def test_weights_behind_the_gate_alone_are_learned_and_kept_where_they_are_worth_more(tmp_path: Path) -> None:
    made = job(tmp_path)
    made.guessed = [(0, 1.0), (1, 1.0)]
    own = behind(GATED, "slo_guessed")
    start = np.where(own, 0.0, np.random.default_rng(0).normal(size=len(own)))
    found = learn_guesses(made, start, 0)
    again = learn_guesses(made, start, 0)  # from the checkpoint
    validation = made.guessed_episodes(1_000_000, made.config.validation_episodes)
    after = made.arena.values([made.learned(np.array(found["weights"]), "x")], validation, 1_000_000, made.objective)
    made.close()
    weights, (before, then) = np.array(found["weights"]), found["worths"]
    assert found == again
    assert (weights[~own] == start[~own]).all()
    assert weights[own].any() == (then > before)
    assert after[0] == pytest.approx(max(before, then))
    assert found["episodes"] == 3 * 4 * 3 + 2 * len(validation)


def test_guessed_episodes_are_told_alike_and_judged_by_the_truth(tmp_path: Path) -> None:
    made = job(tmp_path)
    made.guessed = [(0, 0.5), (3, 2.0)]
    episodes = made.guessed_episodes(7, 6)
    made.close()
    for one in episodes:
        assert len({t.slo for t in one.tenants.values()}) == 1
        assert all(t.slo.guessed for t in one.tenants.values())
        assert one.judged is not None
        assert not any(t.slo.guessed for t in one.judged.values())
