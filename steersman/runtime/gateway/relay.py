"""Where dispatched requests go: the connections to each replica, and what is sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from steersman.runtime.gateway.attempt import Attempt, Owner
from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.http.upstream import Upstream
from steersman.runtime.gateway.metrics import Metrics
from steersman.runtime.gateway.prompt import Call, TokenEstimate
from steersman.runtime.gateway.rename import renamed
from steersman.runtime.replica._pool import Pool
from steersman.runtime.replica._stream import Usage
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Ticket

_PASSED_ON = (b"accept", b"traceparent", b"tracestate", b"user-agent")  # of the client's headers; never its credentials
_LATE_S = 2.5  # after the last sweep: this process stood still, and has not read yet what came meanwhile

Over = Callable[[Ticket, Call, str, Usage | None], None]


class Relay:
    """Carries dispatched requests to their replicas."""

    def __init__(self, scheduler: Scheduler, pool: Pool, metrics: Metrics, over: Over) -> None:
        """over: called once for each request that a replica answered, or broke off answering."""
        self.scheduler = scheduler
        self.pool = pool
        self.metrics = metrics
        self.over = over
        self._upstreams: list[Upstream | None] = [None] * len(pool.replicas)
        self._urls = [""] * len(pool.replicas)
        self._fixed = [b""] * len(pool.replicas)  # header lines of every request to a replica
        self.attempts: list[set[Attempt]] = [set() for _ in pool.replicas]  # that are not over
        self.named = [b"x-steersman-replica: " + name.encode() + b"\r\n" for name in pool.names]
        self._estimates: dict[tuple[int, int], TokenEstimate] = {}
        self._answers: list[tuple[Callable[[bytes], None], bytes]] = []  # that are not counted
        self._swept_s: float | None = None  # when the last sweep was
        self._late = False  # and whether it came late

    def estimate(self, tenant: int, model: int) -> TokenEstimate:
        """How prompts of a tenant for a model turn into tokens, learnt from the answers."""
        key = (tenant, model)
        found = self._estimates.get(key)
        if found is None:
            found = self._estimates[key] = TokenEstimate()
        return found

    def serve(self, exchange: Exchange, call: Call, ticket: Ticket, owner: Owner) -> Attempt:
        """Begin an attempt on the replica that the request was dispatched to; `owner` is told what comes of it."""
        replica = ticket.replica
        upstream, body = self._upstream(replica), renamed(exchange.body, call, self.pool.replicas[replica].served_model)
        if not call.stream:
            self.scheduler.assume_first_token(ticket)
        attempt = Attempt(self, exchange, call, ticket, owner)
        attempt.start(upstream, self._head(upstream, exchange, replica, len(body)), body)
        return attempt

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
        headers, passed = exchange.headers, self._fixed[replica]
        for name in _PASSED_ON:
            if name in headers:
                passed += b"%b: %b\r\n" % (name, headers[name])
        return b"POST %b%b HTTP/1.1\r\n%bcontent-type: %b\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            upstream.prefix,
            exchange.path,
            passed,
            headers.get(b"content-type", b"application/json"),
            exchange.request_id,
            length,
        )

    def count_soon(self, count: Callable[[bytes], None], body: bytes) -> None:
        """Call `count` with the body of a whole answer, after all that has come is read and passed on.

        As `Server.begin_soon`: many at once are cheaper.
        """
        if not self._answers:
            asyncio.get_running_loop().call_soon(self._count)
        self._answers.append((count, body))

    def _count(self) -> None:
        answers, self._answers = self._answers, []
        for count, body in answers:
            count(body)

    def went_down(self, replica: int) -> None:
        """A replica does not answer any more: what it owes the first byte of goes elsewhere."""
        for attempt in list(self.attempts[replica]):
            attempt.give_up("it does not answer any more")

    def sweep(self, now: float) -> None:
        """Call about once a second, with the loop's time."""
        before, self._swept_s = self._swept_s, now
        if before is None:
            return
        self._late = now - before > _LATE_S and not self._late  # always late is no excuse
        if self._late:
            return
        well_s, down_s = self.pool.config.read_timeout_s, self.pool.config.down_timeout_s
        for upstream, health in zip(self._upstreams, self.pool.health, strict=True):
            if upstream is not None:
                upstream.sweep(now, well_s if health.healthy else min(well_s, down_s))

    def close(self) -> None:
        for upstream in self._upstreams:
            if upstream is not None:
                upstream.close()
