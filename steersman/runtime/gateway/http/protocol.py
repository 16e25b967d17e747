"""One connection of a client: its bytes become `Exchange`s, which are answered in order."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

import httptools

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.http.exchange import Exchange

if TYPE_CHECKING:
    from steersman.runtime.gateway.http.server import Server, Step

_BACKLOG_BYTES = 64 << 10  # that a client may send ahead before its current request is answered
_BACKLOG_REQUESTS = 32
_FLOOD_REQUESTS = 1024  # that came at once: not even the rest of what was read is looked at
_CHUNK_BYTES = 24  # of framing that a chunk needs; more of it (extensions, trailers) counts against the head's limit
_PIECES = 64  # of a body that are kept as they came; the rest in one, for a million of them take 20 times their bytes
_LINGER_S = 2.0  # that what a refused client still sends is read and dropped, so that it can read why
_REFUSED_CONNECTIONS = 1000  # over the limit that are told so; the others are only closed
_log = logging.getLogger("steersman.gateway")


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
        "_read_bytes",
        "_reading",
        "_refusal",
        "_refused",
        "_shared_bytes",
        "_since",
        "_stalled_at",
        "_tail_bytes",
        "_target",
        "_version",
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
        self._read_bytes = 0  # at last
        self._version = ""  # of HTTP
        self._ahead_bytes = 0  # that came while a request was being answered
        self._refused = False  # something cannot be handled: nothing more is read
        self._refusal: ApiError | None = None  # that is still to be answered
        self._clear()

    def _clear(self) -> None:
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._fields = self._body_bytes = self._tail_bytes = self._chunks = 0
        self._head_bytes = 0  # that came in reads which began within the head
        self._shared_bytes = 0  # that came in the read in which it began behind another request
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
        self.left()

    def left(self) -> None:
        """The client is gone, and what it asked need not be done."""
        self._queue.clear()
        if self.current is not None:
            self.current.left()

    def eof_received(self) -> None:
        """A client that closes its side has left: what is done for it is cancelled."""
        waits = bool(self._queue) if self.current is None else not self.current.done
        if self.transport is not None and waits:
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
    def busy(self) -> bool:
        """Whether a request is being answered, or waits for that."""
        return self.current is not None or bool(self._queue)

    @property
    def _more(self) -> bool:
        """Whether more was read than the request that is the next to be answered."""
        return len(self._queue) > 1 or (bool(self._queue) and self._head_bytes > 0)

    @property
    def closing(self) -> bool:
        """Whether it ends once the client has read the rest of its answer."""
        return self.transport is not None and self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        was_busy = self.busy
        self._read_bytes = len(data)
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._tail_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request itself was read: it is answered as if it asked for nothing else.
            self._refused = self._queue[-1][0].close = True
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
        if self._queue and self.current is None:
            self.server.begin_soon(self)
        if not self._refused and (was_busy or self._more):
            # No sooner: while nothing is read, a client that leaves is not noticed.
            self._ahead_bytes += len(data)
            if self._ahead_bytes > _BACKLOG_BYTES or len(self._queue) > _BACKLOG_REQUESTS:
                self._pause_reading()

    # From the parser

    def on_message_begin(self) -> None:
        if len(self._queue) - (self.current is None) >= _FLOOD_REQUESTS:
            raise _Refusal(400, f"more than {_FLOOD_REQUESTS} requests were sent ahead of their answers")
        self._since = self.server.loop.time()
        if not self._head_bytes:  # it stands behind another one in what was read
            self._head_bytes, self._shared_bytes = 1, self._read_bytes

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
        if self._head_bytes + self._shared_bytes > limits.head_bytes and self._head_size() > limits.head_bytes:
            raise _Refusal(431, f"the head is larger than {limits.head_bytes} bytes")
        if self._fields > limits.header_fields:
            raise _Refusal(431, f"there are more than {limits.header_fields} header fields")
        version = self._version = self._parser.get_http_version()
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

    def _head_size(self) -> int:
        headers = self._headers
        return len(self._target) + sum(map(len, headers)) + sum(map(len, headers.values())) + 4 * len(headers)

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
        old = self._version == "1.0"
        self._clear()
        self._queue.append((exchange, old))

    # Exchanges

    def begin(self) -> Step | None:
        """Begin with the next request, if it may be begun now. Returns the next step, if there is one."""
        if not self._queue or self.current is not None or self._stalled_at or self._gone:
            return None
        exchange, self.old = self._queue.popleft()
        self.current = exchange
        if self.server.closing:
            exchange.close = True
        try:
            return self.server.handler(exchange)
        except Exception:
            exchange.broken()
            return None

    @property
    def _gone(self) -> bool:
        """Whether nothing that is written now would reach the client."""
        return self.transport is None or self.transport.is_closing()

    def over(self, exchange: Exchange) -> None:
        """All that comes of an exchange was written."""
        if exchange is not self.current:
            return
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
            self.server.begin_soon(self)
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
        elif self.busy or self._refusal is not None:
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
        elif self._in_head and not self._head_bytes and not self._queue:  # else a request is coming in
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
