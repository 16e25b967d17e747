"""One attempt on one replica: a request goes out, its answer comes back byte for byte, tokens are counted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.http.client import Broken, Connection
from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.http.upstream import Upstream
from steersman.runtime.gateway.prompt import Call
from steersman.runtime.gateway.retry_after import busy_s
from steersman.runtime.gateway.steps import step
from steersman.runtime.replica._stream import EventCounter, usage_of
from steersman.runtime.ticket import OVER, Ticket

if TYPE_CHECKING:
    from steersman.runtime.gateway.relay import Relay

_WHOLE_BYTES = 8 << 20  # of an answer that is kept, so that another replica may still be tried, before it is passed on
_OURS = frozenset((b"content-length", b"x-request-id", b"x-steersman-replica"))

Suspect = tuple[int, float]  # a replica, and when it was sent a request to which it gave 5xx


class AttemptFailed(Exception):
    """A replica failed before anything was sent to the client: another one may try."""

    def __init__(self, kind: str, message: str, busy_s: float | None = None) -> None:
        """busy_s: it is not broken, but asks to be left alone so long (429)."""
        super().__init__(message)
        self.kind = kind
        self.busy_s = busy_s


class Owner(Protocol):
    """Who is told what becomes of an attempt, once: of one of the three."""

    # Who gave 5xx to this request. A status may be the request's own fault: they count as failures once another replica
    # has a better answer for it.
    suspects: list[Suspect]

    def answered(self) -> None:
        """The client has all that it will get."""
        ...

    def failed(self, error: AttemptFailed) -> None:
        """It failed before the client got a byte."""
        ...

    def broken(self) -> None:
        """A bug of ours ended it; called where the exception was caught."""
        ...


class Attempt:
    """A request on its way to one replica; the `Receiver` of its answer."""

    __slots__ = (
        "_body",
        "_call",
        "_connecting",
        "_connection",
        "_counter",
        "_exchange",
        "_fresh",
        "_head",
        "_later",
        "_lines",
        "_over",
        "_owner",
        "_parts",
        "_relay",
        "_replica",
        "_sent",
        "_sent_s",
        "_size",
        "_status",
        "_ticket",
        "_upstream",
    )

    def __init__(self, relay: Relay, exchange: Exchange, call: Call, ticket: Ticket, owner: Owner) -> None:
        self._relay, self._exchange, self._call, self._ticket, self._owner = relay, exchange, call, ticket, owner
        self._replica = ticket.replica
        self._sent_s = relay.scheduler.now
        self._sent = False  # the replica may have seen it
        self._fresh = False  # on a connection that was made for it
        self._over = False
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._later: asyncio.Handle | None = None  # that tells the owner of a failure
        self._status = 0
        self._lines = b""
        self._counter: EventCounter | None = None  # of a stream
        self._parts: list[bytes] = []
        self._size = 0

    @step
    def start(self, upstream: Upstream, head: bytes, body: bytes) -> None:
        """Send it. The owner is told what comes of it."""
        self._upstream, self._head, self._body = upstream, head, body
        self._relay.attempts[self._replica].add(self)
        connection = upstream.idle()
        if connection is None:
            self._connect()
        else:
            self._send(connection)

    def _connect(self) -> None:
        self._fresh = True
        self._connecting = asyncio.get_running_loop().create_task(self._send_on_a_new_one())

    async def _send_on_a_new_one(self) -> None:
        try:
            connection = await self._upstream.connect()
            self._connecting = None
            self._send(connection)
        except Broken as error:
            self.broke(error)
        except Exception:
            self.broken()

    def _send(self, connection: Connection) -> None:
        self._connection, self._sent = connection, True
        self._exchange.on_pause = connection.pause
        connection.send(self._head, self._body, self)

    def give_up(self, why: str) -> None:
        """End it, if the client has nothing of it yet, so that another replica may try."""
        if not self._exchange.started:
            name = self._relay.pool.names[self._replica]
            self._fail(AttemptFailed("silent", f"{name}: {why}"))

    def cancel(self) -> None:
        """The client has left, or may wait no longer: the replica is told at once, and the owner nothing."""
        self._over = True
        if self._later is not None:
            self._later.cancel()
        self._end_here()

    def broken(self) -> None:
        """A bug of ours ended it; called where the exception was caught."""
        self.cancel()
        self._owner.broken()

    # From the connection

    @step
    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        name = self._relay.pool.names[self._replica]
        if status >= 500 or status == 429:
            wait_s = busy_s(headers) if status == 429 else None
            self._fail(AttemptFailed("busy" if status == 429 else "status", f"{name} gave status {status}", wait_s))
            return
        if status in (401, 403):  # a client's key never gets there: it is the gateway's own that is wrong
            self._fail(AttemptFailed("denied", f"{name} does not accept the gateway's key (status {status})"))
            return
        suspects = self._owner.suspects
        if suspects:
            for suspect, sent_s in suspects:
                self._relay.pool.failed(suspect, sent_s)
            suspects.clear()
        self._status = status
        lines = self._relay.named[self._replica]
        for key, value in headers:
            if key not in _OURS:
                lines += b"%b: %b\r\n" % (key, value)
                if key == b"content-type" and status == 200 and value.startswith(b"text/event-stream"):
                    self._counter = EventCounter()
        self._lines = lines

    @step
    def data(self, data: bytes) -> None:
        if self._over:
            return
        if self._counter is not None:
            self._event_bytes(self._counter, data)
        elif self._exchange.started:
            self._exchange.write(data)
        else:
            self._parts.append(data)
            self._size += len(data)
            if self._size > _WHOLE_BYTES:
                self._exchange.start(self._status, self._lines)
                self._exchange.write(b"".join(self._parts))
                self._parts.clear()

    def _event_bytes(self, counter: EventCounter, data: bytes) -> None:
        ticket, scheduler, exchange = self._ticket, self._relay.scheduler, self._exchange
        tokens = counter.feed(data)
        if counter.failed and not exchange.started:  # as if it had given that status
            name = self._relay.pool.names[self._replica]
            self._fail(AttemptFailed("status", f"{name} gave an error in place of a stream"))
            return
        if tokens:
            if not ticket.streamed:
                scheduler.first_token(ticket)
                tokens -= 1
            scheduler.streamed(ticket, tokens)
        if counter.done and ticket.stage is not OVER:
            # Before the client has it: one that leaves at [DONE] was served in full.
            if counter.failed:  # the replica lives, and the request may be at fault: it speaks for neither
                self._relay.metrics.error(self._replica, "status")
            else:
                self._relay.pool.answered(self._replica, self._sent_s)
            self._relay.over(ticket, self._call, "failed" if counter.failed else "done", counter.usage)
        if not exchange.started:
            exchange.start(200, self._lines)
            if exchange.protocol.stalled and self._connection is not None:
                self._connection.pause(True)
        exchange.write(data)

    @step
    def end(self) -> None:
        self._let_go()
        if self._over:
            return
        counter, exchange = self._counter, self._exchange
        if counter is None:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._relay.pool.answered(self._replica, self._sent_s)  # the head alone is no answer yet
            if exchange.started:
                exchange.finish()
            else:
                exchange.respond(self._status, body, self._lines, content_type=b"")
            self._over = True
            self._relay.count_soon(self._count, body)
        elif counter.done:
            exchange.finish()
            self._answered()
        else:
            self._cut("the stream ended early")

    @step
    def _count(self, body: bytes) -> None:
        """The client has the whole answer: it need not wait for what is done with it here."""
        ok = self._status == 200
        self._relay.over(self._ticket, self._call, "done" if ok else "rejected", usage_of(body) if ok else None)
        self._owner.answered()

    @step
    def broke(self, error: Broken) -> None:
        self._let_go()
        if self._over:
            return
        if self._status:
            self._cut(str(error))
        elif error.stale and not self._fresh:
            # It may have closed an idle connection just as the request went out: once more on a new one.
            self._relay.attempts[self._replica].add(self)
            self._connect()
        else:
            name = self._relay.pool.names[self._replica]
            self._fail(AttemptFailed("broke" if self._sent else "connect", f"{name}: {error}"))

    def _let_go(self) -> None:
        """The connection is free, and may have another request: nothing here may touch it."""
        self._connection = self._connecting = self._exchange.on_pause = None
        self._relay.attempts[self._replica].discard(self)

    def _end_here(self) -> None:
        connection, connecting = self._connection, self._connecting
        self._let_go()
        if connection is not None:
            connection.abort()
        elif connecting is not None:
            connecting.cancel()

    def _cut(self, problem: str) -> None:
        """The answer broke off after its head."""
        counter = self._counter
        if counter is not None and counter.done:  # all was said: how the connection ends says nothing more
            self._exchange.finish()
            self._answered()
            return
        relay, exchange = self._relay, self._exchange
        message = f"{relay.pool.names[self._replica]}: {problem}"
        if not exchange.started:
            self._fail(AttemptFailed("cut", message))
            return
        relay.pool.failed(self._replica, self._sent_s)
        relay.metrics.error(self._replica, "cut")
        relay.over(self._ticket, self._call, "failed", None)
        if counter is not None:
            # The status is sent already; clients of the API read an error event.
            event = ApiError(502, f"the answer broke off: {message}", code="replica_failed").body()
            exchange.write((b"\n\n" if counter.cut else b"") + b"data: " + event + b"\n\n")
            exchange.finish()
        self._answered()  # an answer that is not finished ends the client's connection

    def _answered(self) -> None:
        self._over = True
        self._owner.answered()

    def _fail(self, error: AttemptFailed) -> None:
        if not self._over:
            self._over = True
            # Later: the rest of its answer may have come as well, and its connection serve again.
            self._later = asyncio.get_running_loop().call_soon(self._failed, error)

    @step
    def _failed(self, error: AttemptFailed) -> None:
        self._later = None
        self._end_here()
        if error.busy_s is not None:
            self._relay.pool.cool(self._replica, error.busy_s)
        elif error.kind == "status":
            self._owner.suspects.append((self._replica, self._sent_s))
        else:
            self._relay.pool.failed(self._replica, self._sent_s)
        self._owner.failed(error)
