"""What every stage of a training run needs: its folder, where it shows progress, and what it trains on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from steersman.agents.policies import resolve
from steersman.envs.reward import find_reward
from steersman.runtime.configs import find_config
from steersman.runtime.draw import draw
from steersman.runtime.fleet import load_fleet
from steersman.runtime.network import compiled_policy
from steersman.runtime.outcomes import Summary
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Split, load_workload
from steersman.training.config import TrainingConfig
from steersman.training.dashboard import Dashboard
from steersman.training.drawn import Recipe, drawn
from steersman.training.evaluate import compare
from steersman.training.objective import ArenaMaker, Score, local_arena, worth
from steersman.training.run import Run

# First seeds of the sets of episodes. The last one is played once, for the comparison.
TRAINING, SELECTION, VALIDATION, HELD_OUT = 0, 500_000, 1_000_000, 2_000_000


def check(config: TrainingConfig, traces: Path | None) -> None:
    """Find what is wrong with a training file before a folder is made for its run.

    Raises:
        UserError: a name in it means nothing, a trace cannot be read, or requests fit no replica.
    """
    for name in (*config.tune, *config.compare, config.imitation.teacher):
        resolve(name)
    find_reward(config.reward)
    workload = load_workload(find_config("workloads", config.workload), traces=traces)
    draw(workload, load_fleet(find_config("fleets", config.fleet)), TRAINING, duration_s=config.episode_s)


class Job:
    """A training run in progress.

    objective: what a learned policy maximises.
    load: what multiplies the workload's rate at the relative load 1; set once the fleet has been sized.
    variants: number and load of each that is trained on; set with it.
    guessed: the same for variants whose SLOs are guesses.
    """

    def __init__(self, run: Run, console: Console, traces: Path | None, arenas: ArenaMaker = local_arena) -> None:
        self.run, self.config, self.console = run, run.config, console
        self.workload = load_workload(find_config("workloads", self.config.workload), traces=traces)
        self.fleet = load_fleet(find_config("fleets", self.config.fleet))
        self.arena = arenas(self.fleet, self.workload)
        self.dashboard = Dashboard(run.folder, list(self.workload.tenants), self.fleet.names)
        self.objective: Score = partial(worth, waiting=self.config.waiting)
        self.load = 1.0
        self.variants: list[tuple[int, float]] = []
        self.guessed: list[tuple[int, float]] = []
        self._validation: list[Requests] = []

    def sample(
        self, seed: int, load: float, split: Split = "train", variant: int | None = None, guessed: bool = False
    ) -> Requests:
        return drawn(self.workload, self.fleet, Recipe(seed, load, split, self.config.episode_s, variant, guessed))

    def pool(self, first: int, count: int) -> list[Requests]:
        """`count` episodes to search on, in order of load: at each load, first those as configured, then variants."""
        episodes = self.episodes(first, count)
        loads, share = self.config.loads, self.config.variants.share
        if not self.variants:
            return episodes
        each = -(-count // len(loads))
        for i in range(count):
            if i % each >= round((1 - share) * each):
                number, load = self.variants[i % len(self.variants)]
                episodes[i] = self.sample(first + i, load * loads[i // each], variant=number)
        return episodes

    def episodes(self, first: int, count: int, split: Split = "train") -> list[Requests]:
        """`count` episodes in order of load, spread evenly over the configured loads."""
        return [self.sample(first + i, self.load * factor, split) for i, factor in enumerate(self._loads(count))]

    def guessed_episodes(self, first: int, count: int) -> list[Requests]:
        """`count` episodes on the variants whose SLOs are guesses, in order of load."""
        made = []
        for i, factor in enumerate(self._loads(count)):
            number, load = self.guessed[i % len(self.guessed)]
            made.append(self.sample(first + i, load * factor, variant=number, guessed=True))
        return made

    def _loads(self, count: int) -> np.ndarray:
        return np.repeat(self.config.loads, -(-count // len(self.config.loads)))[:count]

    @property
    def validation(self) -> list[Requests]:
        """The episodes that the curves show and that choose among policies."""
        if not self._validation:
            self._validation = self.episodes(VALIDATION, self.config.validation_episodes)
        return self._validation

    def learned(self, weights: np.ndarray, name: str) -> CompiledPolicy:
        """The scorer with these weights."""
        return compiled_policy(self.config.architecture, weights, name)

    def watch(self, step: int, policy: CompiledPolicy, figures: dict[str, float]) -> Summary:
        """Play the validation episodes and show how it went, at `step` of the present phase."""
        summary = compare([policy], self.validation, self.arena, VALIDATION).summaries[0]
        self.dashboard.evaluation(step, summary, figures)
        return summary

    def close(self) -> None:
        self.dashboard.close()
        self.arena.close()
