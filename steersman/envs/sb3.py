"""The vector environment as Stable-Baselines3 wants one: a `VecEnv`, and not Gymnasium's `VectorEnv`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from steersman.envs.vector import DispatchVectorEnv


class SB3VecEnv(VecEnv):
    """Adapter around a `DispatchVectorEnv`, with the `action_masks` that `sb3_contrib.MaskablePPO` asks for.

    An info has `episode` (return, length and seconds) and `metrics` where an episode ended.
    """

    def __init__(self, env: DispatchVectorEnv) -> None:
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions = np.zeros(env.num_envs, np.int64)
        self._returns, self._lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64)
        self._started = time.monotonic()

    def reset(self) -> np.ndarray:
        seeds = list(self._seeds)
        observations, _ = self.env.reset(seed=None if all(s is None for s in seeds) else seeds)
        self._returns[:] = self._lengths[:] = 0
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, terminated, _, info = self.env.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        infos = [self._info(i, info) if ended else {} for i, ended in enumerate(terminated)]
        if terminated.any():
            self._returns[terminated] = self._lengths[terminated] = 0
        return observations, rewards.astype(np.float32), terminated, infos

    def _info(self, index: int, info: dict[str, Any]) -> dict[str, Any]:
        metrics = info["final_info"]["metrics"]
        return {
            "terminal_observation": info["final_obs"][index],
            "TimeLimit.truncated": False,
            "episode": {
                "r": float(self._returns[index]),
                "l": int(self._lengths[index]),
                "t": time.monotonic() - self._started,
            },
            "metrics": {k: float(v[index]) for k, v in metrics.items() if not k.startswith("_")},
        }

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name) for _ in self._indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """`action_masks` gives one mask an environment; any other method is called once, on the whole."""
        if method_name == "action_masks":
            masks = self.env.action_masks()
            return [masks[i] for i in self._indices(indices)]
        result = getattr(self.env, method_name)(*args, **kwargs)
        return [result for _ in self._indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._indices(indices)]

    def _indices(self, indices: Any) -> Sequence[int]:
        return list(self._get_indices(indices))
