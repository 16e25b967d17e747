"""All trials: ASHA or PBT, resumption, the table, TensorBoard's HParams."""

from __future__ import annotations

import csv
import os
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from steersman.agents.policies import heuristics, resolve
from steersman.runtime.config import read_yaml, validate
from steersman.runtime.errors import UserError
from steersman.training.objective import local_arena
from steersman.training.progress import stage
from steersman.training.run import stamped, write_json
from steersman.training.stages import imitate_policy, size
from steersman.training.tuning.space import TuningConfig
from steersman.training.tuning.trial import TOLD, open_job, run_trial

TRIALS = "trials"  # Ray Tune's folder of an experiment


def create(root: Path, tuning: TuningConfig, name: str, traces: Path | None) -> Path:
    """A new folder under `root` for a tuning.

    Raises:
        UserError: it cannot be written.
    """
    folder = root / stamped(name)
    try:
        folder.mkdir(parents=True, exist_ok=False)
        text = yaml.safe_dump(tuning.model_dump(mode="json", exclude_none=True), sort_keys=False)
        (folder / "tuning.yaml").write_text(text, encoding="utf-8")
        write_json(folder / "traces.json", str(traces.resolve()) if traces else None)
    except OSError as error:
        raise UserError(f"{folder}: the folder of a tuning cannot be written: {error.strerror}") from error
    return folder


def opened(folder: Path) -> TuningConfig:
    """The tuning that an existing folder is for.

    Raises:
        UserError: it is for none.
    """
    path = folder / "tuning.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a folder of a tuning (it has no tuning.yaml); name one that was printed")
    return validate(TuningConfig, read_yaml(path), str(path))


def tune(folder: Path, console: Console) -> list[dict[str, Any]]:
    """Run, or go on with, the tuning in `folder`, on the Ray that this process is connected to.

    Returns the trials, best first: {"trial", "worth", "rounds", and the point}. Writes trials.csv and best.yaml, and
    TensorBoard's files to `tensorboard`.

    Raises:
        UserError: it is no folder of a tuning, or every trial failed.
        KeyboardInterrupt: it was interrupted, and can be resumed.
    """
    import json

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables: ours are shown
    from ray import tune as ray_tune
    from ray.tune import RunConfig, TuneConfig, Tuner

    from steersman.training.tuning.shown import Progress, show_on
    from steersman.training.tuning.state import recover

    tuning = opened(folder)
    traces = json.loads((folder / "traces.json").read_text(encoding="utf-8"))
    prepared = _prepared(folder, tuning, traces, console)
    trainable = partial(run_trial, tuning=tuning, traces=traces, prepared=prepared)
    kept = str((folder / TRIALS).resolve())
    with stage(console, "tuning", tuning.trials * tuning.rounds) as shown:
        show_on(shown, Path(kept))
        if recover(Path(kept)):
            tuner = Tuner.restore(kept, trainable, resume_unfinished=True, restart_errored=True)
        else:
            ranges = tuning.ranges()
            tuner = Tuner(
                trainable,
                param_space={key: one.domain() for key, one in ranges.items()},
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
    _write(folder, tuning, rows)
    return rows


def table(rows: list[dict[str, Any]], shown: int = 12) -> Table:
    """The best trials for a terminal."""
    made = Table(box=None, pad_edge=False)
    columns = list(rows[0])
    for name in columns:
        made.add_column(name, justify="left" if name == "trial" else "right")
    for row in rows[:shown]:
        made.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return made


def _prepared(folder: Path, tuning: TuningConfig, traces: str | None, console: Console) -> dict[str, Any]:
    """What all trials have in common, computed once: the load that the fleet carries, and imitated weights."""
    settings = tuning.settings()
    job = open_job(folder / "common", settings, traces, 1.0, local_arena)
    try:
        with console.status("sizing the load …"):
            known = {name: resolve(name) for name in settings.compare} or heuristics()
            job.load = job.run.once("sizing", lambda: size(job, known))["load"]
        if tuning.policy is not None:
            return {"load": job.load, "weights": None}
        with console.status(f"imitating {settings.imitation.teacher} …"):
            teacher = resolve(settings.imitation.teacher)
            cloned = job.run.once("imitation", lambda: imitate_policy(job, teacher))
        return {"load": job.load, "weights": cloned["weights"]}
    finally:
        job.close()


def _scheduler(tuning: TuningConfig) -> Any:
    from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

    if tuning.scheduler == "asha":
        return ASHAScheduler(max_t=tuning.rounds, grace_period=1, reduction_factor=3)
    mutations = {key: one.domain() for key, one in tuning.ranges().items()}
    return PopulationBasedTraining(perturbation_interval=1, hyperparam_mutations=mutations, synch=False)


def _row(result: Any) -> dict[str, Any]:
    metrics = result.metrics
    told = {"trial": metrics["trial_id"], TOLD: float(metrics[TOLD]), "rounds": int(metrics["training_iteration"])}
    return told | dict(result.config)


def _write(folder: Path, tuning: TuningConfig, rows: list[dict[str, Any]]) -> None:
    with (folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    point = {key: value for key, value in rows[0].items() if key not in ("trial", TOLD, "rounds")}
    (folder / "best.yaml").write_text(yaml.safe_dump({"worth": rows[0][TOLD], "point": point}), encoding="utf-8")
    from torch.utils.tensorboard import SummaryWriter, summary

    protocol: Any = summary
    for row in rows:
        with SummaryWriter(str(folder / "tensorboard" / row["trial"])) as events:
            made: Any = events
            values = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in row.items() if k in point}
            for message in protocol.hparams(values, {f"tune/{TOLD}": row[TOLD]}):
                made.file_writer.add_summary(message)
            made.add_scalar(f"tune/{TOLD}", row[TOLD], row["rounds"])
