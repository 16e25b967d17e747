"""What the gateway does with a request: who asks, what for, decided, relayed, or refused.

Scheduling knows nothing of HTTP: everything here goes through `Scheduler`'s tickets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from enum import IntEnum

from steersman.runtime.deployment.metrics import metrics as policy_metrics
from steersman.runtime.gateway.access import Access, Caller
from steersman.runtime.gateway.access_log import AccessLog
from steersman.runtime.gateway.audit import Audit
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.limits import FairShares, Limiter, OverLimit
from steersman.runtime.gateway.metrics import Metrics, of_audit, of_caches, of_journal
from steersman.runtime.gateway.pages import Pages
from steersman.runtime.gateway.passage import Passage
from steersman.runtime.gateway.prompt import Call, read_call
from steersman.runtime.gateway.refusals import not_allowed, turned_away
from steersman.runtime.gateway.relay import Relay
from steersman.runtime.gateway.retry_after import retry_after
from steersman.runtime.gateway.window import Window
from steersman.runtime.journal import Journal
from steersman.runtime.plugins import nearest
from steersman.runtime.replica._health import Status
from steersman.runtime.replica._pool import Pool
from steersman.runtime.replica._stream import Usage
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import HOLD, REFUSED, Decision, LiveRequest, Served, Ticket

EMBEDDINGS = b"/v1/embeddings"
SERVED = (b"/v1/chat/completions", b"/v1/completions", EMBEDDINGS)
_NAME_CHARS = 200  # of a model's name that nobody knows: it may be as long as a body
AUDIT_LINES = 10_000  # that wait to be written before requests with a rule are refused
_CLIENTS = ("cancelled", "rejected")  # endings that are the client's doing, and break no promise


class Phase(IntEnum):
    """How far a gateway is on its way to stopping."""

    SERVING = 0
    LEAVING = 1  # it goes on, and says at /health that it will stop
    DRAINING = 2  # it takes no more requests
    STOPPING = 3  # what is still in flight is cut off by us, not by its client


class Gateway:
    """An OpenAI-compatible front of a pool of replicas; `scheduler` decides every request.

    `handle` is the handler of a `Server`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: Pool,
        access: Access,
        *,
        fair: FairShares | None = None,
        audit: Audit | None = None,
        journal: Journal | None = None,
        window: Window | None = None,
        open_metrics: bool = True,
    ) -> None:
        """open_metrics: /metrics is served here, to anybody."""
        self.scheduler = scheduler
        self.pool = pool
        self.access = access
        self.metrics = Metrics(scheduler)
        self.window = window
        self.inflight = 0
        self.phase = Phase.SERVING
        self.access_log: AccessLog | None = None
        self._audit, self._journal = audit, journal
        self.metrics.add(lambda: of_caches(pool.names, pool.prefix_hit_rate))
        if journal is not None:
            self.metrics.add(lambda: of_journal(journal))
        if (deployment := scheduler.deployment) is not None:
            self.metrics.add(lambda: policy_metrics(deployment))
        if audit is not None:
            self.metrics.add(lambda: of_audit(audit))
        self._idle = asyncio.Event()
        self._idle.set()
        self.relay = Relay(scheduler, pool, self.metrics, self.over)
        self.on_down: Callable[[int], None] = lambda _replica: None
        self._models = {name: i for i, name in enumerate(scheduler.fleet.models)}
        tenants = access.tenants
        self.limiter = Limiter(
            list(tenants),
            [tenant.weight for tenant in tenants.values()],
            {name: tenant.limits for name, tenant in tenants.items()},
            fair,
            scheduler.now,
        )
        pool.on_change = self.replica_changed
        pool.attach(scheduler)
        self._slots_up()
        self.pages = Pages(self, open_metrics)

    def handle(self, exchange: Exchange) -> Callable[[], None] | None:
        """Begin to answer one request; what is returned goes on with it. Every error has the API's form."""
        try:
            if exchange.path not in SERVED:
                self.pages.answer(exchange)
                exchange.over()
            elif exchange.method == b"POST":
                return Passage(self, exchange).go
            else:
                raise not_allowed(exchange.path, "POST")
        except ApiError as error:
            self.refuse(exchange, error)
        except Exception:
            self.broken(exchange)
        return None

    def refuse(self, exchange: Exchange, error: ApiError) -> None:
        """Answer with an error."""
        self.metrics.answered_error(error.status, error.code)
        exchange.fail(error)
        exchange.over()

    def broken(self, exchange: Exchange) -> None:
        """A bug of ours ended it; called where the exception was caught."""
        told = not exchange.started
        exchange.broken()
        if told:
            self.metrics.answered_error(exchange.status, exchange.code)

    async def drained(self) -> None:
        """From now on new requests are refused; returns when the last one in flight has ended."""
        self.phase = max(self.phase, Phase.DRAINING)
        await self.idle()

    async def idle(self) -> None:
        """Returns when no request is in flight."""
        await self._idle.wait()

    def sweep(self, now: float) -> None:
        """Call about once a second, with the loop's time."""
        self.relay.sweep(now)
        if self.window is not None:
            self.window.sample()

    # Completions and embeddings

    def enter(self, headers: Mapping[bytes, bytes], path: bytes, body: bytes) -> tuple[Caller, Call, Ticket]:
        """A request comes in: who sends it, what for, and its ticket. `leave` is its counterpart.

        Raises:
            ApiError: it may not; nothing was counted that stays.
        """
        if self.phase >= Phase.DRAINING:
            raise ApiError(503, "the gateway is shutting down", code="draining", headers={"Retry-After": "5"})
        caller = self.access.caller(headers)
        if self._audit is not None and caller.regions and self._audit.waiting > AUDIT_LINES:
            raise ApiError(
                503,
                "where this request's data goes cannot be recorded now; try again later",
                code="audit_unavailable",
                headers={"Retry-After": "30"},
            )
        call = read_call(body, path == EMBEDDINGS)
        ticket = self._admit(caller, self._live_request(caller, call), call.answers)
        self.inflight += 1
        self._idle.clear()
        return caller, call, ticket

    def leave(self, caller: Caller, ticket: Ticket) -> None:
        """A request that came in is over, whatever became of it."""
        used = ticket.used
        if used is None and ticket.seen:  # nobody told, but its tokens were counted as they came
            used = ticket.request.prompt_tokens + ticket.streamed
        self.limiter.ended(caller.tenant, ticket.reserved, used)
        self.inflight -= 1
        if not self.inflight:
            self._idle.set()

    def _admit(self, caller: Caller, live: LiveRequest, answers: int) -> Ticket:
        """One over a limit is no arrival for the policy, and no broken promise. answers: that it asks for."""
        live = self.scheduler.bounded(live)
        reserved = live.prompt_tokens + answers * live.max_tokens
        try:
            self.limiter.admit(caller.tenant, reserved, self._slots, self.scheduler.now)
        except OverLimit as over:
            self.metrics.limited(self.access.names[caller.tenant], over.limit)
            self.metrics.over(caller.row, "limited", False)
            raise ApiError(
                429, over.message, code="rate_limit_exceeded", headers=retry_after(over.retry_after_s)
            ) from None
        ticket = self.scheduler.arrive(live)
        ticket.reserved = reserved
        return ticket

    def cause(self, ticket: Ticket) -> str:
        """Why a request is given up: its deadline came, the gateway stops, or its client left."""
        return "late" if ticket.late else "unended" if self.phase is Phase.STOPPING else "cancelled"

    def broke_off(self, ticket: Ticket, outcome: str) -> None:
        """A dispatched request ends before its replica answered, or while it did."""
        served = self.scheduler.ended(ticket, ok=False, left=outcome in _CLIENTS)
        if served is not None:
            self.ended(ticket, outcome, served)

    def turn_away(self, ticket: Ticket, outcome: str) -> None:
        """A waiting request is shed, or no replica may take it."""
        self.scheduler.shed(ticket)
        ticket.used = 0
        self.ended(ticket, outcome)

    def given_up(self, ticket: Ticket) -> None:
        """A held request ends: its client left, its deadline came, or the gateway stops."""
        ticket.used = 0
        attained = self.scheduler.given_up(ticket)
        self.ended(ticket, self.cause(ticket), attained=attained)

    async def decided(
        self, request_id: bytes, caller: Caller, ticket: Ticket, exclude: Collection[int] = ()
    ) -> Decision:
        """What to do with a waiting request; while that is to hold it, it waits here, and is decided anew.

        exclude: replicas that it may not go to, as it was tried on them.
        """
        while True:
            decision = self.scheduler.decide(ticket, exclude)
            self.note(request_id, caller, ticket, decision, exclude)
            if decision.kind is not HOLD:
                return decision
            await self._held(ticket)

    def note(
        self, request_id: bytes, caller: Caller, ticket: Ticket, decision: Decision, exclude: Collection[int] = ()
    ) -> None:
        """Count and record a decision of the scheduler; before it makes another one, and before `ended`."""
        kind = decision.kind
        if self._journal is not None:
            self._journal.decided(self.scheduler, ticket, decision)
        if not exclude or kind is not REFUSED:
            self.metrics.decided(decision)
        if self._audit is not None and caller.regions and kind is not HOLD:
            self._audit.decided(
                request_id,
                self.access.names[caller.tenant],
                caller.regions,
                caller.data_class,
                kind,
                decision.replica,
                decision.policy,
            )

    async def _held(self, ticket: Ticket) -> None:
        """Let a request wait until it is to be decided anew."""
        try:
            await asyncio.sleep(self.scheduler.held(ticket))
        except asyncio.CancelledError:
            self.given_up(ticket)
            raise
        self.scheduler.resumed(ticket)

    def over(self, ticket: Ticket, call: Call, outcome: str, usage: Usage | None) -> None:
        """A replica has answered a request, or broke off."""
        request, replica = ticket.request, ticket.replica
        ok = outcome == "done"
        served = self.scheduler.ended(ticket, ok, usage.completion_tokens if usage else None, left=outcome in _CLIENTS)
        self.ended(ticket, outcome, served, cached_tokens=usage.cached_tokens if usage else None)
        if outcome == "rejected":
            ticket.used = 0
        if served is not None and ok:
            self.metrics.served(request.tenant, replica, served)
        if usage is not None:
            ticket.used = usage.prompt_tokens + usage.completion_tokens
            if usage.prompt_tokens > 0 and call.exact_tokens is None:
                self.relay.estimate(request.tenant, request.model).learn(call.prompt_bytes, usage.prompt_tokens)

    def ended(
        self,
        ticket: Ticket,
        outcome: str,
        served: Served | None = None,
        *,
        attained: bool = False,
        cached_tokens: int | None = None,
    ) -> None:
        """A request is over; once for each. It is counted, and goes to the window and the journal.

        outcome: done, shed, refused, failed, rejected (by a replica), cancelled, late or unended (the gateway stopped).
        served: how it fared on its replica; attained: whether its promise was kept, where that does not say.
        cached_tokens: of its prompt, as the replica tells.
        """
        ticket.outcome, ticket.served = outcome, served
        self.metrics.over(ticket.request.tenant, outcome, attained if served is None else served.attained)
        if self.window is not None:
            self.window.over(ticket, outcome, served, attained, cached_tokens or 0)
        if self._journal is not None:
            cached = -1 if cached_tokens is None else cached_tokens
            self._journal.over(ticket, outcome, served, attained=attained, cached_tokens=cached)

    def _live_request(self, caller: Caller, call: Call) -> LiveRequest:
        if call.model is None and len(self._models) > 1:  # any would do for the scheduler, but not for who asks
            raise ApiError(400, f"the body needs 'model', one of: {', '.join(self._models)}", param="model")
        model = -1 if call.model is None else self._models.get(call.model, -2)
        if model == -2:
            asked = str(call.model)[:_NAME_CHARS]
            raise ApiError(
                404,
                f"model {asked!r} is not served here; {nearest(asked, list(self._models))}",
                code="model_not_found",
                param="model",
            )
        estimate = self.relay.estimate(caller.row, model)
        exact = call.exact_tokens
        return LiveRequest(
            caller.row,
            estimate.tokens(call.prompt_bytes) if exact is None else exact,
            call.max_tokens,
            call.keys,
            estimate.block_tokens if exact is None else self.scheduler.prefix_block_tokens,
            caller.priority,
            model,
            caller.regions,
        )

    def turned_away(self, decision: Decision, live: LiveRequest) -> ApiError:
        """The answer to a request that is shed, or that no replica may take."""
        return turned_away(decision, live, self.metrics.tenants[live.tenant])

    # Replicas

    def replica_changed(self, replica: int, status: Status) -> None:
        """A replica's status is another now."""
        self._slots_up()
        if status is Status.DOWN:
            self.relay.went_down(replica)
            self.on_down(replica)

    def _slots_up(self) -> None:
        table = self.scheduler.replicas
        self._slots = float(table["max_num_seqs"][table["up"] == 1].sum())
