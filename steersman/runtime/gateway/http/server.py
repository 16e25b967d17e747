"""The server's side: connections become `Exchange`s, one request and the way to answer it each.

Requests of one connection are answered in order. A client that leaves cancels what is done for it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any

from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.http.protocol import ServerProtocol

_BACKLOG_CONNECTIONS = 1024  # that wait to be accepted: asyncio's 100 would make thousands that come at once try again
_SWEEP_S = 1.0  # between two looks at who is too slow
_WRITTEN_S = 0.02  # between two looks at whether all is written
_LATE_S = 2.5  # since the last look: this process stood still, and has not read yet what came meanwhile
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


Step = Callable[[], None]
Handler = Callable[[Exchange], Step | None]


class Server:
    """What all connections share: the handler, the limits, and one look a second at who is too slow."""

    def __init__(self, handler: Handler, limits: HttpLimits | None = None) -> None:
        """handler: called with each exchange; sees to it that it is answered, and `over`. It may not block.

        It may return the next step, which is called once all requests that came together have been begun.
        """
        self.handler = handler
        self.on_over: Callable[[Exchange], object] | None = None  # told when an exchange is over
        self.limits = limits or HttpLimits()
        self.connections: set[ServerProtocol] = set()
        self.closing = False
        self.loop = asyncio.get_running_loop()
        self.rejected: dict[int, int] = {}  # answers given before any handler saw a request, by status
        self._ready: list[ServerProtocol] = []
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
        for connection in list(self.connections):
            connection.abort()
            connection.left()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        if self._listener is not None:
            await self._listener.wait_closed()

    def begin_soon(self, connection: ServerProtocol) -> None:
        """Begin with a connection's next request once all that has come is read.

        Many in a row take a tenth less processor time than each between others' answers: code is still in the caches.
        """
        if not self._ready:
            self.loop.call_soon(self._begin)
        self._ready.append(connection)

    def _begin(self) -> None:
        ready, self._ready = self._ready, []
        steps = [connection.begin() for connection in ready]
        for step in steps:
            if step is not None:
                step()

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
