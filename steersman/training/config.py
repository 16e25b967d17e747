"""The training file: what to train on, and with which budget."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.network import Architecture


class SearchConfig(Model):
    """CMA-ES and ARS. One budget for all: the learned policy and each tuned heuristic may play as many episodes."""

    population: int = Field(default=16, ge=4)
    generations: int = Field(default=176, ge=1)
    episodes: int = Field(default=6, ge=1, description="episodes that each candidate of a generation plays")
    pool: int = Field(default=192, ge=1, description="training episodes to draw from")
    sigma: float = Field(default=0.15, gt=0, description="of steps, in typical weights; CMA-ES adapts it")
    guessed: int = Field(
        default=22,
        ge=0,
        description="further generations, of ARS, over what is done differently where SLOs are guesses; 0: nothing is",
    )


class ImitationConfig(Model):
    """Behaviour cloning of a heuristic: a warm start."""

    teacher: str = Field(
        default="push-hold-shed", description="whom the scorer imitates; its tuned form where it is among `tune`"
    )
    episodes: int = Field(default=9, ge=1)
    epochs: int = Field(default=12, ge=1)
    batch: int = Field(default=512, ge=32)
    learning_rate: float = Field(default=3e-3, gt=0)
    holds: float = Field(
        default=0.1,
        ge=0,
        description="decisions to hold that it sees, for each other one. A held request is decided many times, and one "
        "that holds a little too often holds far too long",
    )


class PpoConfig(Model):
    """PPO (Schulman et al., 2017) through Stable-Baselines3 or RLlib; large minibatches, one torch thread."""

    start: Literal["best", "imitation", "scratch"] = Field(
        default="best",
        description="the weights it starts from: of the best learned so far, or the cloned ones, or random",
    )
    advantages: Literal["roll-outs", "gae"] = Field(
        default="roll-outs",
        description="of all candidates at some decisions, by counterfactual roll-outs; or of those taken, by GAE. "
        "rllib-ppo has GAE only",
    )
    tried_episodes: int = Field(default=48, ge=1, description="roll-outs: training episodes in a collection")
    tried_decisions: int = Field(default=300, ge=1, description="roll-outs: decisions of each at which all is tried")
    refresh: int = Field(default=8, ge=1, description="roll-outs: updates between two collections")
    steps: int = Field(default=200_000, ge=1)
    envs: int = Field(default=16, ge=1)
    runners: int = Field(
        default=0, ge=0, description="rllib-ppo: actors that play, each a share of envs; 0: the learner's process plays"
    )
    rollout: int = Field(default=512, ge=8, description="steps of each environment between updates")
    batch: int = Field(default=2048, ge=32)
    epochs: int = Field(default=3, ge=1)
    learning_rate: float = Field(default=1.5e-3, gt=0)
    gamma: float = Field(default=0.998, gt=0, le=1, description="a decision; 500 of them are some 10 s")
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    clip: float = Field(default=0.1, gt=0)
    entropy: float = Field(default=0.0, ge=0)
    target_kl: float | None = 0.02
    sharpness: float = Field(
        default=10.0, gt=0, description="what multiplies scores to make logits: high, and it hardly draws at random"
    )


class VariantsConfig(Model):
    """Domain randomisation: a part of the training episodes is on other fleets, with other traffic."""

    share: float = Field(default=0.25, ge=0, le=1, description="of the training episodes; 0: none")
    count: int = Field(default=24, ge=1, le=1000, description="different ones")


class TrainingConfig(Model):
    """A training file."""

    description: str
    workload: str = "default"
    fleet: str = "default"
    seed: int = 0
    episode_s: float | None = Field(
        default=None, gt=0, description="length of training episodes; default: the workload's"
    )
    loads: list[float] = Field(
        default=[1.0, 1.25, 1.5],
        min_length=1,
        description="relative to the capacity of the best heuristic as shipped; tuned ones carry a fifth more, "
        "and where all is met nothing is learned",
    )
    algorithms: list[Literal["cma-es", "ars", "ppo", "maskable-ppo", "rllib-ppo"]] = Field(
        default=["ars", "maskable-ppo"], min_length=1
    )
    reward: str = Field(default="missed", description="what PPO maximises with GAE: a module of steersman.envs.rewards")
    waiting: float = Field(
        default=0.015,
        ge=0,
        description="what a second of waiting for the first token costs in the search, in attainment, up to the "
        "TTFT target. Heuristics are tuned without",
    )
    architecture: Architecture = Architecture()
    tune: list[str] = Field(
        default=["push-shed", "push-hold-shed"], description="heuristics to tune, each with the search budget"
    )
    compare: list[str] = Field(default=[], description="heuristics to compare with; default: all")
    variants: VariantsConfig = VariantsConfig()
    search: SearchConfig = SearchConfig()
    imitation: ImitationConfig = ImitationConfig()
    ppo: PpoConfig = PpoConfig()
    validation_episodes: int = Field(default=12, ge=1)
    held_out_episodes: int = Field(default=24, ge=2)
