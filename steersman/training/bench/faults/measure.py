"""`steersman bench faults`: every scenario on a cluster of its own, some at the same time."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest
from steersman.training.bench.faults.asked import Asked, Fate, Load
from steersman.training.bench.faults.cluster import cluster
from steersman.training.bench.faults.scenarios import SCENARIOS, Cut, Scenario, Stage, openai_client, worst_s
from steersman.training.bench.machine import machine

RATE = 50.0  # requests a second of the steady load
BEFORE_S = 1.0  # of load before the fault, after the warm-up
TOLD_S = 5.0  # whoever cannot be served must be told by then
QUIET_S = 7.0  # idle connections to replicas are closed by then
_FATES = (Fate.ANSWERED, Fate.REFUSED, Fate.CUT, Fate.LEFT, Fate.LOST)


def bench(
    policy: str = "jsed",
    only: Sequence[str] = (),
    *,
    seconds: float = 3.0,
    at_once: int = 3,
    soak_s: float = 0.0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Every figure, as the one JSON object that the command prints.

    seconds: that a fault lasts. at_once: scenarios played at the same time. soak_s: play a soak of so many seconds
    in place of the scenarios.

    Raises:
        UserError: there is no such scenario, or a gateway does not start.
    """
    for name in only:
        if name not in SCENARIOS:
            raise UserError(f"--only {name}: there is no such scenario; {nearest(name, list(SCENARIOS))}")
    if soak_s:
        soaked = uvloop.run(_soak(policy, soak_s, say))
        return {"machine": machine(), "policy": policy, "scenarios": [], "skipped": [], "soak": [soaked]}
    asked = only or list(SCENARIOS)
    skipped = [name for name in asked if SCENARIOS[name].openai and find_spec("openai") is None]
    rows = uvloop.run(_all(policy, [name for name in asked if name not in skipped], seconds, at_once, say))
    common = {"machine": machine(), "policy": policy, "seconds": seconds, "rate": RATE}
    return {**common, "scenarios": rows, "skipped": skipped, "soak": []}


async def _all(
    policy: str, names: Sequence[str], seconds: float, at_once: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    places, playing = asyncio.Semaphore(at_once), list[str]()

    async def one(name: str) -> dict[str, Any]:
        async with places:
            playing.append(name)
            say(", ".join(playing))
            try:
                return await _played(policy, name, SCENARIOS[name], seconds)
            finally:
                playing.remove(name)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(name)) for name in names]
    return [task.result() for task in tasks]


async def _played(policy: str, name: str, scenario: Scenario, seconds: float) -> dict[str, Any]:
    """A scenario's figures."""
    with tempfile.TemporaryDirectory(prefix="steersman-faults-") as folder:
        async with cluster(policy, Path(folder)) as found:
            load = Load(found.gateway.port, RATE)
            stage = Stage(found, load, seconds)
            before_fds = found.gateway.descriptors
            async with openai_client(found.gateway.port) if scenario.openai else nullcontext() as ask:
                load.start(ask)
                await asyncio.sleep(BEFORE_S)
                before_mib = found.gateway.memory_mib
                await asyncio.sleep(BEFORE_S)
                await scenario.play(stage)
                await load.stop()
            after: dict[str, float | None] = dict.fromkeys(("retried", "memory_after_mib", "descriptors_after"))
            if found.gateway.process.poll() is None:  # else it took its counts with it
                await _quiet(stage, before_fds)
                after["retried"] = await found.gateway.total("retries_total")
                after["memory_after_mib"] = found.gateway.memory_mib
                after["descriptors_after"] = found.gateway.descriptors
            return {
                "name": name,
                "about": scenario.about,
                **_counted(scenario, stage),
                "out_s": stage.out_s,
                "back_s": stage.back_s,
                "memory_before_mib": before_mib,
                "descriptors_before": before_fds,
                **after,
                "notes": stage.notes,
                "wrong": stage.wrong,
            }


def _counted(scenario: Scenario, stage: Stage) -> dict[str, Any]:
    """What became of the requests."""
    asked = stage.load.all
    fates = [a.fate(scenario.expected, scenario.may_refuse, stage.closed_s) for a in asked]
    counts = Counter(fates)
    reasons = Counter(
        a.problem or f"status {a.status} {a.code}" for a, fate in zip(asked, fates, strict=True) if fate is Fate.LOST
    )
    stage.expect(not counts[Fate.LOST], f"lost: {', '.join(f'{n}x {why}' for why, n in reasons.items())}")
    cut = Counter(a.replica for a, fate in zip(asked, fates, strict=True) if fate is Fate.CUT)
    if scenario.cut is not Cut.ANYWHERE:
        well = {r: n for r, n in cut.items() if scenario.cut is Cut.NOWHERE or r != stage.broken.name}
        stage.expect(not well, f"answers broke off that had begun: {well}")
    told_s = worst_s([a for a, fate in zip(asked, fates, strict=True) if fate is Fate.REFUSED])
    stage.expect(not told_s > TOLD_S, f"it took {told_s:.1f} s to refuse a request")
    answered = [a for a, fate in zip(asked, fates, strict=True) if fate is Fate.ANSWERED]
    return {"sent": len(asked), **{str(fate): counts[fate] for fate in _FATES}, "worst_s": worst_s(answered)}


async def _quiet(stage: Stage, descriptors: int) -> None:
    """The end of all that was in flight: nothing may be left of it."""
    gateway, deadline_s = stage.gateway, time.monotonic() + QUIET_S
    while gateway.descriptors > descriptors + 1 and time.monotonic() < deadline_s:
        await asyncio.sleep(0.1)
    # One connection a replica may be there for its health.
    stage.expect(
        gateway.descriptors <= descriptors + len(stage.cluster.backends),
        f"{gateway.descriptors - descriptors} more descriptors are open",
    )
    stage.expect(await gateway.total("inflight") == 0, "requests are counted that are over")


SOAK_RATE, SAMPLE_S, WINDOW = 150.0, 1.0, 10
LEAVING = 10  # clients that leave between two samples


async def _soak(policy: str, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """A steady load, faults by turns, and what memory and descriptors do meanwhile."""
    turns = ("cut", "reset", "500", "no-done", "bad-http", "429", "head-only")
    with tempfile.TemporaryDirectory(prefix="steersman-faults-") as folder:
        async with cluster(policy, Path(folder)) as found:
            load, before_fds = Load(found.gateway.port, SOAK_RATE), found.gateway.descriptors
            load.start()
            began_s, samples = time.monotonic(), list[tuple[float, float, int]]()
            while (now_s := time.monotonic() - began_s) < seconds:
                turn = int(now_s // 10)
                # A fault for two seconds of every ten, on one replica after the other.
                found.backends[turn % len(found.backends)].show(turns[turn % len(turns)] if now_s % 10 < 2 else "")
                samples.append((now_s, found.gateway.memory_mib, found.gateway.descriptors))
                await _leave(load)
                say(f"soak: {now_s:.0f} s, {samples[-1][1]:.1f} MiB, {samples[-1][2]} descriptors")
                await asyncio.sleep(SAMPLE_S)
            await load.stop()
            stage = Stage(found, load, seconds)
            await _quiet(stage, before_fds)
            counted = _counted(Scenario("", _nothing, cut=Cut.ANYWHERE), stage)
            return {
                "name": "soak",
                **counted,
                "seconds": seconds,
                "retried": await found.gateway.total("retries_total"),
                "descriptors_before": before_fds,
                "descriptors_after": found.gateway.descriptors,
                "inflight_after": await found.gateway.total("inflight"),
                **_slopes(samples),
                "wrong": stage.wrong,
            }


async def _leave(load: Load) -> None:
    """Some clients come, ask for a stream, and leave in the middle of it."""
    clients = [await load.connect() for _ in range(LEAVING)]
    for client in clients:
        load.all.append(asked := Asked(stream=True))
        client.ask(asked)
    await asyncio.sleep(0.1)
    for client in clients:
        client.leave()


async def _nothing(_: Stage) -> None: ...


def _slopes(samples: list[tuple[float, float, int]]) -> dict[str, float]:
    """Growth over the second half, when all that warms up is warm: of the least of every `WINDOW` samples.

    What a leak takes is there at the quietest moment, too.
    """
    half = np.array(samples[len(samples) // 2 :], float)
    windows = np.array([part.min(axis=0) for part in np.array_split(half, max(1, len(half) // WINDOW))])
    times, memory, files = windows.T
    return {
        "memory_first_mib": float(memory[0]),
        "memory_last_mib": float(memory[-1]),
        "memory_slope_mib_per_hour": _slope(times, memory),
        "descriptors_first": float(files[0]),
        "descriptors_last": float(files[-1]),
        "descriptors_slope_per_hour": _slope(times, files),
    }


def _slope(times_s: np.ndarray, values: np.ndarray) -> float:
    """An hour; 0 with less than two of them."""
    return float(np.polyfit(times_s, values, 1)[0] * 3600) if len(times_s) > 1 else 0.0
