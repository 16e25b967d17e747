"""One point of the space: it plays or learns, round by round, and tells what it is worth."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from steersman.runtime.policy import CompiledPolicy
from steersman.training import ppo
from steersman.training.config import TrainingConfig
from steersman.training.job import SELECTION, TRAINING, Job
from steersman.training.objective import Arena, ArenaMaker, worth
from steersman.training.run import Run
from steersman.training.search import Generation
from steersman.training.stages import OPTIMISERS, search_weights
from steersman.training.tuning.folder import TOLD
from steersman.training.tuning.space import WEIGHT, TuningConfig, varied


def single(fleet: Any, workload: Any) -> Arena:
    """An arena of one thread: a trial has one core."""
    return Arena(fleet, 1)


def run_trial(point: dict[str, Any], tuning: TuningConfig, traces: str | None, prepared: dict[str, Any]) -> None:
    """A trial, as Ray Tune calls it. prepared: {"load", "weights"}, common to all trials.

    Raises:
        UserError: the point is not allowed.
    """
    from ray import tune

    torch.set_num_threads(1)
    context = tune.get_context()
    folder = Path(context.get_trial_dir())
    settings = varied(tuning.settings(), point)
    job = open_job(folder, settings, traces, single)
    job.load, job.variants = prepared["load"], prepared["variants"]
    try:
        for key, value in point.items():
            if key.startswith(WEIGHT):
                tenants = dict(job.workload.tenants)
                tenant = key.removeprefix(WEIGHT)
                tenants[tenant] = tenants[tenant].model_copy(update={"weight": value})
                job.workload = job.workload.model_copy(update={"tenants": tenants})
        torch.manual_seed(settings.seed)
        if settings.algorithms[0] in OPTIMISERS:
            search_rounds(job, tuning, np.array(prepared["weights"]), folder, tune.report)
        else:
            learn_rounds(job, tuning, np.array(prepared["weights"]), tune)
    finally:
        job.close()


def open_job(folder: Path, settings: TrainingConfig, traces: str | None, arenas: ArenaMaker) -> Job:
    """What the stages of a training work with, silent."""
    return Job(Run(folder, settings), Console(file=io.StringIO()), Path(traces) if traces else None, arenas)


def judged(job: Job, tuning: TuningConfig, policy: CompiledPolicy) -> float:
    """The worth of a policy on episodes that no training plays."""
    return float(job.arena.values([policy], job.episodes(SELECTION, tuning.episodes), SELECTION)[0])


def search_rounds(
    job: Job, tuning: TuningConfig, start: np.ndarray, folder: Path, report: Callable[[dict[str, Any]], None]
) -> None:
    """CMA-ES or ARS; reported every 1/rounds of the generations. It goes on from its own checkpoint in `folder`."""
    config, algorithm = job.config.search, job.config.algorithms[0]
    due = {round(config.generations * (k + 1) / tuning.rounds) for k in range(tuning.rounds)}

    def progress(generation: Generation, policy: CompiledPolicy) -> None:
        if generation.number in due:
            report({TOLD: judged(job, tuning, policy), "generation": generation.number})

    pool = job.pool(TRAINING, config.pool)
    search_weights(job, algorithm, start, pool, folder / "search.npy", progress, worth)


def learn_rounds(job: Job, tuning: TuningConfig, start: np.ndarray, tune: Any) -> None:
    """PPO; reported, with a checkpoint, every 1/rounds of its steps.

    From a checkpoint, its own or one to copy, it takes weights and the optimiser's state, but this point's numbers.
    """
    config, algorithm = job.config.ppo, job.config.algorithms[0]
    env = ppo.environment(job)
    model = ppo.make(algorithm, env, config, job.config.architecture, job.config.seed)
    model.policy.scorer.set_weights(start)
    model.set_logger(ppo.silent())
    done = 0
    if (kept := tune.get_checkpoint()) is not None:
        with kept.as_directory() as folder:
            model.set_parameters(str(Path(folder) / "model.zip"), device="cpu")
            done = int(Path(folder, "round").read_text())
    for number in range(done, tuning.rounds):
        model.learn(config.steps // tuning.rounds, log_interval=None, reset_num_timesteps=False)
        policy = job.learned(model.policy.scorer.get_weights(), algorithm)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder) / "model.zip")
            Path(folder, "round").write_text(str(number + 1))
            told = {TOLD: judged(job, tuning, policy), "step": int(model.num_timesteps)}
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))
    env.close()
