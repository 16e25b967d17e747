"""The gateway's HTTP client against servers that behave, and that do not."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from certificates import make, needs_openssl
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import scripted

from steersman.runtime.gateway.http.client import Broken, Connection
from steersman.runtime.gateway.http.upstream import Upstream

REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nX-A: b\r\n\r\nabc"


class Told:
    """A receiver that remembers what it was told."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.ends = 0
        self.error: Broken | None = None
        self.over = asyncio.Event()
        self.began = asyncio.Event()

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert not self.status, "two heads"
        self.status, self.headers = status, headers

    def data(self, data: bytes) -> None:
        assert self.status
        assert not self.over.is_set()
        self.body += data
        self.began.set()

    def end(self) -> None:
        self.ends += 1
        self.over.set()

    def broke(self, error: Broken) -> None:
        assert self.error is None
        self.error = error
        self.over.set()


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


def answering(*answers: bytes, close: bool = False) -> Script:
    """A server that gives each request the next of `answers`, on whatever connection."""
    left = list(answers)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            await reader.readuntil(b"{}")
            writer.write(left.pop(0))
            if close:
                return

    return script


class Server:
    """A scripted server, and connections to it."""

    def __init__(self) -> None:
        self.connections = 0
        self.upstream: Upstream

    async def ask(self, fresh: bool = False) -> Told:
        told = Told()
        connection = (None if fresh else self.upstream.idle()) or await self.upstream.connect()
        connection.send(REQUEST, b"{}", told)
        async with asyncio.timeout(10):
            await told.over.wait()
        return told


@asynccontextmanager
async def serving(script: Script, context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        await script(reader, writer, server.connections)

    async with scripted(counted, context) as port:
        server.upstream = Upstream(f"{'http' if context is None else 'https'}://127.0.0.1:{port}")
        try:
            yield server
        finally:
            server.upstream.close()


async def test_an_answer_is_told_as_it_comes() -> None:
    async with serving(answering(OK)) as s:
        told = await s.ask()
        assert (told.status, told.body, told.ends, told.error) == (200, b"abc", 1, None)
        assert told.headers == [(b"content-length", b"3"), (b"x-a", b"b")]


async def test_headers_of_the_connection_are_not_the_answers() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5\r\nConnection: keep-alive\r\n\r\n"
    async with serving(answering(answer + b"0\r\n\r\n")) as s:
        assert (await s.ask()).headers == []


async def test_a_connection_is_used_again() -> None:
    async with serving(answering(OK, OK, OK)) as s:
        for _ in range(3):
            assert (await s.ask()).body == b"abc"
        assert s.connections == 1


async def test_connections_at_once_are_as_many_as_requests_at_once() -> None:
    async with serving(answering(OK, OK, OK)) as s:
        await asyncio.gather(s.ask(), s.ask(), s.ask())
        assert s.connections == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na",
    ],
)
async def test_a_connection_that_is_to_close_is_not_used_again(answer: bytes) -> None:
    async with serving(answering(answer, OK)) as s:
        assert (await s.ask()).body == b"a"
        assert (await s.ask()).body == b"abc"
        assert s.connections == 2


async def test_an_idle_connection_that_the_server_closed_is_not_used() -> None:
    async with serving(answering(OK, OK, close=True)) as s:
        await s.ask()
        async with asyncio.timeout(10):
            while s.upstream.open:
                await asyncio.sleep(0.002)
        assert (await s.ask()).body == b"abc"


async def test_a_used_connection_that_ends_without_an_answer_is_stale_and_a_new_one_is_not() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.readuntil(b"{}")
        if number == 1:
            writer.write(OK)
            await reader.readuntil(b"{}")  # and goes, as if it had timed out just then

    async with serving(script) as s:
        await s.ask()
        stale = await s.ask()
        assert stale.error is not None
        assert stale.error.stale
        fresh = await s.ask(fresh=True)
        assert fresh.error is not None
        assert not fresh.error.stale


async def test_an_answer_that_broke_off_is_not_stale() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.readuntil(b"{}")
        writer.write(OK)
        await reader.readuntil(b"{}")
        writer.write(OK[:20])

    async with serving(script) as s:
        await s.ask()
        told = await s.ask()
        assert told.error is not None
        assert not told.error.stale


@pytest.mark.parametrize("more", [OK, b"HTTP/1.1 200 OK\r\nX: ", b"x"])
async def test_what_follows_an_answer_unasked_ends_the_connection(more: bytes) -> None:
    async with serving(answering(OK + more, OK)) as s:
        told = await s.ask()
        assert (told.body, told.error) == (b"abc", None)
        told = await s.ask()
        assert (told.body, told.error) == (b"abc", None)
        assert s.connections == 2


async def test_unasked_data_on_an_idle_connection_ends_it() -> None:
    poison = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.readuntil(b"{}")
        writer.write(OK)
        if number == 1:
            await poison.wait()
            writer.write(OK.replace(b"abc", b"bad"))
        await reader.read()

    async with serving(script) as s:
        await s.ask()
        poison.set()
        async with asyncio.timeout(10):
            while s.upstream.open:
                await asyncio.sleep(0.002)
        assert (await s.ask()).body == b"abc"


async def test_interim_answers_are_left_out() -> None:
    hints = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nX-Early: 1\r\n\r\n"
    async with serving(answering(hints + OK, OK)) as s:
        told = await s.ask()
        assert (told.status, told.body) == (200, b"abc")
        assert (b"x-early", b"1") not in told.headers
        await s.ask()
        assert s.connections == 1


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_answers_without_a_body_end_at_once(status: bytes) -> None:
    async with serving(answering(b"HTTP/1.1 %b\r\n\r\n" % status)) as s:
        told = await s.ask()
        assert (told.ends, told.body) == (1, b"")


async def test_a_body_of_unknown_length_ends_with_the_connection() -> None:
    async with serving(answering(b"HTTP/1.1 200 OK\r\n\r\nabc", OK, close=True)) as s:
        told = await s.ask()
        assert (told.body, told.ends, told.error) == (b"abc", 1, None)
        assert (await s.ask()).body == b"abc"
        assert s.connections == 2


async def test_trailers_are_not_headers() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Late: 1\r\n\r\n"
    async with serving(answering(answer)) as s:
        told = await s.ask()
        assert (told.body, told.headers) == (b"a", [])


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 999999 X\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0\r\n\r\n",
    ],
)
async def test_broken_framing_is_said_once_and_ends_the_connection(answer: bytes) -> None:
    async with serving(answering(answer, OK)) as s:
        told = await s.ask()
        assert told.error is not None
        assert "not valid HTTP" in str(told.error)
        assert (await s.ask()).body == b"abc"
        assert s.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    ],
)
async def test_an_answer_that_is_cut_off_is_not_whole(answer: bytes) -> None:
    async with serving(answering(answer, close=True)) as s:
        told = await s.ask()
        assert told.ends == 0
        assert str(told.error) == "the connection broke"


@pytest.mark.parametrize("endless", [b"X: a\r\n" * 20_000, b"X: " + b"a" * 100_000])
async def test_a_giant_head_is_broken_off(endless: bytes) -> None:
    async with serving(answering(b"HTTP/1.1 200 OK\r\n" + endless)) as s:
        told = await s.ask()
        assert str(told.error) == "the head of its answer is too large"


async def test_endless_interim_answers_are_broken_off() -> None:
    async with serving(answering(b"HTTP/1.1 100 Continue\r\n\r\n" * 4000)) as s:
        assert str((await s.ask()).error) == "the head of its answer is too large"


async def test_a_silent_server_is_broken_off_by_the_sweep() -> None:
    async with serving(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")) as s:
        told = Told()
        connection = await s.upstream.connect()
        connection.send(REQUEST, b"{}", told)
        await asyncio.wait_for(told.began.wait(), 10)
        s.upstream.sweep(connection.loop.time() + 299, 300.0)
        assert told.error is None
        s.upstream.sweep(connection.loop.time() + 301, 300.0)
        assert str(told.error) == "no answer in time"
        async with asyncio.timeout(10):
            while s.upstream.open:
                await asyncio.sleep(0.002)


async def test_an_idle_connection_is_given_up_before_its_server_does() -> None:
    async with serving(answering(OK, OK)) as s:
        await s.ask()
        (connection,) = s.upstream.open
        s.upstream.sweep(connection.loop.time() + 3.0, 300.0)
        assert connection.usable
        s.upstream.sweep(connection.loop.time() + 5.0, 300.0)
        assert not connection.usable
        assert (await s.ask()).body == b"abc"
        assert s.connections == 2


async def test_pausing_stops_the_server_and_resuming_lets_it_go_on() -> None:
    sent, size = 0, 40 << 20

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        nonlocal sent
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536
        await reader.read()

    async with serving(script) as s:
        told = Told()
        connection = await s.upstream.connect()
        connection.send(REQUEST, b"{}", told)
        await asyncio.wait_for(told.began.wait(), 10)
        connection.pause(True)
        before, stuck = -1, 0
        async with asyncio.timeout(10):
            while stuck < 50:  # the kernel's buffers are full
                stuck = stuck + 1 if sent == before else 0
                before = sent
                await asyncio.sleep(0.001)
        assert sent < size
        received = len(told.body)
        s.upstream.sweep(connection.loop.time() + 1e6, 300.0)  # its silence is our own doing
        assert told.error is None
        assert len(told.body) == received
        connection.pause(False)
        await asyncio.wait_for(told.over.wait(), 30)
        assert len(told.body) == size


async def test_a_client_that_stalls_at_the_end_of_its_answer_does_not_stall_the_next_one() -> None:
    """The last write to a slow client pauses a connection that is free again by then."""

    class Stalls(Told):
        connection: Connection

        def end(self) -> None:
            self.connection.pause(True)
            super().end()

    async with serving(answering(OK, OK)) as s:
        told = Stalls()
        told.connection = await s.upstream.connect()
        told.connection.send(REQUEST, b"{}", told)
        await asyncio.wait_for(told.over.wait(), 10)
        assert (await s.ask()).body == b"abc"
        assert s.connections == 1


async def test_giving_up_closes_the_connection_and_tells_nobody() -> None:
    gone = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.readuntil(b"{}")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async with serving(script) as s:
        told = Told()
        connection = await s.upstream.connect()
        connection.send(REQUEST, b"{}", told)
        connection.abort()
        await asyncio.wait_for(gone.wait(), 10)
        assert (told.error, told.ends) == (None, 0)


async def test_who_waits_for_an_answer_is_told_that_all_connections_are_closed() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.read()

    async with serving(script) as s:
        told = Told()
        connection = await s.upstream.connect()
        connection.send(REQUEST, b"{}", told)
        s.upstream.close()
        assert str(told.error) == "its connections were closed"


async def test_nobody_listening_is_said_without_an_address() -> None:
    async with serving(answering()) as s:
        pass
    with pytest.raises(Broken, match="no connection"):
        await s.upstream.connect()


@needs_openssl
async def test_a_self_signed_server_is_refused_with_a_sentence(tmp_path: Path) -> None:
    certificate, key = make(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with serving(answering(OK), context) as s:
        with pytest.raises(Broken, match="no secure connection: self-signed certificate"):
            await s.upstream.connect()
        assert s.upstream._ssl is not None
        s.upstream._ssl.load_verify_locations(certificate)
        assert (await s.ask()).body == b"abc"


class _Wire(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.closing = False

    def write(self, data: object) -> None: ...
    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing


async def received(pieces: list[bytes]) -> tuple[int, bytes, int, bool, bool]:
    connection, told, wire = Connection(Upstream("http://a")), Told(), _Wire()
    connection.connection_made(wire)
    connection.send(REQUEST, b"{}", told)
    for piece in pieces:
        if not wire.closing:
            connection.data_received(piece)
    connection.connection_lost(None)
    assert told.ends + (told.error is not None) == 1
    return told.status, told.body, told.ends, told.error is not None, wire.closing


GOOD = [
    OK,
    b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;x\r\nd\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 500 X\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno",
]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(GOOD), st.data())
def test_answers_do_not_depend_on_how_the_bytes_are_cut(answer: bytes, data: st.DataObject) -> None:
    places = sorted(data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=10)))
    pieces = [answer[a:b] for a, b in zip([0, *places], [*places, len(answer)], strict=True)]
    assert asyncio.run(received(pieces)) == asyncio.run(received([answer]))


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(GOOD), st.integers(0, 200), st.binary(max_size=6), st.binary(max_size=40))
def test_whatever_a_server_sends_the_receiver_hears_of_one_end(
    answer: bytes, place: int, noise: bytes, tail: bytes
) -> None:
    place %= len(answer)
    asyncio.run(received([answer[:place] + noise, answer[place + 1 :] + tail]))
