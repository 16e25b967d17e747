"""PPO through RLlib's new API stack, on Ray: the same network, environment, bundle and curves as `ppo.py`."""

from __future__ import annotations

import logging
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS
from ray.tune.registry import register_env

from steersman.agents.rllib import ScorerModule
from steersman.envs.dispatch import DispatchEnv
from steersman.training import tags
from steersman.training.best import Best
from steersman.training.checkpoint import load, save
from steersman.training.cluster.connect import LOCAL, joined
from steersman.training.config import PpoConfig
from steersman.training.job import Job
from steersman.training.ppo import EVALUATE_EVERY
from steersman.training.progress import stage

logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # or it tells that its API is new

ENV, MODULE = "steersman-dispatch", "default_policy"
SEEDS_APART = 10_000  # of the environments of two runners
SHOWN = {
    "total_loss": "train/loss/total",
    "vf_loss": "train/loss/value",
    "policy_loss": "train/loss/policy",
    "entropy": "train/entropy",
    "vf_explained_var": "train/explained_variance",
}


class Masked(gym.Wrapper[Any, Any, Any, Any]):
    """Observations with the guard's mask beside them, as RLlib's modules take it.

    runner: whose environment it is. RLlib seeds the environments of runner r from r on, so that those of different
    runners would play the same episodes; here seeds of runners are far apart.
    """

    def __init__(self, env: DispatchEnv, runner: int = 0) -> None:
        super().__init__(env)
        self._first = runner * SEEDS_APART
        assert isinstance(env.action_space, gym.spaces.Discrete)
        mask = gym.spaces.Box(0.0, 1.0, (int(env.action_space.n),), np.float32)
        self.observation_space: Any = gym.spaces.Dict({"observations": env.observation_space, "action_mask": mask})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        rows, info = self.env.reset(seed=None if seed is None else seed + self._first, options=options)
        return self._seen(rows, info), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], Any, bool, bool, dict[str, Any]]:
        rows, reward, terminated, truncated, info = self.env.step(action)
        return self._seen(rows, info), reward, terminated, truncated, {}

    def _seen(self, rows: np.ndarray, info: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"observations": rows, "action_mask": info["action_mask"].astype(np.float32)}


def learn(job: Job, algorithm: str, start: np.ndarray | None) -> dict[str, Any]:
    """As `ppo.learn`. Ray is started on this machine where this process is not connected to one."""
    with joined(LOCAL, job.console):
        return _learn(job, algorithm, start)


def _learn(job: Job, algorithm: str, start: np.ndarray | None) -> dict[str, Any]:
    config, checkpoint = job.config.ppo, job.run.checkpoints / f"{algorithm}.pt"
    kept = load(checkpoint, lambda file: torch.load(file, weights_only=True))
    steps = 0 if kept is None else int(kept["steps"])
    made = algorithm_of(job, job.config.seed + steps)  # after a resumption other episodes than those it began with
    learner = made.learner_group._learner
    module: ScorerModule = learner.module[MODULE]
    if kept is not None:
        module.load_state_dict(kept["module"])
        learner.get_optimizer(MODULE).load_state_dict(kept["optimizer"])
    elif start is not None:
        module.scorer.set_weights(start)
    made.env_runner_group.sync_weights(from_worker_or_learner_group=made.learner_group, inference_only=True)
    best = Best(job, algorithm, checkpoint.with_suffix(".best.npy"))
    attainment, first, started, updates = 0.0, steps, time.monotonic(), 0
    try:
        with stage(job.console, algorithm, config.steps) as shown:
            while steps < config.steps:
                result = made.train()
                updates += 1
                steps += int(result[ENV_RUNNER_RESULTS]["num_env_steps_sampled"])
                speed = (steps - first) / (time.monotonic() - started)
                figures = curves(result) | {"train/speed_steps_per_s": speed}
                if updates % EVALUATE_EVERY and steps < config.steps:
                    job.dashboard.scalars(steps, figures)
                else:
                    weights = module.scorer.get_weights()
                    attainment = job.watch(steps, job.learned(weights, algorithm), figures).attainment
                    best.consider(weights)
                    state = {
                        "module": module.state_dict(),
                        "optimizer": learner.get_optimizer(MODULE).state_dict(),
                        "steps": steps,
                    }
                    save(checkpoint, lambda file, state=state: torch.save(state, file))  # type: ignore[misc]
                reward = figures.get(tags.REWARD, float("nan"))
                shown.advance(
                    min(steps, config.steps),
                    f"reward {reward:+.4f}  attainment {attainment:.1%}  {speed:.0f} steps/s",
                )
    finally:
        made.stop()
    return {"weights": best.weights.tolist(), "steps": steps, "worth": best.worth}


def algorithm_of(job: Job, seed: int) -> Any:
    """RLlib's PPO with the numbers of `job`'s training, untrained. seed: of its environments and draws."""
    config = job.config.ppo
    loads = [job.load * factor for factor in job.config.loads]
    options: dict[str, Any] = {
        "workload": job.workload,
        "fleet": job.fleet,
        "reward": job.config.reward,
        "load": (min(loads), max(loads)),
        "duration_s": job.config.episode_s,
    }
    register_env(ENV, lambda context: Masked(DispatchEnv(**options), context.worker_index))
    network = {"architecture": job.config.architecture.model_dump(mode="json"), "sharpness": config.sharpness}
    spec = RLModuleSpec(module_class=ScorerModule, model_config=network)
    return numbers(config, seed).environment(ENV).rl_module(rl_module_spec=spec).build_algo()


def numbers(config: PpoConfig, seed: int) -> Any:
    """RLlib's PPOConfig with the numbers of `config`, without environment and network."""
    made: Any = PPOConfig
    return (
        made()
        .framework("torch")
        .env_runners(
            num_env_runners=config.runners,
            # A runner plays while the workers of a search have nothing to do, and they hold the cores.
            num_cpus_per_env_runner=0,
            num_envs_per_env_runner=-(-config.envs // max(1, config.runners)),
            rollout_fragment_length=config.rollout,
        )
        .learners(num_learners=0)
        .training(
            lr=config.learning_rate,
            gamma=config.gamma,
            lambda_=config.gae_lambda,
            clip_param=config.clip,
            vf_clip_param=float("inf"),
            vf_loss_coeff=0.5,
            entropy_coeff=config.entropy,
            use_kl_loss=False,
            grad_clip=0.5,
            train_batch_size_per_learner=config.rollout * config.envs,
            minibatch_size=config.batch,
            num_epochs=config.epochs,
        )
        .debugging(seed=seed, log_level="ERROR")
    )


def curves(result: dict[str, Any]) -> dict[str, float]:
    """A result of RLlib by the names of `tags`."""
    told = result[LEARNER_RESULTS][MODULE]
    figures = {ours: float(told[theirs]) for theirs, ours in SHOWN.items() if theirs in told}
    runners = result[ENV_RUNNER_RESULTS]
    if runners.get("episode_len_mean"):
        figures[tags.REWARD] = float(runners["episode_return_mean"] / runners["episode_len_mean"])
    return figures
