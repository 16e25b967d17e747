"""The command line: composes the four parts. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steersman.runtime.errors import UserError

if TYPE_CHECKING:
    from steersman.runtime.admin.client import AdminClient

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train schedulers for LLM inference by reinforcement learning, and run them.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")
app.add_typer(bench, name="bench")
policy_app = typer.Typer(no_args_is_help=True, help="Push policies to a running gateway, and take them back.")
app.add_typer(policy_app, name="policy")
replica_app = typer.Typer(no_args_is_help=True, help="Drain a running gateway's replicas.")
app.add_typer(replica_app, name="replica")
keys = typer.Typer(no_args_is_help=True, help="API keys of the gateway's tenants.")
app.add_typer(keys, name="keys")
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
JournalOption = Annotated[
    Path | None, typer.Option("--journal", help="A gateway's journal: replay what it recorded.", metavar="DIR")
]
WorkloadOption = Annotated[str, typer.Option("--workload", help="A workload's name or file.")]
FleetOption = Annotated[str, typer.Option("--fleet", help="A fleet's name or file.")]
Admin = Annotated[
    str, typer.Option("--admin", envvar="STEERSMAN_ADMIN", help="The gateway's admin port.", metavar="URL")
]
ADMIN_URL = "http://127.0.0.1:8081"


class Place(StrEnum):
    """What a pushed policy does."""

    CURRENT = "current"
    SHADOW = "shadow"
    CANARY = "canary"


class Part(StrEnum):
    """Parts of a trace."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A training file, or the name of a shipped one.")] = "default",
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run.", metavar="RUN")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders go.", metavar="DIR")] = Path("runs"),
    journal: JournalOption = None,
    traces: Traces = None,
    sets: Sets = None,
) -> None:
    """Train a policy, compare it with the heuristics on held-out episodes, export it.

    With --journal, on the recorded traffic and fleet; `--set fleet=NAME` takes another one.
    """
    from steersman.runtime.config import apply_sets, read_yaml, validate
    from steersman.runtime.configs import find_config
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
        run = Run.create(runs, settings, path.stem, traces)
        if journal is not None:
            run = keep_journal(run, journal)
    try:
        result = run_training(run, console, traces, command=shlex.join(["steersman", *sys.argv[1:]]))
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
    config: Annotated[
        str | None, typer.Option("--config", help="A gateway's name or file; the options below go before its keys.")
    ] = None,
    fleet: Annotated[
        str | None, typer.Option("--fleet", help="A fleet's name or file, with backends. [default: local]")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="A run folder, a bundle, or a heuristic. [default: jsed]")
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(help="The heuristic that decides when the policy cannot. [default: least-requests]"),
    ] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", help="Where tenants and their SLOs are read from. [default: default]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: 8080]", min=0, max=65535)] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Record decisions and outcomes, for train and evaluate.", metavar="DIR")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write what is served under training's names.", metavar="DIR")
    ] = None,
    sets: Sets = None,
) -> None:
    """Run the gateway: an OpenAI-compatible server in front of the fleet, the policy deciding every request."""
    from steersman.agents.policies import heuristic, is_path, serving
    from steersman.runtime.config import apply_sets, read_yaml, validate
    from steersman.runtime.configs import find_config
    from steersman.runtime.deployment.store import PolicyStore
    from steersman.runtime.fleet import load_fleet
    from steersman.runtime.gateway import GatewayConfig, GatewayTenant, Policies
    from steersman.runtime.gateway import serve as run_gateway
    from steersman.runtime.observation import candidates_for
    from steersman.runtime.tenant import Tenant
    from steersman.runtime.workload import load_workload

    path = None if config is None else find_config("gateways", config)
    given = {"fleet": fleet, "policy": policy, "fallback": fallback, "workload": workload, "host": host, "port": port}
    values = {} if path is None else read_yaml(path)
    values |= {key: value for key, value in given.items() if value is not None}
    if journal is not None:
        values["journal"] = {**(values.get("journal") or {}), "folder": str(journal)}
    settings = validate(GatewayConfig, apply_sets(values, sets or []), "serve" if path is None else str(path))
    tenants = settings.tenants or {
        name: GatewayTenant(**tenant.model_dump(include=set(Tenant.model_fields)))
        for name, tenant in load_workload(find_config("workloads", settings.workload)).tenants.items()
    }
    served = load_fleet(find_config("fleets", settings.fleet))
    candidates = candidates_for(len(served.groups))
    kept_in = None if settings.admin is None else settings.admin.policies
    store = PolicyStore(kept_in, lambda spec: heuristic(spec).bind(), candidates)
    bundle = Path(settings.policy) if is_path(settings.policy) else None
    first = store.prepare_heuristic(settings.policy) if bundle is None else store.prepare_path(bundle)
    policies = Policies(store, first, bundle)
    board = None
    if tensorboard is not None:
        from steersman.training.live import LiveBoard

        board = LiveBoard(tensorboard)
    code = run_gateway(
        settings,
        served,
        tenants,
        policies,
        serving(settings.fallback, candidates),
        board=board.write if board else None,
    )
    if board is not None:
        board.close()
    raise typer.Exit(code)


def _admin(url: str) -> AdminClient:
    from steersman.runtime.admin.client import AdminClient

    return AdminClient(url, os.environ.get("STEERSMAN_ADMIN_KEY"))


def _say(sentence: str) -> None:
    console.print(sentence, highlight=False, soft_wrap=True, markup=False)


@policy_app.command()
def push(
    policy: Annotated[str, typer.Argument(help="A run folder, a bundle, a heuristic, or a version that was pushed.")],
    place: Annotated[Place, typer.Option("--as", help="Decide all, decide a share, or only look on.")] = Place.CURRENT,
    share: Annotated[float | None, typer.Option(help="A canary's share of the requests; 0.1 by default.")] = None,
    admin: Admin = ADMIN_URL,
) -> None:
    """Deploy a policy on a running gateway; it is tested there before it takes a request."""
    _say(_admin(admin).push(policy, place.value, share))


@policy_app.command("list")
def list_policies(admin: Admin = ADMIN_URL) -> None:
    """List the policies that a gateway has, the last pushed first."""
    _list(
        ("version", "deployed as", "pushed (UTC)", "what it is"),
        [
            (p["version"], ", ".join(p["places"]), p["pushed"].partition("+")[0], escape(p["summary"] or p["name"]))
            for p in _admin(admin).policies()
        ],
    )


@policy_app.command()
def rollback(admin: Admin = ADMIN_URL) -> None:
    """Let the policy decide again that did before."""
    _say(_admin(admin).rollback())


@policy_app.command()
def promote(admin: Admin = ADMIN_URL) -> None:
    """Let the canary decide all requests."""
    _say(_admin(admin).promote())


@policy_app.command()
def stop(
    place: Annotated[Place, typer.Argument(help="shadow or canary.")],
    admin: Admin = ADMIN_URL,
) -> None:
    """End a shadow or a canary."""
    if place is Place.CURRENT:
        raise UserError("the current policy cannot be stopped; push another one, or roll back")
    _say(_admin(admin).stop(place.value))


@replica_app.command()
def drain(name: Annotated[str, typer.Argument(help="The replica.")], admin: Admin = ADMIN_URL) -> None:
    """Send a replica no new requests; those in flight go on."""
    _say(_admin(admin).drain(name))


@replica_app.command()
def resume(name: Annotated[str, typer.Argument(help="The replica.")], admin: Admin = ADMIN_URL) -> None:
    """Send a drained replica requests again."""
    _say(_admin(admin).resume(name))


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print one page; as where there is no terminal.")] = False,
    admin: Admin = ADMIN_URL,
) -> None:
    """Watch a running gateway: replicas, tenants, decisions, policies."""
    from steersman.runtime.admin.top import show, show_once

    client = _admin(admin)
    if once or not console.is_terminal:
        show_once(console, client.state)
        return
    try:
        show(console, client.state)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    tenant: Annotated[str, typer.Option("--tenant", help="Whose requests it sends.")],
    file: Annotated[Path, typer.Option("--file", help="The gateway's key file; made where there is none.")] = Path(
        "keys.yaml"
    ),
) -> None:
    """Make an API key, keep its hash, and print it: it is never shown again."""
    from steersman.runtime.gateway.keys import add_key

    print(add_key(file, name, tenant))
    # Beside the key, not after it: KEY=$(steersman keys add …) is what scripts do.
    print(f"only its hash is kept, in {file}; take the entry out there to revoke it", file=sys.stderr)


@app.command()
def audit(
    files: Annotated[list[Path], typer.Argument(help="The files of one audit log, in any order.")],
) -> None:
    """Check that an audit log is whole and unchanged, and that no request went where its data may not go."""
    from steersman.runtime.gateway.audit import check

    found = check(files)
    console.print(
        f"{found.lines} decisions on requests with a rule, {found.dispatched} dispatched, chain unbroken; "
        f"{found.violations} where the data may not go",
        highlight=False,
    )
    raise typer.Exit(1 if found.violations else 0)


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
def journal(
    requests: Annotated[int, typer.Option(help="Requests that are journalled.", min=1)] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What the decision journal takes: time of a request, CPU of its thread, bytes on disk."""
    import json

    from steersman.training.bench.journal import bench as measure
    from steersman.training.bench.show import journal_table

    with console.status("measuring …") if not as_json else nullcontext():
        figures = measure(requests)
    if as_json:
        print(json.dumps(figures))
    else:
        console.print(journal_table(figures), highlight=False)


@bench.command()
def gateway(
    policy: Annotated[
        str | None, typer.Option(help="A run folder, a bundle, or a heuristic; by default random weights.")
    ] = None,
    peers: Annotated[Path | None, typer.Option(help="Another Python that has peers.", metavar="PYTHON")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A target besides `direct`.", metavar="NAME")] = None,
    seconds: Annotated[float, typer.Option(help="Of each measurement.", min=0.1)] = 2.0,
    rounds: Annotated[int, typer.Option(help="Of all targets; medians count.", min=1)] = 3,
    streams: Annotated[int, typer.Option(help="Held at once while memory is read; 0: none.", min=0)] = 2000,
    serve_option: Annotated[
        list[str] | None, typer.Option(help="Passed on to `steersman serve`.", metavar="OPTION")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What the gateway adds to a request and takes for it, beside Envoy, sglang-router and vllm-router."""
    import json

    from steersman.training.bench.gateway.measure import bench as measure
    from steersman.training.bench.show import gateway_tables

    told = Console(stderr=True)
    with told.status("starting …") as status:
        figures, absent = measure(
            policy,
            peers,
            only or (),
            seconds=seconds,
            rounds=rounds,
            streams=streams,
            options=serve_option or (),
            say=status.update,
        )
    for sentence in absent:
        told.print(sentence, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(figures))
        return
    for table in gateway_tables(figures):
        console.print(table, highlight=False)


@bench.command()
def faults(
    policy: Annotated[str, typer.Option(help="A run folder, a bundle, or a heuristic.")] = "jsed",
    only: Annotated[list[str] | None, typer.Option(help="A scenario; all by default.", metavar="NAME")] = None,
    seconds: Annotated[float, typer.Option(help="That a fault lasts, at least.", min=0.5)] = 3.0,
    at_once: Annotated[int, typer.Option(help="Scenarios played at the same time.", min=1)] = 3,
    soak: Annotated[
        float, typer.Option(help="In place of scenarios: so long a load, with faults by turns.", metavar="SECONDS")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What becomes of requests when replicas, clients or the gateway itself break. Ends with 1 if any was lost."""
    import json

    from steersman.training.bench.faults.measure import bench as measure
    from steersman.training.bench.show import fault_notes, fault_table, soak_table

    with Console(stderr=True).status("starting …") as status:
        figures = measure(policy, only or (), seconds=seconds, at_once=at_once, soak_s=soak, say=status.update)
    if as_json:
        print(json.dumps(figures))
    else:
        console.print(soak_table(figures) if soak else fault_table(figures), highlight=False)
        for sentence in fault_notes(figures):
            console.print(sentence, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if any(row["wrong"] for row in [*figures["scenarios"], *figures["soak"]]) else 0)


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
        folder = Folder.create(out, asked.name, made)
    shown = Console(stderr=True) if as_json else console
    shown.print(f"results go to {folder.path}", highlight=False)
    try:
        found = run_benchmark(folder, shown)
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


def main() -> None:
    """The `steersman` command: a user's mistake is one sentence and exit code 2."""
    # Before numpy is loaded: episodes are played on all cores already, and results do not depend on their number.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    try:
        app()
    except UserError as error:
        print(f"steersman: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
