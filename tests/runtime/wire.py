"""HTTP as bytes, for tests: a server to ask over raw sockets or without any, and its answers taken apart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import httptools

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.http.protocol import ServerProtocol
from steersman.runtime.gateway.http.server import Handler, HttpLimits, Server


class Answer(NamedTuple):
    """One answer of a server. Interim ones (100) are left out."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, object]:
        """The error in it, which must have the API's form."""
        said = json.loads(self.body)
        assert set(said) == {"error"}
        assert set(said["error"]) == {"message", "type", "param", "code"}
        assert self.headers["content-type"] == "application/json"
        error: dict[str, object] = said["error"]
        return error


class Answers:
    """Takes a server's bytes apart, strictly."""

    def __init__(self) -> None:
        self.all: list[Answer] = []
        self.inside = False  # an answer has begun and not ended
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body = b""

    def feed(self, data: bytes) -> None:
        if data:
            self.inside = True
            self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        assert name.decode().lower() not in self._headers, f"{name!r} stands twice"
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_begin(self) -> None:
        self.inside = True

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self.all.append(Answer(self._parser.get_status_code(), self._headers, self._body))
        self._headers, self._body, self.inside = {}, b"", False


def answers_in(data: bytes) -> list[Answer]:
    """All answers in what a server sent before it closed the connection."""
    answers = Answers()
    answers.feed(data)
    assert not answers.inside, "the last answer is cut off"
    return answers.all


def in_tasks(answer: Callable[[Exchange], Awaitable[None]]) -> Handler:
    """`answer` as a handler: a task for each exchange, cancelled when its client leaves."""

    async def run(exchange: Exchange) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await answer(exchange)
        except Exception:
            exchange.broken()
        else:
            exchange.over()

    def handle(exchange: Exchange) -> None:
        task = asyncio.get_running_loop().create_task(run(exchange))

        def leave() -> None:
            task.cancel()

        exchange.on_leave = leave

    return handle


class Echo:
    """A handler that says what it was asked, and remembers it."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, bytes, bytes]] = []
        self.exchanges: list[Exchange] = []
        self.began = asyncio.Event()
        self.hold = asyncio.Event()  # what /hold waits for
        self.cancelled = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        self.asked.append((exchange.method, exchange.path, exchange.body))
        self.exchanges.append(exchange)
        self.began.set()
        if exchange.path == b"/hold":
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if exchange.path == b"/raise":
            raise RuntimeError("a bug")
        if exchange.path == b"/refuse":
            exchange.fail(ApiError(404, "not here", code="not_found"))
        elif exchange.path == b"/stream":
            exchange.start(200, b"content-type: text/event-stream\r\n")
            for piece in (b"data: a\n\n", b"data: b\n\n"):
                exchange.write(piece)
                await asyncio.sleep(0)
            exchange.finish()
        elif exchange.path == b"/unfinished":
            exchange.start(200, b"")
            exchange.write(b"half")
        else:
            said = {"path": exchange.path.decode("latin-1"), "body": exchange.body.decode("latin-1")}
            exchange.respond(200, json.dumps(said).encode())


class Client:
    """A raw connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answers(self, count: int) -> list[Answer]:
        """The next `count` answers."""
        answers = Answers()
        async with asyncio.timeout(10):
            while len(answers.all) < count:
                data = await self.reader.read(65536)
                assert data, f"closed after {len(answers.all)} answers"
                answers.feed(data)
        assert len(answers.all) == count
        return answers.all

    async def rest(self) -> list[Answer]:
        """All answers until the server closes."""
        async with asyncio.timeout(10):
            return answers_in(await self.reader.read())

    async def closed(self) -> None:
        """The server closed, cleanly or not."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(65536):
                    pass


class Listening:
    """A server on a free port, and what it was asked."""

    def __init__(self, server: Server, echo: Echo) -> None:
        self.server, self.echo = server, echo
        self._clients: list[Client] = []

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.server.port))
        self._clients.append(client)
        return client

    async def ask(self, *pieces: bytes) -> list[Answer]:
        """Send bytes on a connection of their own, and read until the server closes it."""
        client = await self.connect()
        for piece in pieces:
            await client.send(piece)
            await asyncio.sleep(0)
        answers = await client.rest()
        client.writer.close()
        return answers

    def sweep(self, after_s: float) -> None:
        """What the server's look at its connections does so many seconds from now."""
        for connection in list(self.server.connections):
            connection.check(self.server.loop.time() + after_s)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                await asyncio.sleep(0.002)

    async def close(self) -> None:
        for client in self._clients:
            client.writer.close()
        await self.server.stop()
        for client in self._clients:
            with contextlib.suppress(ConnectionError):
                await client.writer.wait_closed()


@asynccontextmanager
async def listening(limits: HttpLimits | None = None) -> AsyncIterator[Listening]:
    """A server with an `Echo` behind it."""
    echo = Echo()
    server = Server(in_tasks(echo), limits)
    await server.start(host="127.0.0.1", port=0)
    listens = Listening(server, echo)
    try:
        yield listens
    finally:
        await listens.close()


@asynccontextmanager
async def scripted(
    script: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """A server that plays `script` on each connection, then closes it. Gives its port."""
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            await script(reader, writer)
        writer.close()

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)


class Memory(asyncio.Transport):
    """A transport that keeps what is written to it: a connection without a network."""

    def __init__(self, protocol: ServerProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.out = bytearray()
        self.closing = False
        self.reading = True
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.closing:
            self.out += data

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close

    async def send(self, data: bytes) -> None:
        """The client sends `data`, and waits until the server has done what it can with it."""
        while not self.reading and not self.closing:
            await asyncio.sleep(0)
        if not self.closing:
            self.protocol.data_received(data)

    async def settle(self) -> None:
        """Until everything that was asked is answered."""
        while self.protocol.transport is not None and (self.protocol.busy or not self.reading):
            await asyncio.sleep(0)
