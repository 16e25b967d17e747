"""Many dispatch environments at once: a Gymnasium vector environment whose step is one compiled call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from steersman.envs.batch import Batch
from steersman.envs.episodes import Episodes
from steersman.envs.metrics import episode_metrics
from steersman.envs.reward import Reward, find_reward
from steersman.envs.spaces import action_space, observation_space
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.observation import candidates_for
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import Split, Workload


class DispatchVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` copies of `DispatchEnv`: the same observations, actions, rewards and arguments, simulated only.

    Observation float32 (B, C · WIDTH), action int64 (B,), reward float64 (B,). `info["action_mask"]` bool (B, C).
    Autoreset is SAME_STEP: where an episode terminates, the observation is the first of the next one; the last of
    the old one (zero) is in `info["final_obs"]`, and `info["final_info"]["metrics"]` has its figures.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(
        self,
        num_envs: int = 1,
        workload: str | Path | Workload = "default",
        fleet: str | Path | Fleet = "default",
        *,
        reward: str | Reward = "slo",
        load: float | tuple[float, float] = 1.0,
        duration_s: float | None = None,
        split: Split = "train",
        candidates: int | None = None,
        traces: Path | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Arguments as those of `DispatchEnv`.

        Raises:
            UserError: an argument names nothing that exists, or workload and fleet do not fit.
        """
        if render_mode is not None:
            raise UserError("the vector environment does not render; make a single one")
        self.num_envs = num_envs
        self.render_mode = None
        self._episodes = Episodes(workload, fleet, load=load, duration_s=duration_s, split=split, traces=traces)
        self.workload, self.fleet = self._episodes.workload, self._episodes.fleet
        self.candidates = candidates_for(len(self.fleet.groups), candidates)
        self.single_observation_space = observation_space(self.candidates)
        self.single_action_space = action_space(self.candidates)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._batch = Batch(num_envs, self.fleet, self.candidates, find_reward(reward))
        self._rngs: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start all environments. With a number as seed, environment i has the seed plus i, as in `DispatchEnv`."""
        seeds = (
            [None if seed is None else seed + i for i in range(self.num_envs)] if not isinstance(seed, list) else seed
        )
        for i, one in enumerate(seeds):
            if one is not None or i >= len(self._rngs):
                self._rngs[i : i + 1] = [np.random.default_rng(one)]
            self._start(i, (options or {}).get("load"))
        return self._observations(), self._infos()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if not self._rngs:
            raise ResetNeeded("call reset() before step()")
        self._batch.step(np.ascontiguousarray(actions, np.int64))
        rewards, terminated = self._batch.rewards.copy(), ~self._batch.due
        final: dict[str, Any] = {}
        if terminated.any():
            final = self._finals(terminated)
            for i in np.flatnonzero(terminated):
                self._start(int(i))
        return self._observations(), rewards, terminated, np.zeros_like(terminated), self._infos() | final

    def _start(self, index: int, load: float | None = None) -> None:
        requests = self._episodes.draw(self._rngs[index], load)
        if not len(requests):
            raise UserError("the episode has no request: make it longer, or raise the load")
        self._batch.reset(index, requests)

    def _finals(self, terminated: np.ndarray) -> dict[str, Any]:
        """What Gymnasium hands over of episodes that ended: arrays (B,), whose `_` twins mark valid entries."""
        observations = np.full(self.num_envs, None, object)
        figures: dict[str, np.ndarray] = {}
        for i in np.flatnonzero(terminated):
            observations[i] = np.zeros(self.single_observation_space.shape or (), np.float32)
            for name, value in episode_metrics(self._batch.episode(int(i)), self.fleet).items():
                figures.setdefault(name, np.zeros(self.num_envs))[i] = value
        metrics: dict[str, Any] = dict(figures) | {f"_{name}": terminated.copy() for name in figures}
        return {
            "final_obs": observations,
            "_final_obs": terminated.copy(),
            "final_info": {"metrics": metrics, "_metrics": terminated.copy()},
            "_final_info": terminated.copy(),
        }

    def _observations(self) -> np.ndarray:
        return self._batch.rows.reshape(self.num_envs, -1).copy()

    def _infos(self) -> dict[str, Any]:
        return {"action_mask": self.action_masks(), "_action_mask": np.ones(self.num_envs, np.bool_)}

    @property
    def runtimes(self) -> list[SimulatedRuntime]:
        """The simulated clusters, (B,)."""
        return self._batch.runtimes

    def action_masks(self) -> np.ndarray:
        """bool (B, C): what the guard allows."""
        return self._batch.masks.copy()
