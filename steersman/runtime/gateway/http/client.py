"""The client's side: one connection to a replica, used again and again.

A `Receiver` is told of the answer as it comes: its head, pieces of its body, its end, or that it broke off.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

import httptools

if TYPE_CHECKING:
    from steersman.runtime.gateway.http.upstream import Upstream

_HEAD_LIMIT = 64 << 10
_log = logging.getLogger("steersman.gateway")


class Broken(Exception):
    """No answer, or not all of it. The message says why.

    stale: a connection that had been used before ended without a byte of the answer: the server may have closed
    it just as the request went out.
    """

    def __init__(self, message: str, stale: bool = False) -> None:
        super().__init__(message)
        self.stale = stale


class Receiver(Protocol):
    """Who is told of an answer."""

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Names in lower case, without those of the connection itself."""
        ...

    def data(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def broke(self, error: Broken) -> None: ...


_OF_THE_CONNECTION = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


class Connection(asyncio.Protocol):
    """One connection to a replica; one request at a time."""

    __slots__ = (
        "_body",
        "_complete",
        "_head_bytes",
        "_headers",
        "_keeps",
        "_parser",
        "_paused",
        "_receiver",
        "_status",
        "_until_close",
        "_used",
        "idle_since",
        "last_byte_s",
        "loop",
        "transport",
        "upstream",
    )

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self.last_byte_s = 0.0  # when something last came, or the request went out
        self._used = self._paused = False
        self._body: list[bytes] = []  # of what was read last
        self._receiver: Receiver | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._complete = False  # the answer is, or none is owed
        self._keeps = False  # the server keeps the connection
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._status = 0
        self._until_close = False

    @property
    def usable(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def send(self, request: bytes, body: bytes, receiver: Receiver) -> None:
        """Send a request; `receiver` is told of the answer."""
        assert self.transport is not None
        self._receiver, self._complete = receiver, False
        self._headers, self._head_bytes, self._status = [], 0, 0
        self.last_byte_s = self.loop.time()
        if len(body) < 16384:
            self.transport.write(request + body)
        else:
            self.transport.writelines((request, body))

    def abort(self) -> None:
        """Give up the answer: the replica sees the connection close. The receiver is not told."""
        self._receiver = None
        if self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        if self.usable and self.transport is not None:
            self.transport.close()

    def pause(self, paused: bool) -> None:
        """Read no further while the client cannot keep up."""
        if paused and self._receiver is None:  # its answer has ended: it belongs to the next request
            return
        if self.transport is not None and not self.transport.is_closing():
            self.last_byte_s = self.loop.time()
            self._paused = paused
            if paused:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def check(self, now: float, read_timeout_s: float) -> None:
        """Break off an answer of which nothing has come for too long."""
        if self._receiver is not None and not self._paused and now - self.last_byte_s > read_timeout_s:
            self.break_off("no answer in time")

    def break_off(self, why: str) -> None:
        """End it; who waits for an answer is told."""
        self._broke(why)
        self.abort()

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.upstream.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.upstream.open.discard(self)
        if self._receiver is None:
            return
        if exc is None and self._status and self._until_close:
            self._end(False)  # a body without a stated length ends with its connection
        else:
            self._broke("the connection broke", stale=self._used and not self._head_bytes)

    def data_received(self, data: bytes) -> None:
        if self._receiver is None:  # nobody asked for it
            self.abort()
            return
        self.last_byte_s = self.loop.time()
        if not self._status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._odd(error)
        else:
            if self._body:
                self._pass_on()
            # Not while the parser is at work: the next request may be sent at once.
            if self._complete:
                self._end(self._keeps)
            elif not self._status and self._head_bytes > _HEAD_LIMIT:
                self.break_off("the head of its answer is too large")

    def _odd(self, error: Exception) -> None:
        """What came is not an answer, or more than it."""
        if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(error.__context__, Broken):
            _log.error("the gateway failed on an answer", exc_info=error.__context__)
        self._pass_on()
        if self._complete:
            self._end(False)
        else:
            self.break_off(f"its answer is not valid HTTP ({error})")

    # From the parser

    def on_message_begin(self) -> None:
        if self._complete:
            raise Broken("it sent more than its answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._status:  # else a trailer
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer: the real one follows
            self._headers = []
            return
        self._status = status
        names = [name for name, _ in self._headers]
        self._until_close = b"content-length" not in names and b"transfer-encoding" not in names
        if self._receiver is not None:
            self._receiver.head(status, [h for h in self._headers if h[0] not in _OF_THE_CONNECTION])

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._status:
            self._complete, self._keeps = True, self._parser.should_keep_alive()

    def _pass_on(self) -> None:
        """What one read held goes on as one piece, however many chunks it came in: a write each would cost more."""
        body = self._body
        if body:
            self._body = []
            if self._receiver is not None:
                self._receiver.data(body[0] if len(body) == 1 else b"".join(body))

    def _end(self, keeps: bool) -> None:
        receiver, self._receiver = self._receiver, None
        if self.transport is not None:
            if receiver is not None and keeps and not self._until_close:
                self.idle_since = self.loop.time()
                self._used = True
                if self._paused:
                    self.pause(False)
                self.upstream.release(self)
            else:
                self.close()
        if receiver is not None:
            receiver.end()

    def _broke(self, message: str, stale: bool = False) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.broke(Broken(message, stale))
