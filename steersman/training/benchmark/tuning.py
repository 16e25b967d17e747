"""How heuristics are tuned: by files that `steersman tune` takes, too, and finds the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from steersman.runtime.errors import UserError
from steersman.training.benchmark.budget import Budget
from steersman.training.config import SearchConfig, TrainingConfig
from steersman.training.tuning.space import TuningConfig


def tuning_config(
    budget: Budget, workload: str, fleet: str, episode_s: float | None, known: Iterable[str]
) -> TrainingConfig:
    """What heuristics are tuned on, with the whole budget for each. known: those whose capacity sizes the load."""
    return TrainingConfig(
        description="What the benchmark tunes heuristics on.",
        workload=workload,
        fleet=fleet,
        episode_s=episode_s,
        compare=list(known),
        search=SearchConfig(
            population=budget.population, generations=budget.generations, episodes=budget.episodes, pool=budget.pool
        ),
    )


def write_tuning(folder: Path, config: TrainingConfig) -> None:
    """tuning.yaml and its training.yaml in the folder of a scenario.

    Raises:
        UserError: they cannot be written.
    """
    files = {"workload": str(Path(config.workload).resolve()), "fleet": str(Path(config.fleet).resolve())}
    training = (folder / "training.yaml").resolve()
    tuning = TuningConfig(
        description="A heuristic as the benchmark tunes it; --set policy=NAME for another.",
        policy=config.imitation.teacher,
        training=str(training),
    )
    try:
        for path, model in ((training, config.model_copy(update=files)), (folder / "tuning.yaml", tuning)):
            text = yaml.safe_dump(model.model_dump(mode="json", exclude_unset=True), sort_keys=False)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: the folder of results cannot be written: {error.strerror}") from error
