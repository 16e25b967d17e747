"""What a gateway adds to a request and takes for it, beside other routers: `steersman bench gateway`.

Two mock backends run throughout. In each round every target is started, measured and stopped, one after the other and
each time in another order; `direct` is the backends themselves. A measurement is a load generator's, in a process of
its own, which also reads the processor time of the target's processes just before and after its requests.
"""

from __future__ import annotations

import resource
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn

import numpy as np

from steersman.runtime.errors import UserError
from steersman.runtime.network import Architecture, parameters, split
from steersman.runtime.observation import COLUMN
from steersman.training.bench.gateway.child import free_port, measured, mock, server
from steersman.training.bench.gateway.load import Hold, Job
from steersman.training.bench.gateway.targets import NAMES, Target, find
from steersman.training.bench.machine import machine
from steersman.training.export import export_bundle

CONCURRENCY = 16
EVENTS, GAP_MS = 64, 2.0
HOLD_EVENTS, HOLD_GAP_MS = 32, 500.0
WARM_UP_S, IDLE_S = 0.3, 1.0

Figures = dict[str, float]


class Round(NamedTuple):
    """What the load generator saw of a target in one round."""

    one: Figures  # concurrency 1
    many: Figures  # concurrency `CONCURRENCY`
    streams: Figures


def bench(
    policy: str | None = None,
    peers: Path | None = None,
    only: Sequence[str] = (),
    *,
    seconds: float = 2.0,
    rounds: int = 3,
    streams: int = 2000,
    options: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], list[str]]:
    """Every figure, as the one JSON object that the command prints, and a sentence for each peer that is absent.

    policy: for the gateway, as in `steersman serve`; without one, a bundle of the default architecture with random
    weights. only: names of targets besides `direct`; all by default. streams: at once, in the last round; 0: none.
    options: further ones of `steersman serve`; `{folder}` in them is a temporary folder.

    Raises:
        UserError: a target is unknown, or the gateway does not start.
    """
    with tempfile.TemporaryDirectory(prefix="steersman-bench-") as name, _ending_on_sigterm(), ExitStack() as stack:
        folder = Path(name)
        targets, absent = find(only or NAMES, policy or str(random_bundle(folder / "bundle")), peers, options)
        _allow_many_files()
        backends = [stack.enter_context(mock()) for _ in range(2)]
        seen: dict[str, list[Round]] = {target.name: [] for target in targets}
        held: dict[str, Figures] = {}
        for number in range(rounds):
            for target in _rotated(targets, number):
                say(f"round {number + 1} of {rounds}: {target.name}")
                try:
                    with _running(target, backends, folder) as (ports, pids):
                        seen[target.name].append(_round(ports, pids, seconds))
                        if streams and number == rounds - 1:
                            say(f"{streams:,} streams: {target.name}")
                            held[target.name] = _hold(ports, pids, streams)
                except UserError as error:
                    if target.name in ("direct", "steersman"):
                        raise
                    absent.append(str(error))
                    targets = [t for t in targets if t.name != target.name]
        direct = seen["direct"]
        common = {"machine": machine(), "rounds": rounds, "seconds": seconds}
        rows = [{**summary(t.name, t.version, seen[t.name], direct), **held.get(t.name, {}), **common} for t in targets]
        return {"targets": rows}, absent


def _rotated(targets: Sequence[Target], by: int) -> list[Target]:
    by %= len(targets)
    return [*targets[by:], *targets[:by]]


@contextmanager
def _running(
    target: Target, backends: Sequence[tuple[int, int]], folder: Path
) -> Iterator[tuple[list[int], list[int]]]:
    """A target that answers: ports and processes."""
    ports, pids = [port for port, _ in backends], [pid for _, pid in backends]
    if target.command is None:
        yield ports, pids
        return
    port = free_port()
    with server(target.name, target.command(port, ports, folder), port, folder / f"{target.name}.log") as process:
        yield [port], [process.pid]


def _round(ports: list[int], pids: list[int], seconds: float) -> Round:
    common: dict[str, Any] = {"ports": ports, "pids": pids, "seconds": seconds}
    # The target has just been started: the first measurement warms it up, too, caches and connections to the backends.
    return Round(
        measured(Job(**common, concurrency=1, warm_up_s=3 * WARM_UP_S)),
        measured(Job(**common, concurrency=CONCURRENCY, warm_up_s=WARM_UP_S, idle_s=IDLE_S)),
        measured(Job(**common, concurrency=CONCURRENCY, warm_up_s=WARM_UP_S, events=EVENTS, gap_ms=GAP_MS)),
    )


def _hold(ports: list[int], pids: list[int], streams: int) -> Figures:
    return measured(Hold(ports=ports, pids=pids, streams=streams, events=HOLD_EVENTS, gap_ms=HOLD_GAP_MS))


def summary(name: str, version: str, rounds: Sequence[Round], direct: Sequence[Round]) -> dict[str, Any]:
    """The figures of a target over its rounds, beside those of `direct` in the same rounds.

    Latencies and rates are medians over the rounds. `added_p50_ms` is at concurrency 1, `p50_ms`, `p99_ms` and
    `requests_per_s` are at `CONCURRENCY`. Processor time is summed over the rounds, net of what the target takes
    without requests. `stream_max_gap_ms` is the longest wait of any stream for an event, the first one included;
    `stalled_streams` is the share of those with a wait of `STALL_S` or more.
    """
    idle = sum(r.many["idle_cpu_s"] for r in rounds) / max(1e-9, sum(r.many["idle_s"] for r in rounds))
    pairs = list(zip(rounds, direct, strict=True))
    return {
        "name": name,
        "version": version,
        "added_p50_ms": median(r.one["p50_ms"] - d.one["p50_ms"] for r, d in pairs),
        "p50_ms": median(r.many["p50_ms"] for r in rounds),
        "p99_ms": median(r.many["p99_ms"] for r in rounds),
        "requests_per_s": median(r.many["requests"] / r.many["seconds"] for r in rounds),
        "of_direct": median(r.many["requests"] / max(1, d.many["requests"]) for r, d in pairs),
        "cpu_us_per_request": _cpu_us([r.many for r in rounds], idle),
        "stream_added_ms": median(r.streams["p50_ms"] - d.streams["p50_ms"] for r, d in pairs),
        "stream_max_gap_ms": median(r.streams["gap_max_ms"] for r in rounds),
        "stalled_streams": _share(sum(r.streams["stalled"] for r in rounds), [r.streams for r in rounds]),
        "cpu_us_per_stream": _cpu_us([r.streams for r in rounds], idle),
        "idle_cpu_share": idle,
        "errors": sum(part["errors"] for r in rounds for part in r),
    }


def _cpu_us(parts: Sequence[Figures], idle: float) -> float:
    """Microseconds of processor time for each request, without the share of `idle`."""
    return 1e6 * _share(sum(part["cpu_s"] - idle * part["seconds"] for part in parts), parts)


def _share(amount: float, parts: Sequence[Figures]) -> float:
    """Of each request."""
    return amount / max(1, sum(part["requests"] for part in parts))


def random_bundle(path: Path) -> Path:
    """A bundle with random weights, except that it takes a replica, with few requests, whatever happens.

    A policy that sheds or holds would answer fast.
    """
    architecture = Architecture()
    weights = 0.1 * np.random.default_rng(0).normal(size=parameters(architecture)).astype(np.float32).astype(float)
    bilinear = split(architecture, weights)[0]  # a view
    for name, weight in (("is_replica", 1e3), ("inflight", -1e2), ("is_hold", -1e3), ("patience", 0.0)):
        bilinear[COLUMN[name]] = 0.0
        bilinear[COLUMN[name], 0] = weight
    facts: dict[str, Any] = {"fleet": {}, "workload": {}, "seeds": {}, "scorecard": {}}
    command = "steersman bench gateway"
    export_bundle(path, architecture=architecture, weights=weights, name="random weights", command=command, **facts)
    return path


def _allow_many_files() -> None:
    """As many open files as this user may have, here and in the processes started from here."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, so that no process is left behind."""

    def end(_number: int, _frame: object) -> NoReturn:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
