"""The gateway's HTTP server over raw sockets: what it must refuse, bound, keep in order, and leave alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire import Answer, Echo, Memory, answers_in, in_tasks, listening

from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.http.protocol import ServerProtocol
from steersman.runtime.gateway.http.server import HttpLimits, Server
from steersman.runtime.gateway.metrics import http_metrics

HOST = b"Host: a\r\n"
NEXT = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def get(path: bytes, *lines: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%b %b HTTP/%b\r\n%b%b\r\n" % (method, path, version, HOST, b"".join(line + b"\r\n" for line in lines))


def post(path: bytes, body: bytes, *lines: bytes) -> bytes:
    return get(path, b"Content-Length: %d" % len(body), *lines, method=b"POST") + body


def chunked(*parts: bytes, lines: tuple[bytes, ...] = ()) -> bytes:
    return get(b"/c", b"Transfer-Encoding: chunked", *lines, method=b"POST") + b"".join(parts)


# Request smuggling: whatever two parsers could read in two ways is refused, and nothing after it is read

SMUGGLED = {
    "length and chunked": get(b"/x", b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunked and length": get(b"/x", b"Transfer-Encoding: chunked", b"Content-Length: 3") + b"0\r\n\r\n",
    "the same length twice": get(b"/x", b"Content-Length: 3", b"Content-Length: 3") + b"abc",
    "two lengths": get(b"/x", b"Content-Length: 3", b"Content-Length: 40") + b"abc",
    "a list of lengths": get(b"/x", b"Content-Length: 3, 3") + b"abc",
    "a length with a plus": get(b"/x", b"Content-Length: +3") + b"abc",
    "a negative length": get(b"/x", b"Content-Length: -3") + b"abc",
    "a hexadecimal length": get(b"/x", b"Content-Length: 0x3") + b"abc",
    "a length in two words": get(b"/x", b"Content-Length: 3 4") + b"abc",
    "an empty length": get(b"/x", b"Content-Length:") + b"abc",
    "a length that overflows": get(b"/x", b"Content-Length: 18446744073709551617") + b"a",
    "chunked, then coded": get(b"/x", b"Transfer-Encoding: chunked, gzip") + b"0\r\n\r\n",
    "chunked twice": get(b"/x", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "an empty coding": get(b"/x", b"Transfer-Encoding:") + b"0\r\n\r\n",
    "a tab of another kind": get(b"/x", b"Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n",
    "a coding on a folded line": get(b"/x", b"Transfer-Encoding:", b" chunked") + b"0\r\n\r\n",
    "a folded line": get(b"/x", b"X: b", b" c"),
    "a space before the colon": get(b"/x", b"Transfer-Encoding : chunked") + b"0\r\n\r\n",
    "a space before the first field": b"GET /x HTTP/1.1\r\n Host: a\r\n\r\n",
    "a field without a colon": get(b"/x", b"abc"),
    "a field without a name": get(b"/x", b": abc"),
    "NUL in a value": get(b"/x", b"X: a\0b"),
    "NUL in a name": get(b"/x", b"X\0: b"),
    "NUL in the target": get(b"/x\0"),
    "bare LF in the head": b"GET /x HTTP/1.1\nHost: a\n\n",
    "one bare LF": b"GET /x HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "bare CR in the head": b"GET /x HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    "a chunk with a prefix": chunked(b"0x3\r\nabc\r\n0\r\n\r\n"),
    "a negative chunk": chunked(b"-3\r\nabc\r\n0\r\n\r\n"),
    "a chunk without a size": chunked(b"\r\nabc\r\n0\r\n\r\n"),
    "a space after a chunk's size": chunked(b"3 \r\nabc\r\n0\r\n\r\n"),
    "a chunk that overflows": chunked(b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
    "a chunk longer than it says": chunked(b"3\r\nabcdef\r\n0\r\n\r\n"),
    "a chunk without an end of line": chunked(b"3\r\nabc0\r\n\r\n"),
    "chunks with bare LF": chunked(b"3\nabc\n0\n\n"),
    "an extension with bare LF": chunked(b"3;a\nabc\r\n0\r\n\r\n"),
    "a trailer with a length": chunked(b"0\r\nContent-Length: 5\r\n\r\n"),
    "a trailer with a coding": chunked(b"0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "HTTP/1.0 with a coding": get(b"/x", b"Transfer-Encoding: chunked", version=b"1.0") + b"0\r\n\r\n",
    "two hosts": get(b"/x", b"Host: b"),
    "two keys": get(b"/x", b"Authorization: Bearer a", b"Authorization: Bearer b"),
    "no host": b"GET /x HTTP/1.1\r\n\r\n",
    "a whole URL": get(b"http://a/x"),
    "no path": get(b"*", method=b"OPTIONS"),
    "a tunnel": get(b"a:443", method=b"CONNECT"),
    "HTTP/2 with prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a space in the target": get(b"/x y"),
    "a method in lower case": get(b"/x", method=b"get"),
    "an unknown method": get(b"/x", method=b"FOO"),
    "a version to come": get(b"/x", version=b"1.2"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("request_", SMUGGLED.values(), ids=SMUGGLED)
async def test_what_can_be_read_in_two_ways_is_refused_and_ends_the_connection(request_: bytes) -> None:
    async with listening() as s:
        (answer,) = await s.ask(request_ + NEXT)
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"
        assert answer.headers["connection"] == "close"
        assert not s.echo.asked


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get(b"/x", b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 501),
        (get(b"/x", b"Transfer-Encoding: xchunked") + b"0\r\n\r\n", 501),
        (get(b"/x", b"Transfer-Encoding: identity"), 501),
        (post(b"/x", b"abc", b"Content-Encoding: gzip"), 415),
        (post(b"/x", b"abc", b"Expect: a miracle"), 417),
        (get(b"/x", version=b"2.0"), 505),
        (b"GET /x\r\n\r\n", 505),
    ],
)
async def test_what_is_not_spoken_here_is_said_with_a_status_of_its_own(request_: bytes, status: int) -> None:
    async with listening() as s:
        (answer,) = await s.ask(request_ + NEXT)
        assert answer.status == status
        assert answer.error
        assert not s.echo.asked


async def test_odd_but_clear_bodies_are_read() -> None:
    async with listening() as s:
        client = await s.connect()
        for request in (
            get(b"/x", b"content-length:\t003", method=b"POST") + b"abc",
            get(b"/x", b"transfer-encoding: CHUNKED", method=b"POST") + b'3;a=b;c="d"\r\nabc\r\n000\r\n\r\n',
            b"\r\n\r\n" + post(b"/x", b"abc"),
        ):
            await client.send(request)
            (answer,) = await client.answers(1)
            assert json.loads(answer.body) == {"path": "/x", "body": "abc"}


async def test_a_trailer_authorizes_nobody() -> None:
    async with listening() as s:
        trailer = b"0\r\nAuthorization: Bearer stolen\r\nX-Request-Id: t\r\nHost: b\r\n\r\n"
        first, _ = await s.ask(chunked(b"1\r\na\r\n", trailer), LAST)
        assert first.status == 200
        exchange = s.echo.exchanges[0]
        assert b"authorization" not in exchange.headers
        assert exchange.headers[b"host"] == b"a"
        assert exchange.request_id != b"t"


async def test_a_body_that_looks_like_a_request_is_a_body() -> None:
    async with listening() as s:
        await s.ask(post(b"/x", NEXT) + LAST)
        assert [path for _, path, _ in s.echo.asked] == [b"/x", b"/last"]


async def test_an_upgrade_is_not_taken_and_what_follows_it_not_read() -> None:
    for upgrade in (b"websocket", b"h2c"):
        async with listening() as s:
            answers = await s.ask(get(b"/x", b"Connection: Upgrade", b"Upgrade: " + upgrade) + NEXT)
            assert [a.status for a in answers] == [200]
            assert answers[0].headers["connection"] == "close"
            assert "upgrade" not in answers[0].headers
            assert len(s.echo.asked) == 1
            # A body would be lost: it belongs to the other protocol.
            answers = await s.ask(post(b"/x", b"abc", b"Connection: Upgrade", b"Upgrade: " + upgrade) + NEXT)
            assert [a.status for a in answers] == [400]
            assert len(s.echo.asked) == 1


# Pipelining


async def test_answers_come_in_the_order_of_the_requests() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/hold") + get(b"/b") + post(b"/c", b"x") + LAST)
        await s.echo.began.wait()
        assert len(s.echo.asked) == 1  # one at a time
        s.echo.hold.set()
        assert [json.loads(a.body)["path"] for a in await client.rest()] == ["/hold", "/b", "/c", "/last"]


async def test_what_stands_before_an_error_is_answered_and_what_stands_after_it_never_asked() -> None:
    async with listening() as s:
        answers = await s.ask(get(b"/a") + get(b"/b") + get(b"/bad", b"X: a\0") + NEXT)
        assert [a.status for a in answers] == [200, 200, 400]
        assert [path for _, path, _ in s.echo.asked] == [b"/a", b"/b"]


async def test_nothing_is_asked_after_a_request_that_closes() -> None:
    async with listening() as s:
        assert len(await s.ask(LAST + NEXT)) == 1
        assert len(s.echo.asked) == 1


async def test_an_answer_that_breaks_off_ends_the_connection() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/unfinished") + NEXT)
        await client.closed()
        assert len(s.echo.asked) == 1


async def test_requests_are_read_ahead_only_so_far() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/hold"))
        await s.echo.began.wait()
        client.writer.write(post(b"/x", b"y" * 30_000_000))
        (connection,) = s.server.connections
        await s.until(lambda: not connection._reading)
        assert connection._body_bytes < 1 << 20
        s.echo.hold.set()
        assert [a.status for a in await client.answers(2)] == [200, 200]


async def test_a_flood_of_requests_ahead_is_refused_after_those_that_were_read() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/hold") + b"".join(get(b"/%d" % i) for i in range(1100)))
        await s.echo.began.wait()
        s.echo.hold.set()
        answers = await client.rest()
        assert [a.status for a in answers] == [200] * 1025 + [400]
        assert "ahead of their answers" in str(answers[-1].error["message"])


# Limits


@pytest.mark.parametrize(
    "request_",
    [
        get(b"/x", b"X: " + b"a" * 2000),
        get(b"/" + b"x" * 2000),
        get(b"/x", *[b"X: a"] * 11),
        b"GET /" + b"x" * 2000,  # without an end
        b"GET /x HTTP/1.1\r\nX: " + b"a" * 2000,
        b"\r\n" * 1000,
    ],
)
async def test_a_head_over_the_limit_is_431(request_: bytes) -> None:
    async with listening(HttpLimits(head_bytes=1000, header_fields=10)) as s:
        (answer,) = await s.ask(request_)
        assert answer.status == 431
        assert answer.error
        assert not s.echo.asked


@pytest.mark.parametrize(
    "request_",
    [
        get(b"/x", b"Content-Length: 1001", method=b"POST"),  # before any of it is sent
        get(b"/x", b"Content-Length: 1001", b"Expect: 100-continue", method=b"POST"),
        chunked(b"3e9\r\n" + b"a" * 1001),
        chunked(*[b"1\r\na\r\n"] * 1001),
    ],
)
async def test_a_body_over_the_limit_is_413(request_: bytes) -> None:
    async with listening(HttpLimits(body_bytes=1000)) as s:
        (answer,) = await s.ask(request_)
        assert answer.status == 413
        assert "larger than 1000 bytes" in str(answer.error["message"])
        assert not s.echo.asked


async def test_a_client_that_is_still_sending_can_read_why_it_is_refused() -> None:
    async with listening(HttpLimits(body_bytes=1000)) as s:
        client = await s.connect()
        body = b"x" * 20_000_000
        sending = asyncio.create_task(client.send(post(b"/x", body)))
        (answer,) = await client.rest()
        assert answer.status == 413
        await sending


async def test_a_refused_client_that_goes_on_sending_is_cut_off() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(b"nonsense\r\n\r\n")
        await client.rest()
        assert len(s.server.connections) == 1
        s.sweep(3.0)
        await s.until(lambda: not s.server.connections)


async def test_bodies_in_the_smallest_chunks_are_read() -> None:
    async with listening(HttpLimits(head_bytes=1000)) as s:
        parts = [b"1\r\na\r\n"] * 5000
        (first, _) = await s.ask(chunked(), *parts, b"0\r\n\r\n", LAST)
        assert json.loads(first.body)["body"] == "a" * 5000


async def test_bodies_in_the_smallest_chunks_take_no_more_memory_than_others() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(chunked(b"2\r\nab\r\n" * 50_000))
        (connection,) = s.server.connections
        await s.until(lambda: connection._body_bytes == 100_000)
        assert len(connection._body) < 100
        await client.send(b"0\r\n\r\n")
        (answer,) = await client.answers(1)
        assert json.loads(answer.body)["body"] == "ab" * 50_000


@pytest.mark.parametrize("endless", [b"1;" + b"a" * 3000, b"0\r\nX: " + b"a" * 3000, b"0\r\n" + b"X: a\r\n" * 1000])
async def test_endless_extensions_and_trailers_are_431(endless: bytes) -> None:
    async with listening(HttpLimits(head_bytes=1000)) as s:
        client = await s.connect()
        await client.send(chunked())
        (connection,) = s.server.connections
        await s.until(lambda: not connection._in_head)
        await client.send(endless)
        (answer,) = await client.rest()
        assert answer.status == 431
        assert not s.echo.asked


async def test_connections_over_the_limit_are_told_503() -> None:
    async with listening(HttpLimits(connections=2)) as s:
        kept = [await s.connect() for _ in range(2)]
        for client in kept:
            await client.send(get(b"/x"))
            await client.answers(1)
        (refused,) = await s.ask(get(b"/x"))
        assert refused.status == 503
        assert refused.headers["retry-after"] == "5"
        kept[0].writer.close()
        await s.until(lambda: len(s.server.connections) < 2)
        assert [a.status for a in await s.ask(LAST)] == [200]


# Slow clients


@pytest.mark.parametrize(
    ("sent", "after_s", "status"),
    [
        (b"GET /x HTT", 11.0, 408),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: ", 11.0, 408),
        (b"\r\n", 11.0, 408),
        (get(b"/x", b"Content-Length: 5", method=b"POST") + b"abc", 121.0, 408),
        (chunked(b"3\r\nab"), 121.0, 408),
    ],
)
async def test_who_sends_too_slowly_is_408(sent: bytes, after_s: float, status: int) -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(sent)
        (connection,) = s.server.connections
        await s.until(lambda: connection._head_bytes + connection._tail_bytes > 0)
        s.sweep(after_s / 2 if after_s < 100 else 100.0)
        assert not connection._refused
        s.sweep(after_s)
        (answer,) = await client.rest()
        assert answer.status == status
        assert answer.error


async def test_trickling_bytes_gain_no_time() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(b"GET /x HTTP/1.1\r\n")
        (connection,) = s.server.connections
        await s.until(lambda: connection._head_bytes > 0)
        began = connection._since
        for i in range(5):
            await client.send(b"X: %d\r\n" % i)
        await s.until(lambda: connection._fields >= 4)
        assert connection._since == began


async def test_an_idle_connection_is_closed_without_a_word() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/x"))
        await client.answers(1)
        s.sweep(70.0)
        assert len(s.server.connections) == 1
        s.sweep(76.0)
        assert await client.rest() == []


async def test_a_long_answer_is_not_idle() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/hold"))
        await s.echo.began.wait()
        s.sweep(1e6)
        s.echo.hold.set()
        assert [a.status for a in await client.answers(1)] == [200]


async def serving_with(handler: Callable[[Exchange], Awaitable[None]], limits: HttpLimits | None = None) -> Server:
    server = Server(in_tasks(handler), limits)
    await server.start(host="127.0.0.1", port=0)
    return server


async def test_a_client_that_does_not_read_pauses_what_writes_to_it_and_then_loses_its_connection() -> None:
    paused, cancelled = asyncio.Event(), asyncio.Event()
    written = 0

    async def pour(exchange: Exchange) -> None:
        nonlocal written
        going = asyncio.Event()
        going.set()

        def on_pause(stop: bool) -> None:
            if stop:
                going.clear()
                paused.set()
            else:
                going.set()

        exchange.on_pause = on_pause
        exchange.start(200, b"")
        try:
            while True:
                await going.wait()
                exchange.write(b"x" * 65536)
                written += 65536
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    server = await serving_with(pour)
    client = socket.create_connection(("127.0.0.1", server.port))
    try:
        client.sendall(get(b"/x"))
        async with asyncio.timeout(10):
            await paused.wait()
            (connection,) = server.connections
            while not connection.stalled:  # it may have drained into the kernel once more
                await asyncio.sleep(0.002)
            assert connection.transport is not None
            assert connection.transport.get_write_buffer_size() < 1 << 20  # all but that is in the kernel's hands
            connection.check(server.loop.time() + 100.0)
            assert not cancelled.is_set()
            connection.check(server.loop.time() + 121.0)
            await cancelled.wait()
    finally:
        client.close()
        await server.stop()


class Unread(Memory):
    """A connection whose client leaves the rest of its answer unread."""

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.protocol.connection_lost(None)


@pytest.mark.parametrize("asked", [LAST, get(b"/x")])
async def test_who_never_reads_the_rest_of_a_last_answer_is_waited_for_only_so_long(asked: bytes) -> None:
    server = Server(in_tasks(Echo()), HttpLimits(write_timeout_s=20.0, idle_timeout_s=5.0))
    unread = Unread(ServerProtocol(server))
    await unread.send(asked)
    await unread.settle()
    now = server.loop.time()
    unread.protocol.check(now + 6.0)  # closes what is idle
    assert unread.closing
    unread.protocol.check(now + 19.0)
    assert server.connections
    unread.protocol.check(now + 21.0)
    assert not server.connections


async def test_a_client_that_reads_again_is_written_to_again() -> None:
    states: asyncio.Queue[bool] = asyncio.Queue()

    async def pour(exchange: Exchange) -> None:
        exchange.on_pause = states.put_nowait
        exchange.start(200, b"")
        while states.empty():
            exchange.write(b"x" * 65536)
            await asyncio.sleep(0)
        assert await states.get() is True
        assert await states.get() is False
        exchange.write(b"end")
        exchange.finish()

    server = await serving_with(pour)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    try:
        writer.write(get(b"/x", b"Connection: close"))
        (connection,) = [c async for c in _connections(server)]
        async with asyncio.timeout(10):
            while not connection.stalled:
                await asyncio.sleep(0.002)
            (answer,) = answers_in(await reader.read())
        assert answer.body.endswith(b"xend")
    finally:
        writer.close()
        await server.stop()


async def _connections(server: Server):  # type: ignore[no-untyped-def]
    async with asyncio.timeout(10):
        while not server.connections:
            await asyncio.sleep(0.002)
    for connection in server.connections:
        yield connection


async def test_who_asks_and_asks_but_never_reads_is_not_answered_into_memory() -> None:
    answered = 0

    async def large(exchange: Exchange) -> None:
        nonlocal answered
        answered += 1
        exchange.respond(200, b"x" * 100_000)

    server = await serving_with(large)
    client = socket.create_connection(("127.0.0.1", server.port))
    client.setblocking(False)
    request = get(b"/x", b"X: " + b"a" * 300)  # few enough in one packet
    try:
        (connection,) = [c async for c in _connections(server)]
        async with asyncio.timeout(20):
            ahead = b""
            while not connection.stalled or connection._reading:
                ahead = ahead or request
                with contextlib.suppress(BlockingIOError):
                    ahead = ahead[client.send(ahead) :]
                await asyncio.sleep(0)
        assert connection.transport is not None
        assert connection.transport.get_write_buffer_size() < 1 << 20
        before = answered
        for _ in range(100):
            await asyncio.sleep(0)
        assert answered == before
        # What was read ahead is answered once the client reads.
        reader, writer = await asyncio.open_connection(sock=client)
        async with asyncio.timeout(20):
            while answered == before:
                await reader.read(1 << 20)
        writer.close()
    finally:
        client.close()
        await server.stop()


# Clients that leave


@pytest.mark.parametrize("how", ["close", "half", "reset"])
async def test_a_client_that_leaves_cancels_what_is_done_for_it_at_once(how: str) -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/hold") + NEXT)
        await s.echo.began.wait()
        if how == "half":
            client.writer.write_eof()
        elif how == "reset":
            client.writer.transport.abort()
        else:
            client.writer.close()
        async with asyncio.timeout(10):
            await s.echo.cancelled.wait()
        await s.until(lambda: not s.server.connections)
        assert len(s.echo.asked) == 1


async def test_a_client_that_leaves_after_a_long_body_is_noticed() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(post(b"/hold", b"x" * 200_000))
        await s.echo.began.wait()
        client.writer.close()
        async with asyncio.timeout(10):
            await s.echo.cancelled.wait()


async def test_a_client_that_leaves_in_the_middle_of_its_request_was_never_there() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/x", b"Content-Length: 5", method=b"POST") + b"ab")
        client.writer.write_eof()
        assert await client.rest() == []
        assert not s.echo.asked


# Keep-alive, HTTP/1.0, framing


async def test_a_connection_carries_requests_until_one_closes_it() -> None:
    async with listening() as s:
        client = await s.connect()
        for _ in range(3):
            await client.send(get(b"/x"))
            (answer,) = await client.answers(1)
            assert "connection" not in answer.headers
        await client.send(get(b"/x", b"Connection: close"))
        (answer,) = await client.rest()
        assert answer.headers["connection"] == "close"


async def test_http_1_0_closes_unless_it_is_asked_to_stay() -> None:
    async with listening() as s:
        (answer,) = await s.ask(get(b"/x", version=b"1.0"))
        assert answer.headers["connection"] == "close"
        client = await s.connect()
        await client.send(get(b"/x", b"Connection: keep-alive", version=b"1.0"))
        (answer,) = await client.answers(1)
        assert answer.headers["connection"] == "keep-alive"
        await client.send(get(b"/x", version=b"1.0"))
        assert len(await client.rest()) == 1


async def test_http_1_0_gets_a_stream_without_chunks_that_ends_with_the_connection() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/stream", b"Connection: keep-alive", version=b"1.0"))
        async with asyncio.timeout(10):
            head, _, body = (await client.reader.read()).partition(b"\r\n\r\n")
        assert body == b"data: a\n\ndata: b\n\n"
        assert b"transfer-encoding" not in head
        assert b"connection: close" in head


async def test_http_1_1_gets_a_stream_in_chunks_and_may_ask_again() -> None:
    async with listening() as s:
        stream, last = await s.ask(get(b"/stream") + LAST)
        assert stream.body == b"data: a\n\ndata: b\n\n"
        assert stream.headers["transfer-encoding"] == "chunked"
        assert last.status == 200


async def test_an_answer_to_head_has_no_body() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/x", method=b"HEAD") + get(b"/refuse", method=b"HEAD") + LAST)
        async with asyncio.timeout(10):
            text = (await client.reader.read()).decode()
        first, second, third, body = text.split("\r\n\r\n")
        assert "content-length: 26" in first
        assert "404" in second
        assert third.startswith("HTTP/1.1 200")
        assert json.loads(body)["path"] == "/last"


async def test_leave_to_send_the_body_is_given_when_it_is_its_turn() -> None:
    async with listening() as s:
        client = await s.connect()
        head = get(b"/x", b"Content-Length: 3", b"Expect: 100-continue", method=b"POST")
        async with asyncio.timeout(10):
            await client.send(head)
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(b"abc")
            await client.answers(1)
            await client.send(get(b"/hold") + head)
            await s.echo.began.wait()
            s.echo.hold.set()
            await client.reader.readuntil(b'"body": ""}')
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(b"abc")
            (answer,) = await client.answers(1)
        assert json.loads(answer.body)["body"] == "abc"


async def test_http_1_0_is_not_told_to_continue() -> None:
    async with listening() as s:
        client = await s.connect()
        await client.send(get(b"/x", b"Content-Length: 3", b"Expect: 100-continue", version=b"1.0"))
        await client.send(b"abc")
        async with asyncio.timeout(10):
            assert (await client.reader.read()).startswith(b"HTTP/1.1 200")


async def test_a_bug_in_the_handler_is_500_and_the_connection_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as s:
        broken, last = await s.ask(get(b"/raise", b"Authorization: Bearer secret-key") + LAST)
        assert broken.status == 500
        assert broken.error["code"] == "internal_error"
        assert "a bug" not in broken.body.decode()
        assert last.status == 200
    assert "secret-key" not in caplog.text
    assert caplog.records[0].levelno == logging.ERROR


# X-Request-Id


@pytest.mark.parametrize("given_", [b"abc", b"a" * 128, b'{"q":1}', b"0af7651916cd43dd-8448eb211c80319c"])
async def test_a_clients_request_id_is_kept(given_: bytes) -> None:
    async with listening() as s:
        (answer,) = await s.ask(get(b"/x", b"X-Request-Id: " + given_, b"Connection: close"))
        assert answer.headers["x-request-id"] == given_.decode()


@pytest.mark.parametrize("given_", [b"", b"a" * 129, b"a b", b"\xff", b"a\tb"])
async def test_a_request_id_that_could_confuse_is_replaced(given_: bytes) -> None:
    async with listening() as s:
        (answer,) = await s.ask(get(b"/x", b"X-Request-Id: " + given_, b"Connection: close"))
        made = answer.headers["x-request-id"]
        assert made.isprintable()
        assert len(made) == 21


async def test_two_request_ids_are_none() -> None:
    async with listening() as s:
        answers = await s.ask(get(b"/x", b"X-Request-Id: a", b"X-Request-Id: b") + get(b"/x") + LAST)
        assert len({a.headers["x-request-id"] for a in answers}) == 3
        assert not any(a.headers["x-request-id"].startswith("a") for a in answers if len(a.headers["x-request-id"]) < 9)


# Stopping


async def test_stopping_ends_idle_connections_at_once_and_busy_ones_with_their_answer() -> None:
    async with listening() as s:
        idle, busy = await s.connect(), await s.connect()
        await busy.send(get(b"/hold"))
        await s.echo.began.wait()
        await s.until(lambda: len(s.server.connections) == 2)
        s.server.stop_listening()
        assert await idle.rest() == []
        s.echo.hold.set()
        (answer,) = await busy.rest()
        assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_an_answer_that_is_still_being_read_is_waited_for() -> None:
    size = 32 << 20

    async def answer(exchange: Exchange) -> None:
        exchange.respond(200, b"a" * size)

    server = Server(in_tasks(answer))
    await server.start(host="127.0.0.1", port=0)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(get(b"/x"))
        head = await reader.readuntil(b"\r\n\r\n")
        server.stop_listening()
        written = asyncio.create_task(server.written())
        await asyncio.sleep(0)
        assert not written.done()
        assert len(await reader.readexactly(size)) == size
        async with asyncio.timeout(10):
            await written
        assert head.startswith(b"HTTP/1.1 200")
    finally:
        writer.close()
        await server.stop()


async def test_one_connection_that_cannot_be_looked_at_spares_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("steersman.runtime.gateway.http.server._SWEEP_S", 0.001)
    looked = asyncio.Event()

    class Odd(ServerProtocol):
        def check(self, now: float) -> None:
            raise RuntimeError("the handler is closed")

    class Watched(ServerProtocol):
        def check(self, now: float) -> None:
            if len(server.connections) == 1:
                looked.set()

    async with listening() as it:
        server = it.server
        server.connections |= {Odd(server), Watched(server)}
        async with asyncio.timeout(10):
            await looked.wait()
    assert "could not be looked at" in caplog.text


async def test_what_was_refused_is_counted_by_status() -> None:
    async with listening() as s:
        await s.ask(b"nonsense\r\n\r\n")
        await s.ask(get(b"/x", version=b"2.0"))
        samples = [m.samples for m in http_metrics(len(s.server.connections), s.server.rejected)]
        assert [(x.name, x.labels) for x in samples[0]] == [("steersman_connections", {})]
        assert {x.labels["status"]: x.value for x in samples[1]} == {"400": 1, "505": 1}


# Any split, any bytes

REQUESTS = [
    get(b"/a"),
    post(b"/b", b"hello"),
    post(b"/c", b""),
    chunked(b"3\r\nabc\r\n", b"a;x=y\r\n0123456789\r\n", b"0\r\nX: t\r\n\r\n"),
    get(b"/stream"),
    get(b"/refuse"),
    get(b"/x", b"Connection: keep-alive", version=b"1.0"),
    get(b"/stream", version=b"1.0"),
    get(b"/x", b"Connection: close"),
    get(b"/x", method=b"PUT"),
    get(b"/x", b"X-Request-Id: mine", b"Accept: a", b"Accept: b"),
    post(b"/x", b"y" * 3000),
    get(b"/x", b"X: " + b"a" * 3000),
    *list(SMUGGLED.values())[::4],
]


async def answered(pieces: list[bytes]) -> tuple[list[tuple[int, bytes]], bool, list[tuple[bytes, bytes, bytes]]]:
    """What comes back for bytes that arrive in `pieces`; whether the connection was closed; what was asked."""
    echo = Echo()
    echo.hold.set()
    server = Server(in_tasks(echo), HttpLimits(head_bytes=2000, body_bytes=2000))
    wire = Memory(ServerProtocol(server))
    for piece in pieces:
        await wire.send(piece)
    await wire.settle()
    closed = wire.closing
    wire.close()
    await asyncio.sleep(0)
    raw = bytes(wire.out)
    return _answers(raw, closed), closed, echo.asked


def _answers(raw: bytes, closed: bool) -> list[tuple[int, bytes]]:
    """Taken apart by hand, for an answer to HTTP/1.0 ends with the connection."""
    found: list[tuple[int, bytes]] = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if b"content-length" in lines:
            length = int(lines[b"content-length"])
            assert len(raw) >= length
            body, raw = raw[:length], raw[length:]
        elif b"transfer-encoding" in lines:
            body = b""
            while True:
                size, _, raw = raw.partition(b"\r\n")
                body, raw = body + raw[: int(size, 16)], raw[int(size, 16) + 2 :]
                if size == b"0":
                    break
        else:
            assert closed
            body, raw = raw, b""
        if status >= 400:
            assert set(json.loads(body)) == {"error"}
        found.append((status, body))
    return found


def test_a_head_in_two_reads_behind_another_request_is_measured_in_full() -> None:
    stream = get(b"/a") + get(b"/x", b"X: " + b"a" * 3000)
    answers, _, _ = asyncio.run(answered([stream[:1500], stream[1500:]]))
    assert [status for status, _ in answers] == [200, 431]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=6), st.data())
@example([get(b"/a"), get(b"/bad", b"X: a\0"), get(b"/a")], None)
def test_answers_do_not_depend_on_how_the_bytes_are_cut(requests: list[bytes], data: st.DataObject | None) -> None:
    stream = b"".join(requests)
    if data is None:
        pieces = [stream[i : i + 1] for i in range(len(stream))]
    else:
        places = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
        pieces = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
    whole = asyncio.run(answered([stream]))
    assert asyncio.run(answered(pieces)) == whole


TOKENS = st.sampled_from(
    (
        b"GET |POST |/a| HTTP/1.1|HTTP/1.0|\r\n|\r\n\r\n|\n|\r|:| |\0|;|,|3|close|\xff|Host: a\r\n|Content-Length: |"
        b"Content-Length: 5\r\n|Transfer-Encoding: chunked\r\n|0\r\n\r\n|5\r\nabcde\r\n|Connection: |Upgrade: h2c\r\n|"
        b"Expect: 100-continue\r\n"
    ).split(b"|")
)
NOISE = st.one_of(
    st.binary(max_size=300),
    st.lists(TOKENS, max_size=40).map(b"".join),
    st.tuples(st.sampled_from(REQUESTS), st.integers(0, 10_000), st.binary(min_size=1, max_size=4)).map(
        lambda t: t[0][: t[1] % len(t[0])] + t[2] + t[0][t[1] % len(t[0]) + 1 :]
    ),
)


@settings(deadline=None, max_examples=1000)
@given(st.lists(NOISE, min_size=1, max_size=4))
def test_noise_is_answered_in_the_apis_form_or_not_at_all(pieces: list[bytes]) -> None:
    answers, closed, _ = asyncio.run(answered(pieces))
    assert all(status != 500 for status, _ in answers)
    refused = [i for i, (status, _) in enumerate(answers) if status not in (200, 404)]
    if refused:  # nothing is answered after what cannot be read
        assert refused == [len(answers) - 1]
        assert closed


def test_an_answers_parts() -> None:
    """The tests' own reader of answers."""
    assert answers_in(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na") == [Answer(200, {"content-length": "1"}, b"a")]
