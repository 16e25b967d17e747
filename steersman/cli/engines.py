"""Real engines: measured, and compared with the simulator."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from steersman.cli.common import (
    Sets,
    Traces,
    app,
    console,
)
from steersman.runtime.errors import UserError


@app.command()
def calibrate(
    backend: Annotated[
        str, typer.Option("--backend", help="A server's URL, or a fleet's name or file, with backends.")
    ],
    out: Annotated[Path, typer.Option(help="Where profiles go.", metavar="DIR")] = Path("profiles"),
    seconds: Annotated[float, typer.Option(help="Length of a phase of the load; there are about ten.", min=1)] = 15,
    model: Annotated[str, typer.Option(help="With a URL: the model's name there.")] = "default",
    kv_tokens: Annotated[int, typer.Option(help="With a URL: tokens that its KV cache holds.", min=1)] = 65536,
    max_model_len: Annotated[int, typer.Option(help="With a URL: its longest context.", min=1)] = 4096,
    max_num_seqs: Annotated[int, typer.Option(help="With a URL: its batch limit.", min=1)] = 32,
    token_budget: Annotated[int, typer.Option(help="With a URL: its tokens per iteration.", min=1)] = 2048,
    hardware: Annotated[str | None, typer.Option(help="What it runs on, for the profile.")] = None,
    sets: Sets = None,
) -> None:
    """Drive real engines with a short designed load, and write their cost profiles."""
    from steersman.runtime import calibration
    from steersman.runtime.configs import find_config
    from steersman.runtime.fleet import read_fleet

    if backend.startswith(("http://", "https://")):
        fleet = calibration.fleet_of_url(
            backend,
            kv_tokens=kv_tokens,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
            model=model,
        )
    else:
        fleet = read_fleet(find_config("fleets", backend), sets)
    day = datetime.date.today().isoformat()
    source = f"{shlex.join(['steersman', *sys.argv[1:]])}, {day}"
    measured = calibration.calibrate(
        fleet, seconds, source=source, hardware=hardware, told=lambda text: print(text, file=sys.stderr)
    )
    for one in measured:
        calibration.write(one.profile, out / one.file)
        console.print(f"{one.replica}: {out / one.file}, off by {one.profile.error}", highlight=False, soft_wrap=True)


@app.command()
def validate(
    fleet: Annotated[str, typer.Option("--fleet", help="A fleet's name or file, with backends.")] = "local",
    workload: Annotated[str, typer.Option("--workload", "--trace", help="A workload's name or file.")] = "local",
    profile: Annotated[
        list[str] | None,
        typer.Option(help="A profile for all replicas, or GROUP=PROFILE.", metavar="[GROUP=]PROFILE"),
    ] = None,
    load: Annotated[list[float] | None, typer.Option(help="Share of the fleet's capacity.", min=0.001)] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "--policies", help="As in `evaluate`; several, also by commas, are ranked."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of an episode's arrivals.", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="First seed.", min=0)] = 4_000_000,
    plot: Annotated[Path | None, typer.Option(help="Write the CDFs as a picture.", metavar="PNG")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traces: Traces = None,
    sets: Sets = None,
) -> None:
    """Play the same episodes on real replicas and in the simulator: how far off is it, and does it rank alike?"""
    import json

    from steersman.agents.policies import resolve
    from steersman.runtime.configs import find_config
    from steersman.runtime.fleet import load_fleet, with_profiles
    from steersman.runtime.workload import load_workload
    from steersman.training.fidelity import as_report
    from steersman.training.fidelity_report import cdf_figure, metrics_table, ranks_table
    from steersman.training.validate import validate as play

    specs = [name for part in policy or ["least-requests"] for name in part.split(",")]
    chosen = [resolve(spec) for spec in dict.fromkeys(specs)]
    where = find_config("fleets", fleet)
    replicas = with_profiles(load_fleet(where, sets), profile or [])
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {plot}: the file's name must end in .png, .svg or .pdf")
    played = play(
        replicas,
        load_workload(find_config("workloads", workload), traces=traces),
        chosen,
        load or [0.5, 0.8, 1.1],
        seconds=seconds,
        seed=seed,
        told=lambda text: print(text, file=sys.stderr),
    )
    report = as_report(played, replicas.table()["max_num_seqs"])
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        cdf_figure(played).savefig(plot)
    if as_json:
        print(json.dumps(report))
        return
    console.print(metrics_table(report), highlight=False)
    if len(chosen) > 1:
        console.print()
        console.print(ranks_table(report), highlight=False)
        console.print(f"\nKendall's tau, mean: {report['kendall_tau']}", highlight=False)
