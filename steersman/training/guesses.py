"""What a policy does differently where the SLOs that it is told are guesses: its own weights, found by its own search.

Who is told one SLO for all must keep every replica fast, and who relies on what it is told must not: one set of weights
for both is a compromise, and which one was chance. So all else is learned with SLOs that are promises, and then stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.runtime.network import behind
from steersman.runtime.policy import CompiledPolicy
from steersman.training import tags
from steersman.training.directions import directions
from steersman.training.job import VALIDATION, Job
from steersman.training.optimisers import Ars
from steersman.training.progress import stage
from steersman.training.search import Generation, search
from steersman.training.stages import size_variants

NAME = "guesses"


def prepare_guesses(job: Job, policy: CompiledPolicy) -> None:
    """Size the variants with guessed SLOs by what `policy` carries there, and tell the job, if they are wanted."""
    config = job.config
    if config.search.guessed and behind(config.architecture, "slo_guessed").any():
        stored = job.run.once("guessed-variants", lambda: {"loads": size_variants(job, policy, guessed=True)})
        job.guessed = stored["loads"]


def learn_guesses(job: Job, weights: np.ndarray, first: int) -> dict[str, Any]:
    """`weights` with those that say what is different where SLOs are guesses; without such variants, as they are.

    first: seed of the first training episode. Kept where it is better on validation variants.
    {"weights", "episodes": simulated for it, "worths": of the weights before and after, less waiting, there}
    """
    if not job.guessed:
        return {"weights": weights.tolist(), "episodes": 0, "worths": []}
    config, seed = job.config.search, job.config.seed + 1
    basis = directions(job, weights, guessed=True)
    with stage(job.console, NAME, config.guessed) as shown:

        def progress(generation: Generation, policy: CompiledPolicy) -> None:
            job.dashboard.scalars(generation.evaluations, {tags.REWARD: generation.mean})
            shown.advance(generation.number, f"reward {generation.mean:.4f}")

        found = search(
            lambda z: job.learned(weights + basis @ z, NAME),
            Ars(np.zeros(basis.shape[1]), sigma=config.sigma, population=config.population, seed=seed),
            generations=config.guessed,
            pool=job.guessed_episodes(first, config.pool),
            episodes=config.episodes,
            arena=job.arena,
            seed=seed,
            checkpoint=job.run.checkpoints / f"{NAME}.npy",
            progress=progress,
            score=job.objective,
        )
    both = [weights, weights + basis @ found.numbers]
    validation = job.guessed_episodes(VALIDATION, job.config.validation_episodes)
    policies = [job.learned(one, NAME) for one in both]
    worths = job.arena.values(policies, validation, VALIDATION, job.objective)
    episodes = found.evaluations + len(both) * len(validation)
    return {"weights": both[int(worths.argmax())].tolist(), "episodes": episodes, "worths": worths.tolist()}
