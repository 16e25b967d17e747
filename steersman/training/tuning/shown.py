"""Progress of all trials, through a callback of Ray Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune import Callback

from steersman.training.progress import Stage
from steersman.training.tuning.folder import TOLD
from steersman.training.tuning.state import keep

# Ray Tune pickles callbacks, for its resumption: what they write to must stand outside.
_shown: list[tuple[Stage, Path]] = []


def show_on(stage: Stage, trials: Path) -> None:
    """Where callbacks of this process show progress from now on, and the folder whose state they keep."""
    _shown[:] = [(stage, trials)]


class Progress(Callback):
    """Counts rounds, and shows the best so far."""

    def __init__(self) -> None:
        self._done, self._best = 0, -1.0

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._done, self._best = self._done + 1, max(self._best, float(result[TOLD]))
        running = sum(one.status == "RUNNING" for one in trials)
        for stage, folder in _shown:
            keep(folder)
            stage.advance(self._done, f"best worth {self._best:.4f}  {running} of {len(trials)} trials run")

    def get_state(self) -> dict[str, Any]:
        return {"done": self._done, "best": self._best}

    def set_state(self, state: dict[str, Any]) -> None:
        self._done, self._best = state["done"], state["best"]
