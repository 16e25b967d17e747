"""Decisions with the advantages of their candidates, as an environment of Stable-Baselines3: PPO without GAE.

```
the policy ─► training episodes ─► all candidates at some of their decisions (`counterfactual.py`) ─► PPO draws of these
    ▲                                                                                                      │
    └───────────────────────────────────── after some updates, anew ───────────────────────────────────────┘
```

A decision is an episode of one step, whose reward is the advantage of the candidate that was drawn. Nothing has to be
bootstrapped and no credit has to be found: what GAE estimates from the noise of all that comes later is known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from steersman.envs.spaces import action_space, observation_space
from steersman.runtime.observation import candidates_for
from steersman.training.counterfactual import Asked, Situations, joined, tried_out
from steersman.training.drawn import Drawn
from steersman.training.job import TRAINING, Job


class SituationsEnv(VecEnv):
    """Decisions drawn at random from a collection, `ppo.rollout` at a time.

    Observation float32 (B, C · WIDTH), action int64 (B,). `action_masks` has the candidates that were tried.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pool = job.pool(TRAINING, job.config.search.pool)
        fleets = [one.fleet for one in self._pool if isinstance(one, Drawn) and one.fleet is not None]
        self._candidates = max(candidates_for(len(fleet.groups)) for fleet in fleets)
        self._collected: Situations | None = None
        self._situations: Situations | None = None
        self._rng = np.random.default_rng(job.config.seed)
        at_once = job.config.ppo.rollout
        self._drawn, self._actions = np.zeros(at_once, np.int64), np.zeros(at_once, np.int64)
        super().__init__(at_once, observation_space(self._candidates), action_space(self._candidates))

    def refresh(self, weights: np.ndarray, number: int) -> Situations:
        """Go on, after the next step, with decisions of the scorer with `weights`: these.

        Collections of different `number` are of different episodes and decisions.
        """
        config, rng = self._job.config.ppo, np.random.default_rng([self._job.config.seed, number])
        policy, seed = self._job.learned(weights, "tried"), int(rng.integers(1 << 30))
        episodes = rng.permutation(len(self._pool))[: config.tried_episodes]
        jobs = [
            (policy, self._pool[index], Asked(config.tried_decisions, seed + i, self._job.config.waiting))
            for i, index in enumerate(episodes)
        ]
        self._collected = joined(self._job.arena.each(tried_out, jobs), self._candidates)
        return self._collected

    @property
    def _seen(self) -> Situations:
        assert self._situations is not None, "call refresh() and reset() first"
        return self._situations

    def reset(self) -> np.ndarray:
        self._situations = self._collected
        self._drawn = self._rng.integers(0, len(self._seen.rows), self.num_envs)
        return self._seen.rows[self._drawn].reshape(self.num_envs, -1)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        rewards = self._seen.advantages[self._drawn, self._actions]
        return self.reset(), rewards, np.ones(self.num_envs, np.bool_), [{} for _ in range(self.num_envs)]

    def action_masks(self) -> np.ndarray:
        """bool (B, C): the candidates that were tried."""
        return self._seen.tried[self._drawn]

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """`action_masks` gives one mask an environment; any other method is called once, on the whole."""
        result = getattr(self, method_name)(*args, **kwargs)
        return list(result) if method_name == "action_masks" else [result] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self, attr_name, value)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def close(self) -> None:
        """Nothing is open."""
