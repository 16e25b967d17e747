"""The best weights that a learner had at any evaluation: what it gives in the end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from steersman.training.checkpoint import load, save
from steersman.training.job import SELECTION, Job

EPISODES = 8  # at each load. Of six in all, the luckiest evaluation won and not the best


class Best:
    """Weights, and what they were worth on the selection episodes; kept in a file for a resumption."""

    def __init__(self, job: Job, name: str, path: Path) -> None:
        self._job, self._name, self._path = job, name, path
        self._selection = job.episodes(SELECTION, EPISODES * len(job.config.loads))
        self.weights, self.worth = np.zeros(0), -np.inf
        stored = load(path, partial(np.load, allow_pickle=False))
        if stored is not None:
            self.worth, self.weights = float(stored[0]), stored[1:]

    def measure(self, weights: np.ndarray) -> float:
        """What `weights` are worth on the selection episodes."""
        policy = self._job.learned(weights, self._name)
        return float(self._job.arena.values([policy], self._selection, SELECTION, self._job.objective)[0])

    def consider(self, weights: np.ndarray) -> None:
        """Keep `weights` if they are the best."""
        worth = self.measure(weights)
        if worth > self.worth:
            self.worth, self.weights = worth, weights
            save(self._path, partial(np.save, arr=np.concatenate([[worth], weights])))
