"""PPO and MaskablePPO through Stable-Baselines3, warm-started from given weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from steersman.agents.sb3 import MaskableScorerPolicy, ScorerPolicy
from steersman.agents.scorer import Scorer
from steersman.envs.sb3 import SB3VecEnv
from steersman.envs.vector import DispatchVectorEnv
from steersman.runtime.network import Architecture
from steersman.training import tags
from steersman.training.best import Best
from steersman.training.checkpoint import load, save
from steersman.training.config import PpoConfig
from steersman.training.directions import alike
from steersman.training.job import Job
from steersman.training.progress import Stage, stage
from steersman.training.situations import SituationsEnv

KINDS: dict[str, tuple[Any, Any]] = {
    "ppo": (PPO, ScorerPolicy),
    "maskable-ppo": (MaskablePPO, MaskableScorerPolicy),
}
SHOWN = {
    "train/loss": "train/loss/total",
    "train/value_loss": "train/loss/value",
    "train/policy_gradient_loss": "train/loss/policy",
    "train/entropy_loss": "train/loss/entropy",
    "train/approx_kl": "train/kl",
    "train/explained_variance": "train/explained_variance",
    "train/clip_fraction": "train/clip_fraction",
}
EVALUATE_EVERY = 10  # rollouts


def make(algorithm: str, env: VecEnv, config: PpoConfig, architecture: Architecture, seed: int) -> Any:
    """An untrained model with the scorer as its policy; `algorithm`: a key of `KINDS`."""
    kind, policy = KINDS[algorithm]
    return kind(
        policy,
        env,
        n_steps=config.envs * config.rollout // env.num_envs,
        batch_size=config.batch,
        n_epochs=config.epochs,
        learning_rate=config.learning_rate,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip,
        ent_coef=config.entropy,
        target_kl=config.target_kl,
        policy_kwargs={"architecture": architecture, "sharpness": config.sharpness},
        device="cpu",
        seed=seed,
    )


def environment(job: Job) -> SB3VecEnv:
    """The environments of a training."""
    config = job.config.ppo
    loads = [job.load * factor for factor in job.config.loads]
    return SB3VecEnv(
        DispatchVectorEnv(
            config.envs,
            workload=job.workload,
            fleet=job.fleet,
            reward=job.config.reward,
            load=(min(loads), max(loads)),
            duration_s=job.config.episode_s,
        )
    )


def silent() -> Logger:
    """A logger that keeps its values to itself."""
    return Logger(None, [])


def learn(job: Job, algorithm: str, start: np.ndarray | None) -> dict[str, Any]:
    """Train from the scorer weights `start`, or from random ones.

    Returns {"weights", "steps", "worth"}, of the best evaluation; what it started from is none. Checkpoints after
    every evaluation, and goes on from one where it exists.
    """
    config, seed = job.config.ppo, job.config.seed
    checkpoint = job.run.checkpoints / f"{algorithm}.zip"
    env: Any = environment(job) if config.advantages == "gae" else SituationsEnv(job)
    model: Any = load(checkpoint, lambda file: KINDS[algorithm][0].load(file, env=env, device="cpu"))
    if model is None:
        model = make(algorithm, env, config, job.config.architecture, seed)
        if start is not None:
            model.policy.scorer.set_weights(start)
    env.seed(seed + model.num_timesteps)  # after a resumption other episodes than those it began with
    model.set_logger(silent())
    with stage(job.console, algorithm, config.steps) as shown:
        kind = _Callback if config.advantages == "gae" else _CollectingCallback
        callback = kind(job, shown, algorithm, checkpoint)
        left = config.steps - model.num_timesteps
        if left > 0:
            if config.advantages == "roll-outs":
                collect(model, model.policy.scorer.get_weights())
            model.learn(left, callback=callback, log_interval=None, reset_num_timesteps=False)
        callback.best.consider(model.policy.scorer.get_weights())
    env.close()
    return {
        "weights": callback.best.weights.tolist(),
        "steps": int(model.num_timesteps),
        "worth": callback.best.worth,
    }


def collect(model: Any, weights: np.ndarray) -> None:
    """Go on from `weights`, with decisions of their own, in steps that change the scores of these alike."""
    scorer: Scorer = model.policy.scorer
    found = model.get_env().refresh(weights, model.num_timesteps)
    scorer.set_weights(weights)
    scorer.step_along(alike(found.rows, scorer.architecture, model.seed))
    model.policy.optimizer.state.clear()  # it is of other steps


class _Callback(BaseCallback):
    """Progress, evaluation, and checkpoints."""

    evaluate_every = EVALUATE_EVERY

    def __init__(self, job: Job, shown: Stage, name: str, checkpoint: Path) -> None:
        super().__init__()
        self._job, self._shown, self._name, self._checkpoint = job, shown, name, checkpoint
        self._steps = job.config.ppo.steps
        self.best = Best(job, name, checkpoint.with_suffix(".best.npy"))
        self._rollouts, self._attainment = 0, 0.0
        self._started, self._start_steps = time.monotonic(), -1

    def _on_step(self) -> bool:
        return True

    @property
    def _scorer(self) -> Scorer:
        scorer: Scorer = self.model.policy.scorer  # type: ignore[assignment]
        return scorer

    def _on_rollout_end(self) -> None:
        if self._start_steps < 0:
            self._start_steps = self.num_timesteps
        self._rollouts += 1
        reward = float(self.model.rollout_buffer.rewards.mean())  # type: ignore[attr-defined]
        speed = (self.num_timesteps - self._start_steps) / max(1e-9, time.monotonic() - self._started)
        values = self.logger.name_to_value
        figures = {tags.REWARD: reward, "train/speed_steps_per_s": speed} | {
            ours: float(values[theirs]) for theirs, ours in SHOWN.items() if theirs in values
        }
        if self._rollouts % self.evaluate_every and self.num_timesteps < self._steps:
            self._job.dashboard.scalars(self.num_timesteps, figures)
        else:
            weights = self._scorer.get_weights()
            policy = self._job.learned(weights, self._name)
            self._attainment = self._job.watch(self.num_timesteps, policy, figures).attainment
            self.best.consider(weights)
            save(self._checkpoint, self.model.save)
        self._shown.advance(
            min(self.num_timesteps, self._steps),
            f"reward {reward:+.4f}  attainment {self._attainment:.1%}  {speed:.0f} steps/s",
        )


class _CollectingCallback(_Callback):
    """Now and then, decisions are collected anew, from the best weights so far, those at the beginning among them."""

    evaluate_every = 2  # updates go far

    def _on_training_start(self) -> None:
        self._weights = self._scorer.get_weights()
        self._worth = self.best.measure(self._weights)

    def _on_rollout_start(self) -> None:
        if not self._rollouts or self._rollouts % self._job.config.ppo.refresh:
            return
        if self.best.worth > self._worth:
            self._weights, self._worth = self.best.weights, self.best.worth
        collect(self.model, self._weights)
