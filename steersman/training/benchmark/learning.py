"""The learned policy: the one place where the benchmark touches the trainer."""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.runtime.policy import CompiledPolicy
from steersman.training.benchmark.budget import Budget
from steersman.training.config import ImitationConfig, SearchConfig, TrainingConfig, VariantsConfig
from steersman.training.guesses import learn_guesses
from steersman.training.job import TRAINING, VALIDATION, Job
from steersman.training.stages import imitate_policy, search_scorer

ALGORITHM = "ars"
SEEDS_APART = 10_000  # first seeds of the training episodes of two training seeds


def training_config(budget: Budget, workload: str, fleet: str, episode_s: float | None, seed: int) -> TrainingConfig:
    """The training of one learned policy: what is left of the budget, when its teacher has had a third of it.

    One generation less than that, for the episodes of the imitation and of the choices at the end.
    """
    own = max(1, budget.generations - budget.teacher_generations - budget.guessed_generations - 1)
    return TrainingConfig(
        description="A policy for the benchmark.",
        workload=workload,
        fleet=fleet,
        seed=seed,
        episode_s=episode_s,
        variants=VariantsConfig(count=budget.variants),
        search=SearchConfig(
            population=budget.population,
            generations=own,
            guessed=budget.guessed_generations,
            episodes=budget.episodes,
            pool=budget.pool,
        ),
        imitation=ImitationConfig(episodes=budget.imitation_episodes, epochs=budget.imitation_epochs),
        validation_episodes=budget.validation_episodes,
    )


def learn(job: Job, teacher: CompiledPolicy, seed: int) -> dict[str, Any]:
    """A policy that imitates `teacher` and improves on it by search; validation episodes choose which of both. Then it
    learns what to do where SLOs are guesses.

    {"weights", "episodes": simulated for it, "chosen": "imitation" or "search"}
    """
    first = TRAINING + SEEDS_APART * (1 + seed)
    pool = job.pool(first, job.config.search.pool)
    cloned = imitate_policy(job, teacher)
    found = search_scorer(job, ALGORITHM, np.array(cloned["weights"]), pool)
    candidates = {"imitation": cloned["weights"], "search": found["weights"]}
    policies = [job.learned(np.array(weights), name) for name, weights in candidates.items()]
    worths = job.arena.values(policies, job.validation, VALIDATION, job.objective)
    chosen = list(candidates)[int(worths.argmax())]
    whole = learn_guesses(job, np.array(candidates[chosen]), first)
    played = job.config.imitation.episodes + found["episodes"] + len(policies) * len(job.validation)
    return {"weights": whole["weights"], "episodes": played + whole["episodes"], "chosen": chosen}
