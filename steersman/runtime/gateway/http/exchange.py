"""One request of a client, and the way to answer it."""

from __future__ import annotations

import http
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from steersman.runtime.gateway.errors import ApiError, internal_error
from steersman.runtime.log import named

if TYPE_CHECKING:
    from steersman.runtime.gateway.http.protocol import ServerProtocol

_NAME_LIMIT = 128  # characters of a client's own X-Request-Id
_REASONS = {int(s): s.phrase for s in http.HTTPStatus}
_JSON = b"application/json"
_log = logging.getLogger("steersman.gateway")


class Exchange:
    """One request, read in full, and the way to answer it.

    Header names are in lower case; fields that came more than once are joined by commas. Whoever answers it says so
    with `over`, once.
    """

    __slots__ = (
        "body",
        "close",
        "code",
        "done",
        "headers",
        "method",
        "on_leave",
        "on_pause",
        "path",
        "protocol",
        "query",
        "request_id",
        "started",
        "status",
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
        self.on_leave: Callable[[], None] | None = None  # told when the client leaves before all is written
        given = headers.get(b"x-request-id")
        self.request_id = given if given and _is_name(given) else protocol.server.new_id()

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

    def over(self) -> None:
        """Nothing more comes of it: the connection goes on, or ends where the answer is not whole."""
        self.protocol.over(self)

    def left(self) -> None:
        """The client is gone: who works on its answer is told."""
        if self.on_leave is not None and not self.done:
            on_leave, self.on_leave = self.on_leave, None
            on_leave()

    def broken(self) -> None:
        """Call where an exception was caught that is a bug of ours: it is logged, and the client told if it can be."""
        request_id = self.request_id.decode()
        _log.exception("request %s failed", request_id, extra=named("request_failed", {"request_id": request_id}))
        if not self.started:
            self.fail(internal_error())
        self.over()

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
    return len(text) <= _NAME_LIMIT and text.isascii() and text.decode().isprintable() and b" " not in text
