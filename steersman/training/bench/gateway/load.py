"""A load generator: asks the next request of a connection when the last one was answered.

python -m steersman.training.bench.gateway.load JOB

`JOB` is a `Job` or a `Hold` as JSON. Prints its figures as one JSON object.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from itertools import cycle
from typing import Any

import httptools
import uvloop
from pydantic import BaseModel

from steersman.training.bench.gateway.mock import MODEL, gap_prompt
from steersman.training.bench.gateway.processes import cpu_s, resident_mib

PATH = "/v1/chat/completions"
PROMPT_BYTES = 1000
PROMPTS = 256  # of different text, in turn
STUCK_S = 30.0  # after which a request without an answer is given up
PATIENCE = 100  # errors, after which nothing more is asked
STALL_S = 0.035  # Nagle's algorithm and a delayed acknowledgement make one of 40 ms
SAMPLE_S = 0.5


class Job(BaseModel):
    """A closed loop of `concurrency` connections, each with one request at a time."""

    ports: list[int]  # on 127.0.0.1; connections go to each in turn
    pids: list[int]  # whose processor time is told, with their descendants'
    concurrency: int
    seconds: float
    warm_up_s: float = 0.0
    idle_s: float = 0.0  # without requests, for the processor time that a target takes anyway
    events: int = 0  # of a stream; 0: answers come whole
    gap_ms: float = 0.0


class Hold(BaseModel):
    """So many streams at once, slow ones."""

    ports: list[int]
    pids: list[int]
    streams: int
    events: int
    gap_ms: float


def requests(events: int, gap_ms: float) -> list[bytes]:
    """`PROMPTS` requests with different prompts of `PROMPT_BYTES` bytes."""
    made = []
    for i in range(PROMPTS):
        prompt = (f"{gap_prompt(gap_ms)} Question {i}: " + f"why did the answer to question {i} take so long? " * 40)[
            :PROMPT_BYTES
        ]
        body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 16}
        if events:
            body |= {"max_tokens": events, "stream": True}
        data = json.dumps(body).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        made.append(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return made


class Clients:
    """What connections have in common: what they ask, whether they go on, what they saw (times in seconds)."""

    def __init__(self, events: int, gap_ms: float) -> None:
        self.requests = cycle(requests(events, gap_ms))
        self.newlines = 2 * (events + 2) if events else 0  # with the usage and [DONE]
        self.going = False
        self.open: set[Client] = set()
        self.lost: list[int] = []  # ports to connect to again
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.took_s: list[float] = []
        self.gap_s: list[float] = []  # the longest of each answer
        self.errors = 0

    @property
    def busy(self) -> int:
        """Requests in flight."""
        return sum(client.busy for client in self.open)

    @property
    def streaming(self) -> int:
        """Of these, those that have begun to be answered."""
        return sum(client.busy and client.newlines > 0 for client in self.open)

    async def connect(self, port: int) -> None:
        """One more connection, or an error."""
        try:
            await asyncio.get_running_loop().create_connection(lambda: Client(self, port), "127.0.0.1", port)
        except OSError:
            self.errors += 1

    async def go(self, seconds: float) -> None:
        """Let every connection ask for so long, and wait until the last answers have come."""
        self.going = True
        for client in self.open:
            client.ask()
        ends_s = time.perf_counter() + seconds
        while (left_s := ends_s - time.perf_counter()) > 0:
            await asyncio.sleep(min(left_s, 0.1))
            ports, self.lost = self.lost, []
            for port in ports:
                if self.errors < PATIENCE:
                    await self.connect(port)
        self.going = False
        await self.quiet(STUCK_S)

    async def quiet(self, most_s: float) -> None:
        """Wait until nothing is in flight; what still is after `most_s` is an error."""
        ends_s = time.perf_counter() + most_s
        while self.busy and time.perf_counter() < ends_s:
            await asyncio.sleep(0.001)
        self.errors += self.busy

    def close(self) -> None:
        """Close all connections."""
        for client in list(self.open):
            client.leave()


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, clients: Clients, port: int) -> None:
        self._clients, self._port = clients, port
        self._parser = httptools.HttpResponseParser(self)
        self.busy = False
        self.newlines = 0
        self._asked_s = self._last_s = self._gap_s = 0.0

    def connection_made(self, transport: Any) -> None:  # uvloop's is no subclass of asyncio's
        self._transport = transport
        self._clients.open.add(self)
        if self._clients.going:
            self.ask()

    def ask(self) -> None:
        """Send the next request."""
        self.busy, self.newlines, self._gap_s = True, 0, 0.0
        self._asked_s = self._last_s = time.perf_counter()
        self._transport.write(next(self._clients.requests))

    def leave(self) -> None:
        """Close the connection, which is no error."""
        self.busy = False
        self._clients.open.discard(self)
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_body(self, data: bytes) -> None:
        # The first wait begins when the request is sent: a first event that is kept back shows, too.
        now_s = time.perf_counter()
        self._gap_s = max(self._gap_s, now_s - self._last_s)
        self._last_s = now_s
        self.newlines += data.count(b"\n")

    def on_message_complete(self) -> None:
        clients, self.busy = self._clients, False
        if self._parser.get_status_code() == 200 and self.newlines >= clients.newlines:
            clients.took_s.append(time.perf_counter() - self._asked_s)
            clients.gap_s.append(self._gap_s)
        else:
            clients.errors += 1
        if not self._parser.should_keep_alive():
            self.leave()
            clients.lost.append(self._port)
        elif clients.going and clients.errors < PATIENCE:
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._clients.open:
            self._clients.open.discard(self)
            self._clients.lost.append(self._port)
            self._clients.errors += self.busy


async def run(job: Job) -> dict[str, float]:
    """The figures of a closed loop: counts, seconds, and latencies in ms over all answers."""
    clients = Clients(job.events, job.gap_ms)
    for i in range(job.concurrency):
        await clients.connect(job.ports[i % len(job.ports)])
    if job.warm_up_s:
        await clients.go(job.warm_up_s)
        clients.clear()
    before_s = cpu_s(job.pids)
    await asyncio.sleep(job.idle_s)
    idle_cpu_s = cpu_s(job.pids) - before_s
    gc.collect()
    gc.disable()
    before_s, started_s = cpu_s(job.pids), time.perf_counter()
    await clients.go(job.seconds)
    taken_s, used_s = time.perf_counter() - started_s, cpu_s(job.pids) - before_s
    clients.close()
    return {
        "requests": len(clients.took_s),
        "errors": clients.errors,
        "seconds": taken_s,
        "cpu_s": used_s,
        "idle_s": job.idle_s,
        "idle_cpu_s": idle_cpu_s,
        "p50_ms": 1e3 * quantile(clients.took_s, 0.5),
        "p99_ms": 1e3 * quantile(clients.took_s, 0.99),
        "gap_p50_ms": 1e3 * quantile(clients.gap_s, 0.5),
        "gap_max_ms": 1e3 * quantile(clients.gap_s, 1.0),
        "stalled": sum(gap >= STALL_S for gap in clients.gap_s),
    }


async def hold(job: Hold) -> dict[str, float]:
    """The figures of many streams at once: how many there were, and the target's memory before, during and after."""
    clients = Clients(job.events, job.gap_ms)
    before_mib = resident_mib(job.pids)
    clients.going = True
    first_ends_s = time.perf_counter() + job.events * job.gap_ms / 1e3
    for i in range(job.streams):
        await clients.connect(job.ports[i % len(job.ports)])
    clients.going = False  # each asks once
    held, samples_mib = 0, []
    while clients.busy and time.perf_counter() + SAMPLE_S < first_ends_s:
        await asyncio.sleep(SAMPLE_S)
        if (streaming := clients.streaming) >= held:
            held = streaming
            samples_mib.append(resident_mib(job.pids))
    await clients.quiet(STUCK_S)
    clients.close()
    await asyncio.sleep(2 * SAMPLE_S)
    return {
        "streams": job.streams,
        "held_streams": held,
        "held_errors": job.streams - len(clients.took_s),
        "rss_before_mib": before_mib,
        "rss_first_mib": samples_mib[0] if samples_mib else before_mib,
        "rss_last_mib": samples_mib[-1] if samples_mib else before_mib,
        "rss_after_mib": resident_mib(job.pids),
    }


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of `values` do not exceed; 0 without any."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def main(text: str) -> None:
    """Do one job and print its figures."""
    data = json.loads(text)
    figures = uvloop.run(hold(Hold(**data)) if "streams" in data else run(Job(**data)))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
