"""One attempt on one replica: a request goes out, its answer comes back byte for byte, tokens are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.http.client import Broken, Connection, Upstream
from steersman.runtime.gateway.http.server import Exchange
from steersman.runtime.gateway.metrics import Metrics
from steersman.runtime.gateway.prompt import Call, TokenEstimate
from steersman.runtime.gateway.rename import renamed
from steersman.runtime.gateway.retry_after import busy_s
from steersman.runtime.replica._pool import Pool
from steersman.runtime.replica._stream import EventCounter, Usage, usage_of
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Stage, Ticket

_WHOLE_BYTES = 8 << 20  # of an answer that is kept, so that another replica may still be tried, before it is passed on
_PASSED_ON = (b"accept", b"traceparent", b"tracestate", b"user-agent")  # of the client's headers; never its credentials
_LATE_S = 2.5  # after the last sweep: this process stood still, and has not read yet what came meanwhile
_OURS = frozenset((b"content-length", b"x-request-id", b"x-steersman-replica"))

Suspect = tuple[int, float]  # a replica, and when it was sent a request to which it gave 5xx
Over = Callable[[Ticket, Call, str, Usage | None], None]


class AttemptFailed(Exception):
    """A replica failed before anything was sent to the client: another one may try."""

    def __init__(self, kind: str, message: str, busy_s: float | None = None) -> None:
        """busy_s: it is not broken, but asks to be left alone so long (429)."""
        super().__init__(message)
        self.kind = kind
        self.busy_s = busy_s


class Relay:
    """Carries a dispatched request to its replica, and the answer back to the client."""

    def __init__(self, scheduler: Scheduler, pool: Pool, metrics: Metrics, over: Over) -> None:
        """over: called once for each request that a replica answered, or broke off answering."""
        self.scheduler = scheduler
        self.pool = pool
        self.metrics = metrics
        self.over = over
        self._upstreams: list[Upstream | None] = [None] * len(pool.replicas)
        self._urls = [""] * len(pool.replicas)
        self._fixed = [b""] * len(pool.replicas)  # header lines of every request to a replica
        self._attempts: list[set[Attempt]] = [set() for _ in pool.replicas]
        self._estimates: dict[tuple[int, int], TokenEstimate] = {}
        self._swept_s = 0.0

    def estimate(self, tenant: int, model: int) -> TokenEstimate:
        """How prompts of a tenant for a model turn into tokens, learnt from the answers."""
        key = (tenant, model)
        found = self._estimates.get(key)
        if found is None:
            found = self._estimates[key] = TokenEstimate()
        return found

    async def serve(
        self, exchange: Exchange, call: Call, ticket: Ticket, replica: int, suspects: list[Suspect]
    ) -> None:
        """One attempt on one replica.

        suspects: who gave 5xx to this request. A status may be the request's own fault: they count as failures once
        another replica has a better answer for it.

        Raises:
            AttemptFailed: it failed before the client got a byte.
        """
        upstream, body = self._upstream(replica), renamed(exchange.body, call, self.pool.replicas[replica].served_model)
        head = self._head(upstream, exchange, replica, len(body))
        loop, sent_s = asyncio.get_running_loop(), self.scheduler.now
        if not call.stream:
            self.scheduler.assume_first_token(ticket)
        try:
            fresh = False
            while True:
                attempt = Attempt(self, exchange, call, ticket, loop.create_future(), suspects)
                try:
                    await attempt.run(upstream, head, body, fresh)
                    return
                except Broken as error:
                    if error.stale and not fresh:
                        # It may have closed an idle connection just as the request went out: once more on a new one.
                        fresh = True
                        continue
                    kind = "broke" if attempt.sent else "connect"
                    raise AttemptFailed(kind, f"{self.pool.names[replica]}: {error}") from None
        except AttemptFailed as error:
            if error.busy_s is not None:
                self.pool.cool(replica, error.busy_s)
            elif error.kind == "status":
                suspects.append((replica, sent_s))
            else:
                self.pool.failed(replica, sent_s)
            raise

    def _upstream(self, replica: int) -> Upstream:
        target = self.pool.replicas[replica]
        upstream = self._upstreams[replica]
        if upstream is None or self._urls[replica] != target.base_url:  # an embedded engine was started anew
            if upstream is not None:
                upstream.close()
            upstream = self._upstreams[replica] = Upstream(target.base_url)
            self._urls[replica] = target.base_url
            self._fixed[replica] = b"host: " + upstream.authority + b"\r\naccept-encoding: identity\r\n"
            for name, value in target.headers.items():
                self._fixed[replica] += f"{name.lower()}: {value}\r\n".encode("latin-1")
        return upstream

    def _head(self, upstream: Upstream, exchange: Exchange, replica: int, length: int) -> bytes:
        headers = exchange.headers
        passed = b"".join(b"%b: %b\r\n" % (name, headers[name]) for name in _PASSED_ON if name in headers)
        return b"POST %b%b HTTP/1.1\r\n%b%bcontent-type: %b\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            upstream.prefix,
            exchange.path,
            self._fixed[replica],
            passed,
            headers.get(b"content-type", b"application/json"),
            exchange.request_id,
            length,
        )

    def attempting(self, attempt: Attempt, replica: int) -> set[Attempt]:
        attempts = self._attempts[replica]
        attempts.add(attempt)
        return attempts

    def went_down(self, replica: int) -> None:
        """A replica does not answer any more: what it owes the first byte of goes elsewhere."""
        for attempt in list(self._attempts[replica]):
            attempt.give_up("it does not answer any more")

    def sweep(self, now: float) -> None:
        """Call about once a second, with the loop's time."""
        late, self._swept_s = now - self._swept_s > _LATE_S, now
        if late:
            return
        well_s, down_s = self.pool.config.read_timeout_s, self.pool.config.down_timeout_s
        for upstream, health in zip(self._upstreams, self.pool.health, strict=True):
            if upstream is not None:
                upstream.sweep(now, well_s if health.healthy else min(well_s, down_s))

    def close(self) -> None:
        for upstream in self._upstreams:
            if upstream is not None:
                upstream.close()


class Attempt:
    """A request on its way to one replica; the `Receiver` of its answer."""

    __slots__ = (
        "_call",
        "_connection",
        "_counter",
        "_exchange",
        "_future",
        "_lines",
        "_parts",
        "_relay",
        "_replica",
        "_sent_s",
        "_size",
        "_status",
        "_stream",
        "_suspects",
        "_ticket",
        "sent",
    )

    def __init__(
        self,
        relay: Relay,
        exchange: Exchange,
        call: Call,
        ticket: Ticket,
        future: asyncio.Future[None],
        suspects: list[Suspect],
    ) -> None:
        self._relay, self._exchange, self._call, self._ticket = relay, exchange, call, ticket
        self._future, self._suspects = future, suspects
        self._replica = ticket.replica
        self._sent_s = relay.scheduler.now
        self.sent = False  # the replica may have seen it
        self._connection: Connection | None = None
        self._status = 0
        self._lines = b""
        self._stream = False
        self._counter = EventCounter()
        self._parts: list[bytes] = []
        self._size = 0

    async def run(self, upstream: Upstream, head: bytes, body: bytes, fresh: bool) -> None:
        """Send it, and return when the client has the answer.

        Raises:
            AttemptFailed: nothing was sent to the client, and another replica may try.
            Broken: there was no connection, or it ended before the answer began.
        """
        attempts = self._relay.attempting(self, self._replica)
        exchange = self._exchange
        try:
            connection = (None if fresh else upstream.idle()) or await upstream.connect()
            self._connection = connection
            self.sent = True
            exchange.on_pause = connection.pause
            connection.send(head, body, self)
            await self._future
        except BaseException:
            if self._connection is not None:
                self._connection.abort()
            raise
        finally:
            exchange.on_pause = None
            attempts.discard(self)

    def give_up(self, why: str) -> None:
        """End it, if the client has nothing of it yet, so that another replica may try."""
        if not self._exchange.started:
            name = self._relay.pool.names[self._replica]
            self._fail(AttemptFailed("silent", f"{name}: {why}"))

    # From the connection

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        name = self._relay.pool.names[self._replica]
        if status >= 500 or status == 429:
            wait_s = busy_s(headers) if status == 429 else None
            self._fail(AttemptFailed("busy" if status == 429 else "status", f"{name} gave status {status}", wait_s))
            return
        if status in (401, 403):  # a client's key never gets there: it is the gateway's own that is wrong
            self._fail(AttemptFailed("denied", f"{name} does not accept the gateway's key (status {status})"))
            return
        for suspect, sent_s in self._suspects:
            self._relay.pool.failed(suspect, sent_s)
        self._suspects.clear()
        self._status = status
        lines, stream = [b"x-steersman-replica: " + name.encode() + b"\r\n"], False
        for key, value in headers:
            if key not in _OURS:
                lines.append(b"%b: %b\r\n" % (key, value))
                if key == b"content-type" and status == 200 and value.startswith(b"text/event-stream"):
                    stream = True
        self._lines, self._stream = b"".join(lines), stream

    def data(self, data: bytes) -> None:
        if self._future.done():
            return
        if self._stream:
            self._event_bytes(data)
            return
        if self._exchange.started:
            self._exchange.write(data)
            return
        self._parts.append(data)
        self._size += len(data)
        if self._size > _WHOLE_BYTES:
            self._exchange.start(self._status, self._lines)
            self._exchange.write(b"".join(self._parts))
            self._parts.clear()

    def _event_bytes(self, data: bytes) -> None:
        counter, ticket, scheduler, exchange = self._counter, self._ticket, self._relay.scheduler, self._exchange
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
        if counter.done and ticket.stage is not Stage.OVER:
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

    def end(self) -> None:
        self._let_go()
        if self._future.done():
            return
        if self._stream:
            if not self._counter.done:
                self._cut("the stream ended early")
                return
            self._exchange.finish()
        else:
            body = b"".join(self._parts)
            ok = self._status == 200
            self._relay.pool.answered(self._replica, self._sent_s)  # the head alone is no answer yet
            if self._exchange.started:
                self._exchange.finish()
            else:
                self._exchange.respond(self._status, body, self._lines, content_type=b"")
            # Counted once the client has it: it need not wait for that.
            usage = usage_of(body) if ok else None
            self._relay.over(self._ticket, self._call, "done" if ok else "rejected", usage)
        self._future.set_result(None)

    def broke(self, error: Broken) -> None:
        self._let_go()
        if self._status:
            self._cut(str(error))
        elif not self._future.done():
            self._future.set_exception(error)

    def _let_go(self) -> None:
        """The connection is free, and may have another request before `run` goes on: nothing here may touch it."""
        self._connection = self._exchange.on_pause = None

    def _cut(self, problem: str) -> None:
        """The answer broke off after its head."""
        if self._future.done():
            return
        if self._counter.done:  # all was said: how the connection ends says nothing more
            self._exchange.finish()
            self._future.set_result(None)
            return
        relay, exchange = self._relay, self._exchange
        message = f"{relay.pool.names[self._replica]}: {problem}"
        if not exchange.started:
            self._fail(AttemptFailed("cut", message))
            return
        relay.pool.failed(self._replica, self._sent_s)
        relay.metrics.error(self._replica, "cut")
        relay.over(self._ticket, self._call, "failed", None)
        if self._stream:
            # The status is sent already; clients of the API read an error event.
            event = ApiError(502, f"the answer broke off: {message}", code="replica_failed").body()
            exchange.write((b"\n\n" if self._counter.cut else b"") + b"data: " + event + b"\n\n")
            exchange.finish()
        self._future.set_result(None)  # an answer that is not finished ends the client's connection

    def _fail(self, error: AttemptFailed) -> None:
        if not self._future.done():
            self._future.set_exception(error)
