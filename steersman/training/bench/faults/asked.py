"""A steady load, and what became of every request of it."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import Awaitable, Callable, Collection
from enum import StrEnum
from typing import Any

import httptools

from steersman.training.bench.gateway.load import PATH
from steersman.training.bench.gateway.mock import MODEL, gap_prompt

EVENTS, GAP_MS = 20, 20.0  # of a stream
GIVE_UP_S = 25.0  # without an answer by then, a request is lost


class Fate(StrEnum):
    """What became of a request."""

    ANSWERED = "answered"  # in full
    REFUSED = "refused"  # with 429 or 503 and a time to come again, or 502 where no replica can serve it
    CUT = "cut"  # the answer had begun: nobody could save it
    LEFT = "left"  # the client left
    LOST = "lost"


class Asked:
    """One request and what came back. Times in seconds of `time.monotonic`."""

    __slots__ = (
        "asked_s",
        "body",
        "code",
        "ended_s",
        "left",
        "problem",
        "replica",
        "retry_after",
        "status",
        "stream",
        "words",
    )

    def __init__(self, stream: bool, words: str = "What happens when a replica dies?") -> None:
        self.stream, self.words = stream, words
        self.asked_s = time.monotonic()
        self.ended_s = 0.0
        self.status = 0
        self.replica = ""
        self.retry_after = False
        self.code = ""  # of an error
        self.body = bytearray()
        self.problem = ""  # why there is no whole answer
        self.left = False

    @property
    def took_s(self) -> float:
        return self.ended_s - self.asked_s

    def end(self, problem: str = "") -> None:
        """Nothing more comes. What was said is read, and forgotten."""
        self.ended_s, self.problem = time.monotonic(), problem
        if self.problem or self.left:
            return
        if self.status != 200:
            self.code = str(_json(bytes(self.body)).get("error", {}).get("code", ""))
        elif not (_is_stream(self.body) if self.stream else "choices" in _json(bytes(self.body))):
            self.problem = "the answer is not whole"
        del self.body[200:]

    def fate(self, expected: Collection[int] = (200,), may_refuse: bool = False, closed_s: float = math.inf) -> Fate:
        """What became of it, where an answer with a status in `expected` is one.

        may_refuse: there was a time when no replica could serve it; what says so is no loss. closed_s: when
        the gateway was told to end: from then on it closes connections.
        """
        if self.left:
            return Fate.LEFT
        if self.problem and not self.status and self.asked_s >= closed_s:
            return Fate.REFUSED
        if self.problem:
            return Fate.CUT if self.status == 200 and self.body else Fate.LOST
        if self.status in expected:
            return Fate.ANSWERED
        if may_refuse and self.status == 502:
            return Fate.REFUSED
        refusals = {"shed", "rate_limit_exceeded", "draining"} | ({"no_replica", "busy"} if may_refuse else set())
        return Fate.REFUSED if self.code in refusals and self.retry_after else Fate.LOST


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_stream(body: bytearray) -> bool:
    return body.endswith(b"data: [DONE]\n\n") and b'"error"' not in body and body.startswith(b"data: {")


def messages(words: str) -> list[Any]:
    """A prompt that asks the mock for events `GAP_MS` apart, if it does not say itself how far."""
    return [{"role": "user", "content": f"{words} {gap_prompt(GAP_MS)}"}]


def request(asked: Asked) -> bytes:
    """A chat completion as bytes."""
    body: dict[str, Any] = {"model": MODEL, "messages": messages(asked.words), "max_tokens": EVENTS}
    data = json.dumps({**body, "stream": True} if asked.stream else body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


class Client(asyncio.Protocol):
    """One connection of a client, with one request at a time."""

    def __init__(self) -> None:
        self.asked: Asked | None = None
        self.over = asyncio.Event()
        self.transport: Any = None  # uvloop's is no subclass of asyncio's
        self._parser: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, asked: Asked) -> None:
        """Send a request; `over` tells of its end."""
        self.asked, self._parser = asked, httptools.HttpResponseParser(self)
        self.over.clear()
        self.transport.write(request(asked))

    def leave(self) -> None:
        """Be gone, in the middle of whatever it is."""
        if self.asked is not None:
            self.asked.left = True
        self.transport.abort()

    @property
    def usable(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the connection broke")
        self.transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")
            self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.asked is not None:
            if name.lower() == b"x-steersman-replica":
                self.asked.replica = value.decode()
            elif name.lower() == b"retry-after":
                self.asked.retry_after = True

    def on_headers_complete(self) -> None:
        if self.asked is not None:
            self.asked.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self.asked is not None:
            self.asked.body += data

    def on_message_complete(self) -> None:
        keep = self._parser.should_keep_alive()
        self._end()
        if not keep:
            self.transport.close()

    def _end(self, problem: str = "") -> None:
        asked, self.asked = self.asked, None
        if asked is not None:
            asked.end(problem)
        self.over.set()


class Load:
    """So many requests a second to `port`, every other one a stream, each on a connection that is free."""

    def __init__(self, port: int, rate: float) -> None:
        self.port, self.rate = port, rate
        self.all: list[Asked] = []
        self._idle: list[Client] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._going: asyncio.Task[None] | None = None

    def start(self, ask: Callable[[Asked], Awaitable[None]] | None = None) -> None:
        """Begin. ask: how a request is sent, if not over a plain connection."""
        self._going = asyncio.create_task(self._go(ask))

    async def _go(self, ask: Callable[[Asked], Awaitable[None]] | None) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            self.send(Asked(stream=len(self.all) % 2 == 0), ask)
            next_s += 1.0 / self.rate
            await asyncio.sleep(max(0.0, next_s - loop.time()))

    def send(self, asked: Asked, ask: Callable[[Asked], Awaitable[None]] | None = None) -> None:
        """Send one request more."""
        self.all.append(asked)
        task = asyncio.create_task(self._bounded(ask or self.ask, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bounded(self, ask: Callable[[Asked], Awaitable[None]], asked: Asked) -> None:
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await ask(asked)
        except TimeoutError:
            asked.end(f"nothing in {GIVE_UP_S:g} s")

    async def stop(self) -> None:
        """Ask nothing more, and wait for what was asked."""
        if self._going is not None:
            self._going.cancel()
            await asyncio.gather(self._going, return_exceptions=True)
        await asyncio.gather(*self._tasks)
        for client in self._idle:
            if client.usable:
                client.transport.close()
        self._idle.clear()

    async def connect(self, buffer_bytes: int | None = None) -> Client:
        """A connection. buffer_bytes: that the kernel may keep for a client that does not read.

        Raises:
            OSError: there is none.
        """
        loop, end = asyncio.get_running_loop(), socket.socket()
        try:
            if buffer_bytes is not None:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            end.setblocking(False)
            await loop.sock_connect(end, ("127.0.0.1", self.port))
            _, client = await loop.create_connection(Client, sock=end)
        except BaseException:
            end.close()
            raise
        return client

    async def ask(self, asked: Asked) -> None:
        """Send a request and wait for its end."""
        client: Client | None = None
        while self._idle and (client is None or not client.usable):
            client = self._idle.pop()
        if client is None or not client.usable:
            try:
                client = await self.connect()
            except OSError:
                asked.end("no connection")
                return
        try:
            client.ask(asked)
            await client.over.wait()
        except asyncio.CancelledError:
            client.asked = None
            client.transport.abort()
            raise
        if client.usable:
            self._idle.append(client)
