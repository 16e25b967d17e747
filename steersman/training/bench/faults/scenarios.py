"""What can go wrong: one function each, which breaks something under a steady load and mends it again."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from steersman.training.bench.faults.asked import EVENTS, Asked, Load, messages
from steersman.training.bench.faults.backend import FLOOD, POISON
from steersman.training.bench.faults.cluster import DRAIN_S, RAMP_S, Backend, Cluster, Gateway
from steersman.training.bench.gateway.mock import MODEL, gap_prompt

BACK_S = 12.0  # a replica that is well again must be back by then
QUICK_S = 5.0  # one that answers nobody must be left out by then


@dataclass
class Stage:
    """Where a scenario is played, and what it found out."""

    cluster: Cluster
    load: Load
    seconds: float  # of the fault
    out_s: float | None = None  # until the broken replica got no more requests
    back_s: float | None = None  # until it got some again, once it was mended
    closed_s: float = math.inf  # when the gateway was told to end, of the monotonic clock
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # expectations that were not met

    @property
    def gateway(self) -> Gateway:
        return self.cluster.gateway

    @property
    def broken(self) -> Backend:
        """The one that something happens to."""
        return self.cluster.backends[0]

    def expect(self, met: bool, otherwise: str) -> None:
        if not met:
            self.wrong.append(otherwise)

    async def fault(self, out_within_s: float | None = QUICK_S) -> None:
        """The time of the fault: until the replica is left out, and `seconds` at least.

        out_within_s: None: it must not be left out.
        """
        began_s = time.monotonic()
        most_s = self.seconds if out_within_s is None else max(self.seconds, out_within_s)
        self.out_s = await self.gateway.until(self.broken.name, False, most_s)
        if out_within_s is None:
            self.expect(self.out_s is None, "the replica was left out")
        else:
            self.expect(self.out_s is not None, f"the replica was not left out within {most_s:g} s")
        await asyncio.sleep(max(0.0, began_s + self.seconds - time.monotonic()))

    async def mended(self) -> None:
        """The time after: until the replica is back, and its slow start over."""
        self.back_s = await self.gateway.until(self.broken.name, True, BACK_S)
        self.expect(self.back_s is not None, f"the replica was not back within {BACK_S:g} s")
        await asyncio.sleep(RAMP_S)

    def most(self, from_s: float, seconds: float) -> int:
        """The most requests that the broken replica had at once in a time, from `from_s` of the monotonic clock."""
        held = [a for a in self.load.all if a.replica == self.broken.name and a.ended_s >= from_s]
        ends_s = from_s + seconds
        moments = [from_s, *(a.asked_s for a in held if from_s < a.asked_s < ends_s)]
        return max(sum(a.asked_s <= at_s < a.ended_s for a in held) for at_s in moments)


Play = Callable[[Stage], Awaitable[None]]


class Cut(StrEnum):
    """Where answers that have begun may break off."""

    NOWHERE = "nowhere"
    BROKEN = "at the broken replica"
    ANYWHERE = "anywhere"


class Scenario(NamedTuple):
    """How a scenario is played and judged."""

    about: str
    play: Play
    expected: Collection[int] = (200,)  # statuses of an answer
    may_refuse: bool = False  # there is a time when no replica can serve a request
    cut: Cut = Cut.BROKEN
    openai: bool = False  # requests are sent with that package


def shows(fault: str, out_within_s: float | None = QUICK_S) -> Play:
    """The broken replica shows a fault of `backend.FAULTS` for a while."""

    async def play(stage: Stage) -> None:
        stage.broken.show(fault)
        await stage.fault(out_within_s)
        stage.broken.show("")
        if stage.out_s is not None:
            await stage.mended()

    return play


async def kill(stage: Stage) -> None:
    """kill -9 and a restart."""
    stage.broken.kill()
    await stage.fault()
    await stage.broken.start()
    await stage.mended()
    if stage.back_s is not None:
        over_s = time.monotonic()
        first, last = stage.most(over_s - RAMP_S, 0.5), stage.most(over_s - 1.0, 1.0)
        stage.notes.append(f"it had {first} requests at most in the first half second back, {last} after {RAMP_S:g} s")


async def freeze(stage: Stage) -> None:
    """SIGSTOP, and SIGCONT."""
    stage.broken.freeze()
    await stage.fault()
    stage.broken.thaw()
    await stage.mended()


async def poison(stage: Stage) -> None:
    """Requests that any replica answers with 500 come besides, twenty a second."""
    ends_s = time.monotonic() + stage.seconds
    while time.monotonic() < ends_s:
        for _ in range(5):
            stage.load.send(Asked(stream=False, words=POISON))
        await asyncio.sleep(0.25)
    ordinary = [a for a in stage.load.all if a.words != POISON]
    stage.expect(all(a.status in (0, 200) for a in ordinary), "other requests were refused for it")
    seen = [replicas for _, replicas in stage.gateway.seen]
    stage.expect(all(all(replicas.values()) for replicas in seen), "replicas were left out for it")


async def all_down(stage: Stage) -> None:
    """Every replica is killed and started again."""
    for backend in stage.cluster.backends:
        backend.kill()
    await stage.fault()
    for backend in stage.cluster.backends:
        await backend.start()
    await stage.mended()


async def all_500(stage: Stage) -> None:
    """All replicas answer with 500 for a while. Who is to blame does not show, so that no breaker opens."""
    for backend in stage.cluster.backends:
        backend.show("500")
    await stage.fault(None)
    for backend in stage.cluster.backends:
        backend.show("")
    await asyncio.sleep(1.0)


async def terminate(stage: Stage) -> None:
    """SIGTERM for the gateway; a replica is killed while it drains."""
    began_s = _terminate(stage)
    await asyncio.sleep(0.1)
    stage.broken.kill()
    await _ends(stage, began_s)


async def terminate_stuck(stage: Stage) -> None:
    """SIGTERM for the gateway while a replica is frozen, and a stream needs far too long."""
    stage.load.send(Asked(stream=True, words=gap_prompt(1e3)))
    stage.broken.freeze()
    await asyncio.sleep(0.5)
    await _ends(stage, _terminate(stage))


def _terminate(stage: Stage) -> float:
    """Returns when, of the monotonic clock."""
    stage.closed_s = time.monotonic()
    stage.gateway.process.terminate()
    return stage.closed_s


async def _ends(stage: Stage, began_s: float) -> None:
    ended = await _exit(stage.gateway, DRAIN_S + 5.0)
    took_s = time.monotonic() - began_s
    stage.expect(ended == 0, f"it ended with code {ended}")
    stage.expect(took_s < DRAIN_S + 2.0, f"it took {took_s:.1f} s to end")
    stage.notes.append(f"the gateway ended after {took_s:.1f} s with code {ended}")


async def _exit(gateway: Gateway, most_s: float) -> int | None:
    deadline_s = time.monotonic() + most_s
    while (code := gateway.process.poll()) is None and time.monotonic() < deadline_s:
        await asyncio.sleep(0.01)
    return code


async def gateway_frozen(stage: Stage) -> None:
    """The gateway itself stands still: for it, the clock jumps."""
    os.kill(stage.gateway.process.pid, signal.SIGSTOP)
    await asyncio.sleep(max(stage.seconds, 4.0))
    os.kill(stage.gateway.process.pid, signal.SIGCONT)
    stage.out_s = await stage.gateway.until(stage.broken.name, False, 2.0)
    stage.expect(stage.out_s is None, "it took a replica for dead")


CLIENTS, SLOW = 300, 40


async def disconnect(stage: Stage) -> None:
    """Hundreds of clients leave in the middle of their streams, again and again."""
    left, worst_s, ends_s = 0, 0.0, time.monotonic() + stage.seconds
    while time.monotonic() < ends_s:
        clients = await asyncio.gather(*(stage.load.connect() for _ in range(CLIENTS)))
        for i, client in enumerate(clients):
            asked = Asked(stream=i % 3 != 0)
            stage.load.all.append(asked)
            client.ask(asked)
        await asyncio.sleep(0.1)  # some have begun to be answered, some have not
        for client in clients:
            left += client.asked is not None
            client.leave()
        gone_s = time.monotonic()
        ordinary = stage.load.rate  # far more than its own requests in flight
        while sum([await backend.running() for backend in stage.cluster.backends]) > ordinary:
            if time.monotonic() > gone_s + 5.0:
                break
            await asyncio.sleep(0.01)
        worst_s = max(worst_s, time.monotonic() - gone_s)
        await asyncio.sleep(0.2)
    stage.expect(worst_s < 2.0, f"replicas worked on {worst_s:.1f} s for clients that had left")
    stage.notes.append(f"{left} left; replicas were free of them after {worst_s:.2f} s at most")


async def slow_clients(stage: Stage) -> None:
    """Clients that read nothing of megabytes, then leave."""
    before_mib = stage.gateway.memory_mib
    clients = []
    for _ in range(SLOW):
        client = await stage.load.connect(buffer_bytes=32 << 10)
        client.transport.pause_reading()
        asked = Asked(stream=True, words=FLOOD)
        stage.load.all.append(asked)
        client.ask(asked)
        clients.append(client)
    await asyncio.sleep(stage.seconds)
    held_mib = stage.gateway.memory_mib - before_mib
    for client in clients:
        client.leave()
    stage.expect(held_mib < SLOW * 2.0, f"it held {held_mib:.0f} MiB for them")
    stage.notes.append(f"{SLOW} clients left megabytes unread: {held_mib:.0f} MiB held for them")


SCENARIOS: dict[str, Scenario] = {
    "kill": Scenario("kill -9 of a replica, then its restart", kill),
    "kill-openai": Scenario("the same, asked by the `openai` client", kill, openai=True),
    "freeze": Scenario("a replica is frozen (SIGSTOP), then goes on", freeze),
    "silent": Scenario("a replica takes requests and never answers", shows("silent", 10.0)),
    "drip": Scenario("a replica answers byte by byte", shows("drip", None), cut=Cut.NOWHERE),
    "reset": Scenario("a replica takes requests, then resets connections", shows("reset"), cut=Cut.NOWHERE),
    "head-only": Scenario("a replica closes after the head of its answer", shows("head-only"), cut=Cut.NOWHERE),
    "cut": Scenario("a replica closes in the middle of streams", shows("cut")),
    "bad-sse": Scenario("a replica sends events that are none", shows("bad-sse")),
    "bad-http": Scenario("a replica sends what is no HTTP", shows("bad-http"), cut=Cut.NOWHERE),
    "no-done": Scenario("a replica's streams end without [DONE]", shows("no-done")),
    "5xx": Scenario("a replica gives 500 to everything", shows("500"), cut=Cut.NOWHERE),
    "4xx": Scenario("a replica gives 400 to everything", shows("400", None), expected=(200, 400), cut=Cut.NOWHERE),
    "429": Scenario("a replica gives 429 with Retry-After", shows("429"), cut=Cut.NOWHERE),
    "poison": Scenario("requests come that every replica gives 500 to", poison, may_refuse=True, cut=Cut.NOWHERE),
    "all-5xx": Scenario("all replicas give 500", all_500, may_refuse=True, cut=Cut.NOWHERE),
    "all-down": Scenario("all replicas are killed, then come back", all_down, may_refuse=True, cut=Cut.ANYWHERE),
    "sigterm": Scenario("the gateway gets SIGTERM, then a replica is killed", terminate),
    "sigterm-stuck": Scenario(
        "the gateway gets SIGTERM while a replica is frozen and a stream takes too long",
        terminate_stuck,
        cut=Cut.ANYWHERE,
    ),
    "gateway-frozen": Scenario("the gateway itself is frozen for seconds", gateway_frozen, cut=Cut.NOWHERE),
    "disconnect": Scenario("hundreds of clients leave in the middle", disconnect, cut=Cut.NOWHERE),
    "slow-clients": Scenario("clients leave megabytes unread", slow_clients, cut=Cut.NOWHERE),
}


@asynccontextmanager
async def openai_client(port: int) -> AsyncIterator[Callable[[Asked], Awaitable[None]]]:
    """How requests are sent with the `openai` package, without retries of its own.

    Raises:
        ImportError: it is not installed.
    """
    import openai

    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    async def ask(asked: Asked) -> None:
        raw = client.chat.completions.with_raw_response
        try:
            answer = await raw.create(
                model=MODEL, messages=messages(asked.words), max_tokens=EVENTS, stream=asked.stream
            )
            asked.status, asked.replica = answer.status_code, answer.headers.get("x-steersman-replica", "")
            parsed = answer.parse()
            if isinstance(parsed, openai.AsyncStream):
                async for event in parsed:
                    asked.body += event.model_dump_json().encode()
                # The client keeps [DONE] to itself; a stream that broke off has raised.
                asked.body[:] = b"data: {}\n\ndata: [DONE]\n\n"
            else:
                asked.body += parsed.model_dump_json().encode()
            asked.end()
        except openai.APIStatusError as error:
            asked.status = error.status_code
            asked.retry_after = "retry-after" in error.response.headers
            asked.body += error.response.content
            asked.end()
        except (openai.OpenAIError, OSError) as error:
            asked.end(f"{type(error).__name__}: {error}")

    async with client:
        yield ask


def worst_s(asked: Collection[Asked]) -> float:
    """The longest time that one of them took; NaN of none."""
    return max((a.took_s for a in asked), default=math.nan)
