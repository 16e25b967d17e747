"""What policies are worth, and why they decide as they do."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from steersman.cli.common import (
    FleetOption,
    JournalOption,
    Part,
    Policies,
    Ray,
    Sets,
    Traces,
    WorkloadOption,
    app,
    console,
)
from steersman.runtime.errors import UserError


@app.command()
def evaluate(
    policy: Policies = None,
    workload: Annotated[str | None, typer.Option(help="A workload's name or file; default: `default`.")] = None,
    fleet: Annotated[
        str | None, typer.Option(help="A fleet's name or file; default: `default`, or the journal's.")
    ] = None,
    journal: JournalOption = None,
    load: Annotated[float, typer.Option(help="Multiplies the workload's rate.", min=0.001)] = 1.0,
    episodes: Annotated[int, typer.Option(help="Episodes, each with a seed of its own.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="First seed.", min=0)] = 3_000_000,
    split: Annotated[Part, typer.Option(help="Part of a trace.")] = Part.HELD_OUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traces: Traces = None,
) -> None:
    """Compare policies on the same episodes: anything that scores candidates.

    With --journal, on a part of the recorded traffic from its beginning to its end, beside what really happened.
    """
    import json

    from steersman.agents.policies import resolve
    from steersman.runtime.configs import find_config
    from steersman.runtime.draw import draw
    from steersman.runtime.fleet import load_fleet
    from steersman.runtime.workload import load_workload
    from steersman.training.evaluate import compare
    from steersman.training.objective import Arena
    from steersman.training.recorded import Replay
    from steersman.training.report import comparison_json, comparison_table

    policies = [
        resolve(spec) for spec in dict.fromkeys(policy or ["round-robin", "least-requests", "jsed", "push-shed"])
    ]
    names = [p.name for p in policies]
    policies = [
        p.with_values(p.values, f"{p.name} #{i}") if names.count(p.name) > 1 else p for i, p in enumerate(policies, 1)
    ]
    if journal is not None and workload is not None:
        raise UserError("--journal is the workload itself; leave out --workload")
    replayed = None if journal is None else Replay.of(journal, split.value)
    arena = Arena(load_fleet(find_config("fleets", fleet or journal or "default")))
    if replayed is not None:
        requests = [replayed.episode(arena.fleet, load)]
    else:
        source = load_workload(find_config("workloads", workload or "default"), traces=traces)
        requests = [draw(source, arena.fleet, seed + i, load=load, split=split.value) for i in range(episodes)]
    with console.status("playing …") if not as_json else nullcontext():
        comparison = compare(policies, requests, arena, seed)
    summaries = comparison.summaries
    best = max(summaries, key=lambda s: s.goodput_rps).policy
    shown: dict[str, Any] = {}
    if replayed is not None:
        summaries.append(replayed.summary())
        agreement = replayed.agreement(policies, seed)
        shown = {"journal": replayed.told, "agreement": agreement.plain}
    if as_json:
        print(json.dumps(comparison_json(summaries) | shown))
        return
    for sentence in shown.get("journal", ()):
        console.print(sentence, highlight=False)
    console.print(comparison_table(summaries, best, width=console.width))
    if replayed is not None:
        console.print(agreement.text, highlight=False)


@app.command()
def explain(
    policy: Annotated[str, typer.Option("--policy", help="A run folder, a bundle, or a heuristic.")],
    workload: WorkloadOption = "default",
    fleet: FleetOption = "default",
    load: Annotated[float, typer.Option(help="Multiplies the workload's rate.", min=0.001)] = 1.0,
    against: Annotated[
        str | None, typer.Option(help="A policy to compare with; by default the best heuristic here.")
    ] = None,
    episodes: Annotated[int, typer.Option(help="Whole episodes for the attainment.", min=1)] = 8,
    examples: Annotated[int, typer.Option(help="Decisions of each kind to show.", min=1)] = 4,
    rolled: Annotated[int, typer.Option(help="Differing decisions of each kind to play again.", min=0)] = 60,
    seed: Annotated[int, typer.Option(help="First seed.", min=0)] = 6_000_000,
    split: Annotated[Part, typer.Option(help="Part of a trace.")] = Part.HELD_OUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page.", metavar="FILE")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the partial dependence as a picture.", metavar="PNG")] = None,
    ray: Ray = None,
    traces: Traces = None,
) -> None:
    """Say what a policy does and why, and what that gains over a heuristic."""
    import json

    from steersman.agents.policies import resolve
    from steersman.runtime.configs import find_config
    from steersman.runtime.fleet import load_fleet
    from steersman.runtime.workload import load_workload
    from steersman.training.cluster.connect import arenas
    from steersman.training.explain.explain import as_json as plain
    from steersman.training.explain.explain import explain as ask
    from steersman.training.explain.show import rendered, write_figure, write_page

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {plot}: the file's name must end in .png, .svg or .pdf")
    asked, rival = resolve(policy), None if against is None else resolve(against)
    source, served = (
        load_workload(find_config("workloads", workload), traces=traces),
        load_fleet(find_config("fleets", fleet)),
    )
    shown = Console(stderr=True, quiet=True) if as_json else console
    with arenas(ray, shown) as made, shown.status("compiling …") as status:
        found = ask(
            asked,
            rival,
            source,
            made(served, source),
            load=load,
            split=split.value,
            seed=seed,
            episodes=episodes,
            examples=examples,
            rolled=rolled,
            say=status.update,
        )
    if html is not None:
        write_page(found, html)
    if plot is not None:
        write_figure(found, plot)
    if as_json:
        print(json.dumps(plain(found)))
    else:
        console.print(rendered(found), highlight=False)


@app.command()
def benchmark(
    scenario: Annotated[
        list[str] | None, typer.Argument(help="Scenarios: names of shipped ones (configs/benchmarks) or files.")
    ] = None,
    policy: Policies = None,
    workload: Annotated[str | None, typer.Option(help="A scenario of your own: a workload's name or file.")] = None,
    fleet: Annotated[str | None, typer.Option(help="A scenario of your own: a fleet's name or file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer scenarios, seeds and searched episodes.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Held-out episodes at each load.", min=2)] = None,
    training_seeds: Annotated[int | None, typer.Option(help="Learned policies; 0: none.", min=0)] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted benchmark.", metavar="DIR")] = None,
    out: Annotated[Path, typer.Option(help="Where folders of results go.", metavar="DIR")] = Path("benchmarks"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ray: Ray = None,
    traces: Traces = None,
    sets: Sets = None,
) -> None:
    """Tune the heuristics and train policies with one budget, and compare them all on held-out episodes."""
    import json

    from steersman.training.benchmark.benchmark import benchmark as run_benchmark
    from steersman.training.benchmark.folder import Folder
    from steersman.training.benchmark.plan import Asked, make_plan
    from steersman.training.benchmark.results import write
    from steersman.training.benchmark.tables import show
    from steersman.training.cluster.connect import arenas

    if resume is not None:
        if scenario or policy or workload or fleet or sets:
            raise UserError(
                "--resume goes on with what its folder says; leave out scenarios, policies, files and --set"
            )
        folder = Folder.open(resume)
    else:
        asked = Asked(tuple(scenario or ()), workload, fleet, tuple(policy or ()), quick, seeds, training_seeds)
        command = shlex.join(["steersman", *sys.argv[1:]])
        made = make_plan(asked, traces, tuple(sets or ()), command)
    shown = Console(stderr=True) if as_json else console
    with arenas(ray, shown) as made_arenas:
        if resume is None:
            folder = Folder.create(out, asked.name, made)
        shown.print(f"results go to {folder.path}", highlight=False)
        try:
            found = run_benchmark(folder, shown, made_arenas)
        except KeyboardInterrupt:
            shown.print(f"\ninterrupted; go on with: steersman benchmark --resume {folder.path}", highlight=False)
            raise typer.Exit(130) from None
    results = write(folder, found)
    if as_json:
        print(json.dumps(results))
    else:
        show(console, found, folder.plan.budget)
        console.print(f"report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
