"""The server's side: connections become `Exchange`s, one request and the way to answer it each.

Requests of one connection are answered in order. A client that leaves cancels what is done for it.
"""

from __future__ import annotations

import asyncio
import http
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import httptools
from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.log import named

_BACKLOG_CONNECTIONS = 1024  # that wait to be accepted: asyncio's 100 would make thousands that come at once try again
_BACKLOG_BYTES = 64 << 10  # that a client may send ahead before its current request is answered
_BACKLOG_REQUESTS = 32
_SWEEP_S = 1.0  # between two looks at who is too slow
_WRITTEN_S = 0.02  # between two looks at whether all is written
_LATE_S = 2.5  # since the last look: this process stood still, and has not read yet what came meanwhile
_FLOOD_REQUESTS = 1024  # that came at once: not even the rest of what was read is looked at
_NAME_LIMIT = 128  # characters of a client's own X-Request-Id
_CHUNK_BYTES = 24  # of framing that a chunk needs; more of it (extensions, trailers) counts against the head's limit
_PIECES = 64  # of a body that are kept as they came; the rest in one, for a million of them take 20 times their bytes
_LINGER_S = 2.0  # that what a refused client still sends is read and dropped, so that it can read why
_REFUSED_CONNECTIONS = 1000  # over the limit that are told so; the others are only closed
_REASONS = {int(s): s.phrase for s in http.HTTPStatus}
_JSON = b"application/json"
_log = logging.getLogger("steersman.gateway")


class HttpLimits(Model):
    """Bounds on what clients may send, and how slowly."""

    head_bytes: int = Field(default=32 << 10, ge=256, description="of the request line and all header fields")
    header_fields: int = Field(default=100, ge=1)
    body_bytes: int = Field(default=32 << 20, ge=1)
    head_timeout_s: float = Field(default=10.0, gt=0, description="from the first byte to the end of the head")
    body_timeout_s: float = Field(default=120.0, gt=0, description="from the end of the head to the end of the body")
    idle_timeout_s: float = Field(default=75.0, gt=0, description="between two requests of a connection")
    write_timeout_s: float = Field(default=120.0, gt=0, description="that a client may leave its answer unread")
    connections: int = Field(default=20_000, ge=1)


class Exchange:
    """One request, read in full, and the way to answer it.

    Header names are in lower case; fields that came more than once are joined by commas.
    """

    __slots__ = (
        "body",
        "close",
        "code",
        "done",
        "headers",
        "method",
        "on_pause",
        "path",
        "protocol",
        "query",
        "request_id",
        "started",
        "status",
        "task",
        "ticket",
    )

    def __init__(self, protocol: ServerProtocol, method: bytes, target: bytes, headers: dict[bytes, bytes]) -> None:
        self.protocol = protocol
        self.method = method
        self.path, _, self.query = target.partition(b"?")
        self.headers = headers
        self.body = b""
        self.close = False  # the connection ends with this answer
        self.started = False  # the answer's head was sent
        self.done = False
        self.status = 0  # of the answer, once its head was sent
        self.code = ""  # of the gateway's error, if that is the answer
        self.ticket: Any = None  # of the handler
        self.on_pause: Callable[[bool], None] | None = None  # told when the client reads slower, and when it caught up
        self.task: asyncio.Task[None] | None = None
        given = headers.get(b"x-request-id", b"")
        self.request_id = given if _is_name(given) else protocol.server.new_id()

    def respond(self, status: int, body: bytes, headers: bytes = b"", content_type: bytes = _JSON) -> None:
        """A whole answer. `headers` are further lines, each with its end."""
        if content_type:
            headers += b"content-type: " + content_type + b"\r\n"
        head = self._head(status, headers, len(body))
        self.protocol.put(head if self.method == b"HEAD" else head + body)
        self.done = True

    def start(self, status: int, headers: bytes, length: int | None = None) -> None:
        """The answer's head. `headers` are whole lines; `length` of the body, None where it is not known."""
        self.protocol.put(self._head(status, headers, length))

    def _head(self, status: int, headers: bytes, length: int | None) -> bytes:
        self.started, self.status = True, status
        protocol = self.protocol
        if length is not None:
            framing = b"content-length: %d\r\n" % length
            protocol.chunked = False
        elif protocol.old:
            framing, self.close, protocol.chunked = b"", True, False
        else:
            framing, protocol.chunked = b"transfer-encoding: chunked\r\n", True
        if self.close:
            framing += b"connection: close\r\n"
        elif protocol.old:
            framing += b"connection: keep-alive\r\n"
        return status_line(status) + headers + b"x-request-id: " + self.request_id + b"\r\n" + framing + b"\r\n"

    def write(self, data: bytes) -> None:
        """More of the body."""
        if data:
            self.protocol.put(b"%x\r\n%b\r\n" % (len(data), data) if self.protocol.chunked else data)

    def finish(self) -> None:
        """The end of the answer."""
        if self.protocol.chunked:
            self.protocol.put(b"0\r\n\r\n")
        self.done = True

    def fail(self, error: ApiError) -> None:
        """Answer with an error in the API's form."""
        self.code = error.code or ""
        lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in error.headers.items())
        self.respond(error.status, error.body(), lines.encode("latin-1", "replace"))


def status_line(status: int) -> bytes:
    """The first line of an answer."""
    line = _LINES.get(status)
    if line is None:
        line = _LINES[status] = f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}\r\n".encode()
    return line


_LINES: dict[int, bytes] = {}


def _is_name(text: bytes) -> bool:
    return 0 < len(text) <= _NAME_LIMIT and text.isascii() and text.decode().isprintable() and b" " not in text


Handler = Callable[[Exchange], Awaitable[None]]


class Server:
    """What all connections share: the handler, the limits, and one look a second at who is too slow."""

    def __init__(self, handler: Handler, limits: HttpLimits | None = None) -> None:
        """handler: answers an exchange; one that it leaves unfinished ends the connection."""
        self.handler = handler
        self.on_over: Callable[[Exchange], object] | None = None  # told when an exchange is over
        self.limits = limits or HttpLimits()
        self.connections: set[ServerProtocol] = set()
        self.closing = False
        self.loop = asyncio.get_running_loop()
        self.rejected: dict[int, int] = {}  # answers given before any handler saw a request, by status
        self._prefix, self._ids = secrets.token_hex(6).encode(), 0
        self._sweeper: asyncio.Task[None] | None = None
        self._listener: asyncio.Server | None = None

    async def start(self, **where: Any) -> None:
        """Listen; arguments as those of `loop.create_server`."""
        options: dict[str, Any] = {"backlog": _BACKLOG_CONNECTIONS, **where}
        if options.get("ssl") is not None:
            # Shutting down TLS includes writing what is left of an answer.
            limits = self.limits
            options |= {"ssl_handshake_timeout": limits.head_timeout_s, "ssl_shutdown_timeout": limits.write_timeout_s}
        self._listener = await self.loop.create_server(lambda: ServerProtocol(self), **options)
        self._sweeper = self.loop.create_task(self._sweep())

    @property
    def port(self) -> int:
        assert self._listener is not None
        return int(self._listener.sockets[0].getsockname()[1])

    def stop_listening(self) -> None:
        """Take no more connections; those that are idle end now, the others with their current answer."""
        self.closing = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self.connections):
            connection.wind_up()

    async def written(self) -> None:
        """Returns when no client is still reading its last answer."""
        while any(connection.closing for connection in self.connections):
            await asyncio.sleep(_WRITTEN_S)

    async def stop(self) -> None:
        """End every connection now."""
        self.stop_listening()
        tasks = [c.current.task for c in self.connections if c.current is not None and c.current.task is not None]
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        if self._listener is not None:
            await self._listener.wait_closed()

    def new_id(self) -> bytes:
        """A name for a request, unique among all processes."""
        self._ids += 1
        return b"%s-%08x" % (self._prefix, self._ids)

    async def _sweep(self) -> None:
        now, late = self.loop.time(), False
        while True:
            await asyncio.sleep(_SWEEP_S)
            before, now = now, self.loop.time()
            late = now - before >= _LATE_S and not late  # always late is no excuse
            if not late:
                for connection in list(self.connections):
                    self._check(connection, now)

    def _check(self, connection: ServerProtocol, now: float) -> None:
        try:
            connection.check(now)
        except Exception:  # of its transport: the others' time limits hold
            _log.exception("a connection could not be looked at, and is ended")
            self.connections.discard(connection)
            connection.abort()


class ServerProtocol(asyncio.Protocol):
    """One connection of a client."""

    __slots__ = (
        "_ahead_bytes",
        "_body",
        "_body_bytes",
        "_chunks",
        "_continue",
        "_fields",
        "_head_bytes",
        "_headers",
        "_in_head",
        "_limits",
        "_parser",
        "_queue",
        "_reading",
        "_refusal",
        "_refused",
        "_since",
        "_stalled_at",
        "_tail_bytes",
        "_target",
        "chunked",
        "current",
        "old",
        "server",
        "transport",
    )

    def __init__(self, server: Server) -> None:
        self.server = server
        self.transport: asyncio.Transport | None = None
        self.current: Exchange | None = None
        self.old = False  # the current request is HTTP/1.0
        self.chunked = False  # the current answer is
        self._limits = server.limits
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[tuple[Exchange, bool]] = deque()  # requests read ahead, and whether each is HTTP/1.0
        self._since = 0.0  # when the connection fell idle, or its request began to come in, or its head was over
        self._stalled_at = 0.0  # when the client stopped reading; 0: it reads
        self._reading = True
        self._ahead_bytes = 0  # that came while a request was being answered
        self._refused = False  # something cannot be handled: nothing more is read
        self._refusal: ApiError | None = None  # that is still to be answered
        self._clear()

    def _clear(self) -> None:
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._fields = self._head_bytes = self._body_bytes = self._tail_bytes = self._chunks = 0
        self._body: list[bytes | bytearray] = []
        self._in_head = True
        self._continue = False  # the client waits for leave to send the body

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._since = self.server.loop.time()
        self.server.connections.add(self)
        surplus = len(self.server.connections) - self._limits.connections
        if surplus > _REFUSED_CONNECTIONS:
            self.abort()
        elif surplus > 0:
            self._refuse(503, "too many connections are open; try again later", retry=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self.transport = None
        self._queue.clear()
        current = self.current
        if current is not None and current.task is not None and not current.done:
            current.task.cancel()

    def eof_received(self) -> None:
        """A client that closes its side has left: what is done for it is cancelled."""
        if self.transport is not None and self.current is not None and not self.current.done:
            self.transport.abort()

    def pause_writing(self) -> None:
        self._stalled_at = self.server.loop.time()
        if self.current is not None and self.current.on_pause is not None:
            self.current.on_pause(True)

    def resume_writing(self) -> None:
        self._stalled_at = 0.0
        if self.current is None:
            self._next()
        elif self.current.on_pause is not None:
            self.current.on_pause(False)

    @property
    def stalled(self) -> bool:
        """Whether the client reads slower than it is written to."""
        return self._stalled_at > 0.0

    @property
    def closing(self) -> bool:
        """Whether it ends once the client has read the rest of its answer."""
        return self.transport is not None and self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._tail_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (
            httptools.HttpParserUpgrade
        ):  # the request itself was read: it is answered as if it asked for nothing else
            self._refused = True
            asked = self._queue[-1][0] if self._queue else self.current
            if asked is not None:
                asked.close = True
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, _Refusal):
                self._refuse(*cause.args)
            else:
                self._refuse(400, f"this is not a valid HTTP/1.1 request: {error}")
        else:
            if self._in_head and self._head_bytes > self._limits.head_bytes:
                self._refuse(431, f"the head is larger than {self._limits.head_bytes} bytes")
            elif self._tail_bytes - self._body_bytes > self._limits.head_bytes + self._chunks * _CHUNK_BYTES:
                self._refuse(431, f"chunk extensions and trailers are larger than {self._limits.head_bytes} bytes")
            elif self._queue or self.current is not None:
                # No sooner: while nothing is read, a client that leaves is not noticed.
                self._ahead_bytes += len(data)
                if self._ahead_bytes > _BACKLOG_BYTES or len(self._queue) > _BACKLOG_REQUESTS:
                    self._pause_reading()

    # From the parser

    def on_message_begin(self) -> None:
        if len(self._queue) >= _FLOOD_REQUESTS:
            raise _Refusal(400, f"more than {_FLOOD_REQUESTS} requests were sent ahead of their answers")
        self._since = self.server.loop.time()
        self._head_bytes = self._head_bytes or 1

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer: nothing that it says counts here
            return
        name = name.lower()
        self._fields += 1
        if name not in self._headers:
            self._headers[name] = value
        elif name == b"host":
            raise _Refusal(400, "the header Host stands twice")
        elif name == b"authorization":
            raise _Refusal(400, "the header Authorization stands twice")
        else:
            self._headers[name] += b", " + value

    def on_headers_complete(self) -> None:
        limits, headers = self._limits, self._headers
        self._in_head = False
        size = len(self._target) + sum(map(len, headers)) + sum(map(len, headers.values())) + 4 * len(headers)
        if size > limits.head_bytes:
            raise _Refusal(431, f"the head is larger than {limits.head_bytes} bytes")
        if self._fields > limits.header_fields:
            raise _Refusal(431, f"there are more than {limits.header_fields} header fields")
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise _Refusal(505, f"HTTP/{version} is not spoken here; use HTTP/1.1")
        if version == "1.1" and b"host" not in headers:
            raise _Refusal(400, "the header Host is missing")
        if (coding := headers.get(b"transfer-encoding")) is not None:
            if version == "1.0":
                raise _Refusal(400, "HTTP/1.0 knows no Transfer-Encoding")
            if coding.lower() != b"chunked":
                raise _Refusal(501, "of Transfer-Encoding, only chunked is known here")
        if not self._target.startswith(b"/"):
            raise _Refusal(400, "the request's target must be a path")
        length = headers.get(b"content-length")
        if length is not None and int(length) > limits.body_bytes:
            raise _Refusal(413, f"the body is larger than {limits.body_bytes} bytes")
        if self._parser.should_upgrade() and (length or coding):  # its body would be read as the other protocol's
            raise _Refusal(400, "the connection cannot be upgraded here; send the request without Upgrade")
        if b"content-encoding" in headers and headers[b"content-encoding"].lower() != b"identity":
            raise _Refusal(415, "compressed bodies are not read here; send the body as it is")
        self._since = self.server.loop.time()
        if b"expect" in headers and version == "1.1":
            if headers[b"expect"].lower() != b"100-continue":
                raise _Refusal(417, "of Expect, only 100-continue is known here")
            self._continue = True
            if self.current is None and not self._queue:
                self._go_on()

    def on_chunk_header(self) -> None:
        self._chunks += 1

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            raise _Refusal(413, f"the body is larger than {self._limits.body_bytes} bytes")
        pieces = self._body
        if len(pieces) < _PIECES:
            pieces.append(body)
        elif len(pieces) == _PIECES:
            pieces.append(bytearray(body))
        else:
            pieces[_PIECES] += body

    def on_message_complete(self) -> None:
        parser = self._parser
        exchange = Exchange(self, parser.get_method(), self._target, self._headers)
        pieces = self._body
        exchange.body = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
        exchange.close = not parser.should_keep_alive()
        old = parser.get_http_version() == "1.0"
        self._clear()
        if self.current is None and not self._queue and not self._stalled_at:
            self._begin(exchange, old)
        else:
            self._queue.append((exchange, old))

    # Exchanges

    def _begin(self, exchange: Exchange, old: bool) -> None:
        self.current, self.old = exchange, old
        if self.server.closing:
            exchange.close = True
        exchange.task = self.server.loop.create_task(self._run(exchange))

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self.server.handler(exchange)
        except asyncio.CancelledError:  # the client left
            pass
        except Exception:
            request_id = exchange.request_id.decode()
            _log.exception(
                "request %s failed",
                request_id,
                extra=named("request_failed", {"request_id": request_id}),
            )
            if not exchange.started:
                exchange.fail(ApiError(500, "the gateway failed on this request", code="internal_error"))
        self._over(exchange)

    def _over(self, exchange: Exchange) -> None:
        self.current = None
        if self.server.on_over is not None:
            self.server.on_over(exchange)
        transport = self.transport
        if transport is None:
            return
        if not exchange.done:  # it broke off: the client must not take it for whole
            transport.abort()
        elif exchange.close:
            self._close()
        else:
            self._next()

    def _next(self) -> None:
        """What follows the last answer, once the client has read most of that."""
        transport = self.transport
        if transport is None or self._stalled_at:
            return
        if self._queue:
            self._begin(*self._queue.popleft())
        elif self._refused:
            self._send_refusal()
        elif self.server.closing:
            self._close()
        else:
            self._since, self._ahead_bytes = self.server.loop.time(), 0
            if self._continue:
                self._go_on()
            if not self._reading:
                self._reading = True
                transport.resume_reading()

    def _go_on(self) -> None:
        self._continue = False
        self.put(b"HTTP/1.1 100 Continue\r\n\r\n")

    def put(self, data: bytes) -> None:
        """Bytes to the client."""
        if self.transport is not None:
            self.transport.write(data)

    def _pause_reading(self) -> None:
        if self._reading and self.transport is not None:
            self._reading = False
            self.transport.pause_reading()

    def _refuse(self, status: int, message: str, retry: bool = False) -> None:
        """Answer what is not a request that can be handled, after what was asked before, and end the connection."""
        self._refused = True
        self.server.rejected[status] = self.server.rejected.get(status, 0) + 1
        self._refusal = ApiError(status, message, code="bad_request", headers={"Retry-After": "5"} if retry else None)
        self._clear()
        if self.current is None:
            self._next()

    def _send_refusal(self) -> None:
        error, self._refusal = self._refusal, None
        transport = self.transport
        if error is None or transport is None or transport.is_closing():
            return
        exchange = Exchange(self, b"", b"", {})
        exchange.close, self.old = True, False
        exchange.fail(error)
        if not transport.can_write_eof():  # TLS
            self._close()
            return
        # Closing with bytes unread resets the connection, and the client may lose the answer.
        transport.write_eof()
        self._since = self.server.loop.time()
        if not self._reading:
            self._reading = True
            transport.resume_reading()

    # Time

    def check(self, now: float) -> None:
        """Once a second: end what takes too long."""
        limits, transport = self._limits, self.transport
        if transport is None:
            return
        if self._stalled_at and now - self._stalled_at > limits.write_timeout_s:
            transport.abort()
        elif self.closing:
            if now - self._since > limits.write_timeout_s:
                transport.abort()
        elif self.current is not None or self._queue or self._refusal is not None:
            return
        elif self._refused:
            if now - self._since > _LINGER_S:
                transport.abort()
        elif not self._in_head:
            if now - self._since > limits.body_timeout_s:
                self._refuse(408, "the body did not come in time")
        elif self._head_bytes:
            if now - self._since > limits.head_timeout_s:
                self._refuse(408, "the head did not come in time")
        elif now - self._since > limits.idle_timeout_s:
            self._close()

    def wind_up(self) -> None:
        """The server takes no new requests."""
        if self.current is not None:
            self.current.close = True
        elif self._in_head and not self._head_bytes:  # else a request is coming in
            self._close()

    def _close(self) -> None:
        """End the connection once the client has all that was written to it."""
        self._since = self.server.loop.time()
        # Once only: asyncio's TLS transport cannot be aborted any more after a second close.
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Refusal(Exception):
    """Raised in a parser's callback: (status, message)."""
