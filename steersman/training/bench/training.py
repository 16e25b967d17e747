"""What the environment costs in training: `steersman bench training`.

The MaskablePPO loop, rollout and update, runs over the real environment and over one that costs nothing: the same
spaces, observations, masks, rewards and ends of episodes, recorded beforehand and handed out in a circle. Both take
turns in one process; CPU time counts, of all threads.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from steersman.envs.sb3 import SB3VecEnv
from steersman.envs.vector import DispatchVectorEnv
from steersman.runtime.network import Architecture
from steersman.training import ppo
from steersman.training.bench.machine import machine
from steersman.training.config import PpoConfig, TrainingConfig

RECORDED = 128  # steps of each environment


def bench(rounds: int) -> dict[str, Any]:
    """Frames per CPU second of both loops and their ratio, as the one JSON object that the command prints.

    A frame is a step of one environment. Each of `rounds` rounds is a rollout and an update of either loop; enough of
    them (24 or so) end an episode in every environment, for drawing the next is a part of its cost.
    """
    torch.set_num_threads(1)
    # Every update makes all its epochs: with a limit on the KL, the two loops might do unequal work.
    config, loads = PpoConfig(target_kl=None), TrainingConfig(description="").loads
    env = SB3VecEnv(DispatchVectorEnv(config.envs, load=(min(loads), max(loads))))
    env.seed(0)
    models = [_model(env, config), _model(FreeVecEnv(env, RECORDED), config)]
    frames, seconds, ended = config.rollout * config.envs, [0.0, 0.0], 0
    for number in range(rounds + 1):
        for k in (0, 1) if number % 2 else (1, 0):
            taken = _learn_s(models[k], frames)
            if number:  # the first is for the compiler and caches
                seconds[k] += taken
        ended += int(models[0].rollout_buffer.episode_starts.sum())
    real, free = (rounds * frames / taken for taken in seconds)
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in ("steersman", "stable_baselines3", "torch", "numpy")},
        "rounds": rounds,
        "envs": config.envs,
        "frames": rounds * frames,
        "episodes_ended": ended - config.envs,
        "frames_per_cpu_s": real,
        "free_env_frames_per_cpu_s": free,
        "ratio": real / free,
    }


def _model(env: VecEnv, config: PpoConfig) -> Any:
    model = ppo.make("maskable-ppo", env, config, Architecture(), 0)
    model.set_logger(Logger(None, []))
    return model


def _learn_s(model: Any, frames: int) -> float:
    """CPU seconds of one rollout and its update."""
    started = time.process_time()
    model.learn(frames, log_interval=None, reset_num_timesteps=False)
    return time.process_time() - started


class FreeVecEnv(VecEnv):
    """Hands out what was recorded from `env` under random allowed actions; actions change nothing."""

    def __init__(self, env: SB3VecEnv, steps: int) -> None:
        super().__init__(env.num_envs, env.observation_space, env.action_space)
        rng, self._next = np.random.default_rng(0), 0
        self._first = env.reset(), list(env.env_method("action_masks"))
        self._masks, self._steps = self._first[1], []
        for _ in range(steps):
            allowed = np.stack(self._masks)
            env.step_async((rng.random(allowed.shape) * allowed).argmax(axis=1))
            step = env.step_wait()
            self._masks = list(env.env_method("action_masks"))
            self._steps.append((step, self._masks))

    def reset(self) -> np.ndarray:
        self._next, self._masks = 0, self._first[1]
        return self._first[0]

    def step_async(self, actions: np.ndarray) -> None:
        pass

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        step, self._masks = self._steps[self._next]
        self._next = (self._next + 1) % len(self._steps)
        return step

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        assert method_name == "action_masks"
        return self._masks

    def has_attr(self, attr_name: str) -> bool:
        return attr_name == "action_masks"

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(attr_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def close(self) -> None:
        pass
