"""The stages of a training run but for PPO and tuning (`tuned.py`): size the load, imitate, search."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from steersman.agents.policies import heuristics, resolve
from steersman.agents.scorer import Scorer
from steersman.runtime.errors import UserError
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.training import tags
from steersman.training.directions import directions
from steersman.training.imitate import imitate, record, thinned
from steersman.training.job import TRAINING, Job
from steersman.training.objective import Score
from steersman.training.optimisers import Ars, CmaEs
from steersman.training.progress import stage
from steersman.training.search import Generation, search
from steersman.training.sizing import capacity

SHOW_EVERY = 10  # generations between two evaluations for the dashboard
PROBES = 6  # episodes; a single one may be mostly burst or mostly calm
VARIANT_PROBES = 2


def rivals(job: Job) -> dict[str, CompiledPolicy]:
    """The heuristics that the training is compared with, as shipped, by name."""
    return {name: resolve(name) for name in job.config.compare} or dict(heuristics())


def size(job: Job) -> dict[str, Any]:
    """The capacity of the best heuristic as shipped: three found among all by a probe, then by bisection.

    {"load": multiple of the workload's rate, "heuristic": whose capacity it is, "rps": requests per second}
    """
    known, seeds = rivals(job), range(TRAINING, TRAINING + PROBES)
    probe = [job.sample(seed, 1.0) for seed in seeds]
    worths = job.arena.values(list(known.values()), probe)
    ranked = sorted(zip(worths, known, strict=True), reverse=True)[:3]
    loads = [(capacity(known[name], job.sample, job.arena, seeds), name) for _, name in ranked]
    load, name = max(loads)
    return {"load": load, "heuristic": name, "rps": load * job.workload.offered_rps}


def prepare(job: Job) -> dict[str, Any]:
    """Size the load and that of the variants, and tell the job. Returns what `size` does."""
    sized = job.run.once("sizing", lambda: size(job))
    best = resolve(sized["heuristic"])
    job.load = sized["load"]
    job.variants = job.run.once("variants", lambda: {"loads": size_variants(job, best)})["loads"]
    return sized


def size_variants(job: Job, policy: CompiledPolicy, guessed: bool = False) -> list[tuple[int, float]]:
    """Number and load of each variant to train on: the load that `policy` carries there, as near as is needed.

    guessed: with guesses of the SLOs.

    Those that it carries at no load, or at any, are left out.
    """
    config, found, seeds = job.config.variants, [], range(TRAINING, TRAINING + VARIANT_PROBES)
    for number in range(config.count) if config.share else ():
        with contextlib.suppress(UserError):
            load = capacity(policy, partial(job.sample, variant=number, guessed=guessed), job.arena, seeds, steps=6)
            found.append((number, load))
    return found


def imitate_policy(job: Job, teacher: CompiledPolicy) -> dict[str, Any]:
    """The scorer fitted to the choices of `teacher`. {"weights", "teacher", "agreement"}"""
    config = job.config.imitation
    with job.console.status(f"recording decisions of {teacher.name} …"):
        recorded = record(teacher, job.fleet, job.episodes(TRAINING, config.episodes))
    rows, actions = thinned(*recorded, config.holds, np.random.default_rng(job.config.seed))
    scorer = Scorer(job.config.architecture)
    with stage(job.console, "imitation", config.epochs) as shown:

        def progress(epoch: int, loss: float, agreement: float) -> None:
            shown.advance(epoch, f"loss {loss:.3f}  agreement {agreement:.1%}")
            figures = {f"{tags.LOSSES}imitation": loss, "train/imitation_agreement": agreement}
            job.dashboard.scalars(epoch, figures)

        agreement = imitate(scorer, rows, actions, config, job.config.seed, progress)
    return {"weights": scorer.get_weights().tolist(), "teacher": teacher.name, "agreement": agreement}


OPTIMISERS: dict[str, Any] = {"cma-es": CmaEs, "ars": Ars}


def search_scorer(job: Job, algorithm: str, start: np.ndarray, pool: list[Requests]) -> dict[str, Any]:
    """`algorithm`, a key of OPTIMISERS, over the scorer's weights, from `start`. {"weights", "episodes"}"""
    config = job.config.search
    with stage(job.console, algorithm, config.generations) as shown:
        clock, attainment = Clock(), 0.0

        def progress(generation: Generation, policy: CompiledPolicy) -> None:
            nonlocal attainment
            clock.count(generation.evaluations)
            figures = {
                tags.REWARD: generation.mean,
                "train/sigma": generation.sigma,
                "train/speed_steps_per_s": clock.rate(),
            }
            if generation.number % SHOW_EVERY == 0 or generation.number == config.generations:
                attainment = job.watch(generation.evaluations, policy, figures).attainment
            else:
                job.dashboard.scalars(generation.evaluations, figures)
            shown.advance(
                generation.number,
                f"reward {generation.mean:.4f}  attainment {attainment:.1%}  {clock.rate():.0f} episodes/s",
            )

        checkpoint = job.run.checkpoints / f"{algorithm}.npy"
        weights, episodes = search_weights(job, algorithm, start, pool, checkpoint, progress, job.objective)
    return {"weights": weights.tolist(), "episodes": episodes}


def search_weights(
    job: Job,
    algorithm: str,
    start: np.ndarray,
    pool: list[Requests],
    checkpoint: Path,
    progress: Callable[[Generation, CompiledPolicy], None],
    score: Score,
) -> tuple[np.ndarray, int]:
    """Search among the scorer's weights, from `start`, in `directions`: those found, and the episodes played."""
    config, seed = job.config.search, job.config.seed + 1
    basis = directions(job, start)
    found = search(
        lambda z: job.learned(start + basis @ z, algorithm),
        OPTIMISERS[algorithm](np.zeros(basis.shape[1]), sigma=config.sigma, population=config.population, seed=seed),
        generations=config.generations,
        pool=pool,
        episodes=config.episodes,
        arena=job.arena,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
        score=score,
    )
    return start + basis @ found.numbers, found.evaluations


class Clock:
    """Speed of counted work since the first count: what a resumed run repeats from its checkpoint is none."""

    def __init__(self) -> None:
        self._started, self._first, self._done = time.monotonic(), -1, 0

    def count(self, done: int) -> None:
        """`done` units in all are done."""
        if self._first < 0:
            self._first, self._started = done, time.monotonic()
        self._done = done

    def rate(self) -> float:
        """Units per second."""
        return (self._done - max(0, self._first)) / max(1e-9, time.monotonic() - self._started)
