"""Training, and the search for good numbers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from steersman.cli.common import (
    JournalOption,
    Ray,
    Sets,
    Traces,
    app,
    console,
)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A training file, or the name of a shipped one.")] = "default",
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run.", metavar="RUN")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders go.", metavar="DIR")] = Path("runs"),
    ray: Ray = None,
    journal: JournalOption = None,
    traces: Traces = None,
    sets: Sets = None,
) -> None:
    """Train a policy, compare it with the heuristics on held-out episodes, export it.

    With --journal, on the recorded traffic and fleet; `--set fleet=NAME` takes another one.
    """
    from steersman.runtime.config import apply_sets, read_yaml, validate
    from steersman.runtime.configs import find_config
    from steersman.training.cluster.connect import arenas
    from steersman.training.config import TrainingConfig
    from steersman.training.job import check
    from steersman.training.recorded import keep_journal, told
    from steersman.training.run import Run
    from steersman.training.train import train as run_training
    from steersman.training.train import worth_deploying

    if resume is not None:
        run = Run.open(resume)
        traces = traces or run.traces
    else:
        path = find_config("training", config)
        recorded = {} if journal is None else dict.fromkeys(("workload", "fleet"), str(journal))
        settings = validate(TrainingConfig, apply_sets(read_yaml(path) | recorded, sets or []), str(path))
        if journal is not None:
            for sentence in told(journal):
                console.print(sentence, highlight=False)
        check(settings, traces)
    with arenas(ray, console) as made:
        if resume is None:
            run = Run.create(runs, settings, path.stem, traces)
            if journal is not None:
                run = keep_journal(run, journal)
        try:
            result = run_training(run, console, traces, shlex.join(["steersman", *sys.argv[1:]]), made)
        except KeyboardInterrupt:
            console.print(f"\ninterrupted; go on with: [bold]steersman train --resume {run.folder}[/]", highlight=False)
            raise typer.Exit(130) from None
    console.print(f"\npolicy exported to [bold]{result.bundle}[/]. Next:", highlight=False)
    best = shlex.quote(result.best_heuristic)
    chosen = run.folder if worth_deploying(result.paired) else best
    for command in (
        f"tensorboard --logdir {run.folder.parent}",
        f"steersman evaluate --policy {run.folder} --policy {best} --workload {run.config.workload} "
        f"--fleet {run.config.fleet}",
        f"steersman serve --policy {chosen} --fleet configs/fleets/local.yaml",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)


@app.command()
def tune(
    space: Annotated[str, typer.Argument(help="A tuning file, or the name of a shipped one.")] = "heuristic",
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted tuning.", metavar="DIR")] = None,
    out: Annotated[Path, typer.Option(help="Where folders of results go.", metavar="DIR")] = Path("tunings"),
    ray: Ray = None,
    traces: Traces = None,
    sets: Sets = None,
) -> None:
    """Search a heuristic's numbers, as the benchmark does, or hyper-parameters and weights of rewards, with Ray Tune.

    Trials of trainings always run on Ray; a heuristic's episodes do with --ray.
    """
    from steersman.training.cluster.connect import arenas, joined
    from steersman.training.tuning.folder import beside, create, opened, table
    from steersman.training.tuning.heuristic import best_spec, tune_policy
    from steersman.training.tuning.space import load_tuning
    from steersman.training.tuning.tune import tune as run_tuning

    tuning = opened(resume) if resume is not None else load_tuning(space, sets or [])
    heuristic = tuning.policy is not None
    with arenas(ray, console) if heuristic else joined(ray or "local", console) as place:
        folder = resume or create(out, tuning, Path(space).stem, traces)
        console.print(f"results go to {folder}", highlight=False)
        try:
            rows = tune_policy(folder, console, place) if heuristic else run_tuning(folder, console)
        except KeyboardInterrupt:
            console.print(f"\ninterrupted; go on with: steersman tune --resume {folder}", highlight=False)
            raise typer.Exit(130) from None
    console.print(beside(rows) if heuristic else table(rows), highlight=False)
    logs = folder if heuristic else folder / "tensorboard"
    console.print(f"all trials: {folder / 'trials.csv'}; tensorboard --logdir {logs}", highlight=False)
    if heuristic:
        best = shlex.quote(best_spec(tuning, rows))
        console.print(f"the best of them: --policy {best}", highlight=False, soft_wrap=True)
