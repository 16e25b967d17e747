"""All trials of a training: ASHA or PBT, resumption."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from steersman.agents.policies import resolve
from steersman.runtime.errors import UserError
from steersman.training.objective import local_arena
from steersman.training.progress import stage
from steersman.training.stages import imitate_policy, prepare
from steersman.training.tuning.folder import TOLD, opened, traces_of, write
from steersman.training.tuning.space import TuningConfig
from steersman.training.tuning.trial import open_job, run_trial

TRIALS = "trials"  # Ray Tune's folder of an experiment


def tune(folder: Path, console: Console) -> list[dict[str, Any]]:
    """Run, or go on with, the tuning in `folder`, on the Ray that this process is connected to.

    Returns the trials, best first: {"trial", "worth", "rounds", and the point}. Writes trials.csv and best.yaml, and
    TensorBoard's files to `tensorboard`.

    Raises:
        UserError: it is no folder of a tuning, or every trial failed.
        KeyboardInterrupt: it was interrupted, and can be resumed.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables: ours are shown
    from ray import tune as ray_tune
    from ray.tune import RunConfig, TuneConfig, Tuner

    from steersman.training.tuning.shown import Progress, show_on
    from steersman.training.tuning.state import recover

    tuning = opened(folder)
    traces = traces_of(folder)
    prepared = _prepared(folder, tuning, traces, console)
    trainable = partial(run_trial, tuning=tuning, traces=traces, prepared=prepared)
    kept = str((folder / TRIALS).resolve())
    with stage(console, "tuning", tuning.trials * tuning.rounds) as shown:
        show_on(shown, Path(kept))
        if recover(Path(kept)):
            tuner = Tuner.restore(kept, trainable, resume_unfinished=True, restart_errored=True)
        else:
            tuner = Tuner(
                trainable,
                param_space={key: one.domain() for key, one in tuning.space.items()},
                tune_config=TuneConfig(
                    metric=TOLD,
                    mode="max",
                    num_samples=tuning.trials,
                    reuse_actors=True,
                    scheduler=_scheduler(tuning),
                    search_alg=ray_tune.search.BasicVariantGenerator(random_state=tuning.seed),
                ),
                run_config=RunConfig(
                    name=TRIALS, storage_path=str(folder.resolve()), verbose=0, callbacks=[Progress()]
                ),
            )
        found = tuner.fit()
    if found.num_terminated + found.num_errors < tuning.trials:
        raise KeyboardInterrupt  # which Ray Tune catches, saves what there is, and returns
    told = [found[i] for i in range(len(found))]
    rows = sorted((_row(one) for one in told if TOLD in (one.metrics or {})), key=lambda row: -row[TOLD])
    if not rows:
        first = str(found.errors[0]).strip().splitlines()[-1] if found.errors else "nothing reported"
        raise UserError(f"every trial failed, the first with: {first}")
    write(folder, rows)
    return rows


def _prepared(folder: Path, tuning: TuningConfig, traces: str | None, console: Console) -> dict[str, Any]:
    """What all trials have in common, computed once: the load that the fleet carries, and imitated weights."""
    settings = tuning.settings()
    job = open_job(folder / "common", settings, traces, local_arena)
    try:
        with console.status("sizing the load …"):
            prepare(job)
        with console.status(f"imitating {settings.imitation.teacher} …"):
            teacher = resolve(settings.imitation.teacher)
            cloned = job.run.once("imitation", lambda: imitate_policy(job, teacher))
        return {"load": job.load, "variants": job.variants, "weights": cloned["weights"]}
    finally:
        job.close()


def _scheduler(tuning: TuningConfig) -> Any:
    from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

    if tuning.scheduler == "asha":
        return ASHAScheduler(max_t=tuning.rounds, grace_period=1, reduction_factor=3)
    mutations = {key: one.domain() for key, one in tuning.space.items()}
    return PopulationBasedTraining(perturbation_interval=1, hyperparam_mutations=mutations, synch=False)


def _row(result: Any) -> dict[str, Any]:
    metrics = result.metrics
    told = {"trial": metrics["trial_id"], TOLD: float(metrics[TOLD]), "rounds": int(metrics["training_iteration"])}
    return told | dict(result.config)
