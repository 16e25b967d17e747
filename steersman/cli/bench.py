"""Speed and memory."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from steersman.cli.common import (
    Ray,
    Traces,
    bench,
    console,
)
from steersman.runtime.errors import UserError


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
def canary(
    canaries: Annotated[int, typer.Option(help="Of each row.", min=1)] = 150,
    requests: Annotated[int, typer.Option(help="Of each canary.", min=1)] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How often a canary is taken back by chance, and how soon when it is worse."""
    import json

    from steersman.training.bench.canary import bench as measure
    from steersman.training.bench.show import canary_table

    with console.status("playing …") if not as_json else nullcontext():
        figures = measure(canaries, requests)
    if as_json:
        print(json.dumps(figures))
    else:
        console.print(canary_table(figures), highlight=False)


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
    from steersman.training.bench.show import plan_table, ray_table

    shown = Console(stderr=True, quiet=as_json)
    figures = measure(workers or [1, 2, 4], generations, ray or "local", shown)
    if as_json:
        print(json.dumps(figures))
        return
    console.print(ray_table(figures), highlight=False)
    if figures["overhead"] is not None:
        console.print(f"overhead of Ray in a generation, one worker: {figures['overhead']:.1%}", highlight=False)
    console.print(f"drawing an episode, once for each worker: {figures['draw_ms']:.1f} ms", highlight=False)
    console.print(plan_table(figures), highlight=False)
