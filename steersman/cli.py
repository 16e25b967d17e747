"""The command line: composes the four parts. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from steersman.runtime.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train schedulers for LLM inference by reinforcement learning, and run them.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")
app.add_typer(bench, name="bench")
console = Console(width=None if sys.stdout.isatty() else 160)  # a file or a pipe has no width of its own

Traces = Annotated[
    Path | None,
    typer.Option("--traces", envvar="STEERSMAN_TRACES", help="Folder with trace files.", metavar="DIR"),
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Change a key: key.path=value.", metavar="KEY=VALUE")]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="A heuristic (`steersman policies`), `name?key=value`, a run folder or a bundle."),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Play episodes on a Ray cluster; without an address on one of this machine's cores, or of $RAY_ADDRESS.",
        metavar="[ADDRESS]",
    ),
]
WorkloadOption = Annotated[str, typer.Option("--workload", help="A workload's name or file.")]
FleetOption = Annotated[str, typer.Option("--fleet", help="A fleet's name or file.")]


class Part(StrEnum):
    """Parts of a trace."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A training file, or the name of a shipped one.")] = "default",
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run.", metavar="RUN")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders go.", metavar="DIR")] = Path("runs"),
    ray: Ray = None,
    traces: Traces = None,
    sets: Sets = None,
) -> None:
    """Train a policy, compare it with the heuristics on held-out episodes, export it."""
    from steersman.runtime.config import apply_sets, read_yaml, validate
    from steersman.runtime.configs import find_config
    from steersman.training.cluster.connect import arenas
    from steersman.training.config import TrainingConfig
    from steersman.training.job import check
    from steersman.training.run import Run
    from steersman.training.train import train as run_training
    from steersman.training.train import worth_deploying

    if resume is not None:
        run = Run.open(resume)
        traces = traces or run.traces
    else:
        path = find_config("training", config)
        settings = validate(TrainingConfig, apply_sets(read_yaml(path), sets or []), str(path))
        check(settings, traces)
    with arenas(ray, console) as made:
        if resume is None:
            run = Run.create(runs, settings, path.stem, traces)
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
    ray: Ray = "local",
    traces: Traces = None,
    sets: Sets = None,
) -> None:
    """Search hyper-parameters, weights of rewards, or a heuristic's numbers, with Ray Tune."""
    from steersman.training.cluster.connect import joined
    from steersman.training.tuning.space import load_tuning
    from steersman.training.tuning.tune import create, opened, table
    from steersman.training.tuning.tune import tune as run_tuning

    tuning = opened(resume) if resume is not None else load_tuning(space, sets or [])
    with joined(ray or "local", console):
        folder = resume or create(out, tuning, Path(space).stem, traces)
        console.print(f"results go to {folder}", highlight=False)
        try:
            rows = run_tuning(folder, console)
        except KeyboardInterrupt:
            console.print(f"\ninterrupted; go on with: steersman tune --resume {folder}", highlight=False)
            raise typer.Exit(130) from None
    console.print(table(rows), highlight=False)
    logs = folder / "tensorboard"
    console.print(f"all trials: {folder / 'trials.csv'}; tensorboard --logdir {logs}", highlight=False)


@app.command()
def evaluate(
    policy: Policies = None,
    workload: WorkloadOption = "default",
    fleet: FleetOption = "default",
    load: Annotated[float, typer.Option(help="Multiplies the workload's rate.", min=0.001)] = 1.0,
    episodes: Annotated[int, typer.Option(help="Episodes, each with a seed of its own.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="First seed.", min=0)] = 3_000_000,
    split: Annotated[Part, typer.Option(help="Part of a trace.")] = Part.HELD_OUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traces: Traces = None,
) -> None:
    """Compare policies on the same episodes: anything that scores candidates."""
    import json

    from steersman.agents.policies import resolve
    from steersman.runtime.configs import find_config
    from steersman.runtime.draw import draw
    from steersman.runtime.fleet import load_fleet
    from steersman.runtime.workload import load_workload
    from steersman.training.evaluate import compare
    from steersman.training.objective import Arena
    from steersman.training.report import comparison_json, comparison_table

    policies = [
        resolve(spec) for spec in dict.fromkeys(policy or ["round-robin", "least-requests", "jsed", "push-shed"])
    ]
    names = [p.name for p in policies]
    policies = [
        p.with_values(p.values, f"{p.name} #{i}") if names.count(p.name) > 1 else p for i, p in enumerate(policies, 1)
    ]
    arena = Arena(load_fleet(find_config("fleets", fleet)))
    source = load_workload(find_config("workloads", workload), traces=traces)
    requests = [draw(source, arena.fleet, seed + i, load=load, split=split.value) for i in range(episodes)]
    with console.status("playing …") if not as_json else nullcontext():
        comparison = compare(policies, requests, arena, seed)
    best = max(comparison.summaries, key=lambda s: s.goodput_rps).policy
    if as_json:
        print(json.dumps(comparison_json(comparison.summaries)))
    else:
        console.print(comparison_table(comparison.summaries, best, width=console.width))


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
    traces: Traces = None,
) -> None:
    """Say what a policy does and why, and what that gains over a heuristic."""
    import json

    from steersman.agents.policies import resolve
    from steersman.runtime.configs import find_config
    from steersman.runtime.fleet import load_fleet
    from steersman.runtime.workload import load_workload
    from steersman.training.explain.explain import as_json as plain
    from steersman.training.explain.explain import explain as ask
    from steersman.training.explain.show import rendered, write_figure, write_page
    from steersman.training.objective import Arena

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {plot}: the file's name must end in .png, .svg or .pdf")
    with console.status("compiling …") if not as_json else nullcontext() as status:
        found = ask(
            resolve(policy),
            None if against is None else resolve(against),
            load_workload(find_config("workloads", workload), traces=traces),
            Arena(load_fleet(find_config("fleets", fleet))),
            load=load,
            split=split.value,
            seed=seed,
            episodes=episodes,
            examples=examples,
            rolled=rolled,
            say=status.update if status else lambda _: None,
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
def serve(
    fleet: Annotated[str, typer.Option("--fleet", help="A fleet's name or file, with backends.")] = "local",
    policy: Annotated[str, typer.Option("--policy", help="A run folder, a bundle, or a heuristic.")] = "jsed",
    fallback: Annotated[
        str, typer.Option(help="The heuristic that decides when the policy cannot.")
    ] = "least-requests",
    workload: Annotated[
        str, typer.Option("--workload", help="Where tenants and their SLOs are read from.")
    ] = "default",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8080,
) -> None:
    """Run the gateway: an OpenAI-compatible server in front of the fleet, the policy deciding every request."""
    from steersman.agents.policies import serving
    from steersman.runtime.configs import find_config
    from steersman.runtime.fleet import load_fleet
    from steersman.runtime.gateway import serve as run_gateway
    from steersman.runtime.workload import load_workload

    code = run_gateway(
        load_fleet(find_config("fleets", fleet)),
        serving(policy),
        serving(fallback),
        load_workload(find_config("workloads", workload)).tenants,
        host=host,
        port=port,
    )
    raise typer.Exit(code)


@bench.command()
def simulator(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    repeats: Annotated[int, typer.Option(help="Of each measurement; the median counts.", min=1)] = 5,
    stream: Annotated[int, typer.Option(help="Requests of the streamed trace.", min=1)] = 10_000_000,
    peer: Annotated[Path | None, typer.Option(help="A Python with ai-dynamo 1.2.1, to play the same trace.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of how cost grows.", metavar="PNG")] = None,
    traces: Traces = None,
) -> None:
    """Simulated requests per second, the cost of a decision and of a clone, and peak memory."""
    import json

    from steersman.training.bench.show import scaling_figure, tables
    from steersman.training.bench.simulator import bench as measure

    with console.status("compiling …") if not as_json else nullcontext() as status:
        figures = measure(traces, peer, repeats, stream, status.update if status else lambda _: None)
    if plot is not None:
        scaling_figure(figures["scaling"]).savefig(plot, dpi=150)
    if as_json:
        print(json.dumps(figures))
        return
    if traces is None:
        console.print("without --traces DIR, no trace was played", highlight=False)
    for table in tables(figures):
        console.print(table, highlight=False)


@bench.command()
def decision(
    policy: Annotated[
        Path | None, typer.Option(help="A run folder or a bundle; by default random weights.", metavar="BUNDLE")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Decisions that are timed.", min=1)] = 5000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What one decision takes in the gateway, with 16 and 256 candidates."""
    import json

    from steersman.training.bench.decision import bench as measure
    from steersman.training.bench.show import decision_table

    with console.status("measuring …") if not as_json else nullcontext():
        figures = measure(policy, rounds)
    if as_json:
        print(json.dumps(figures))
    else:
        console.print(decision_table(figures), highlight=False)


@bench.command()
def training(
    rounds: Annotated[int, typer.Option(help="Rollouts and updates of either loop.", min=1)] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Frames per CPU second of MaskablePPO's loop, and what they would be if the environment cost nothing."""
    import json

    from steersman.training.bench.show import training_table
    from steersman.training.bench.training import bench as measure

    with console.status("measuring …") if not as_json else nullcontext():
        figures = measure(rounds)
    if as_json:
        print(json.dumps(figures))
    else:
        console.print(training_table(figures), highlight=False)


@bench.command("rllib")
def bench_rllib(
    rounds: Annotated[int, typer.Option(help="Iterations of either.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Frames per CPU second of RLlib's PPO on the simulator, and on CartPole."""
    import json

    from steersman.training.bench.show import rllib_table

    try:
        from steersman.training.bench.rllib import bench as measure
    except ModuleNotFoundError as error:
        raise UserError(
            f"bench rllib needs {error.name}; install it with: pip install 'steersman[train,rllib]'"
        ) from None
    figures = measure(rounds, Console(stderr=True, quiet=as_json))
    if as_json:
        print(json.dumps(figures))
    else:
        console.print(rllib_table(figures), highlight=False)


@bench.command("ray")
def bench_ray(
    workers: Annotated[list[int] | None, typer.Option(help="Numbers of workers; 1, 2 and 4.", min=1)] = None,
    generations: Annotated[int, typer.Option(help="Of a search, for each number of workers.", min=1)] = 30,
    ray: Ray = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a search gains by workers of a Ray cluster, and what Ray costs."""
    import json

    from steersman.training.bench.ray import bench as measure
    from steersman.training.bench.show import ray_table

    shown = Console(stderr=True, quiet=as_json)
    figures = measure(workers or [1, 2, 4], generations, ray or "local", shown)
    if as_json:
        print(json.dumps(figures))
        return
    console.print(ray_table(figures), highlight=False)
    if figures["overhead"] is not None:
        console.print(f"overhead of Ray in a generation, one worker: {figures['overhead']:.1%}", highlight=False)
    console.print(f"drawing an episode, once for each worker: {figures['draw_ms']:.1f} ms", highlight=False)


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


@app.command()
def policies() -> None:
    """List the heuristics and their parameters."""
    from steersman.agents.policies import heuristics

    _list(
        ("policy", "what it does", "parameters"),
        [
            (name, p.summary, ", ".join(f"{k}={v.default:g}" for k, v in p.params.items()))
            for name, p in heuristics().items()
        ],
    )


@app.command()
def workloads() -> None:
    """List the shipped workloads."""
    _list_configs("workloads")


@app.command()
def fleets() -> None:
    """List the shipped fleets."""
    _list_configs("fleets")


def _list_configs(folder: str) -> None:
    from steersman.runtime.configs import config_files, describe

    _list(
        (folder.removesuffix("s"), "what it is"),
        [(path.stem, describe(path)) for path in config_files(folder)],
    )


def _list(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def with_address(arguments: list[str]) -> list[str]:
    """`--ray` with the address `local` where none follows: typer knows no options with an optional value."""
    made: list[str] = []
    for i, argument in enumerate(arguments):
        made.append(argument)
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        if argument == "--ray" and following not in ("auto", "local") and ":" not in following:
            made.append("local")
    return made


def main() -> None:
    """The `steersman` command: a user's mistake is one sentence and exit code 2."""
    # Before numpy is loaded: episodes are played on all cores already, and results do not depend on their number.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    sys.argv = with_address(sys.argv)
    try:
        app()
    except UserError as error:
        print(f"steersman: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
