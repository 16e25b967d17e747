"""The HTTP side of the gateway: reads requests, has them decided, answers or refuses.

Scheduling knows nothing of HTTP: everything here goes through `Scheduler`'s tickets.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.metrics import CONTENT_TYPE, Metrics
from steersman.runtime.gateway.prompt import Call, read_call
from steersman.runtime.gateway.relay import TIMEOUT, AttemptFailed, Relay
from steersman.runtime.guard import Reason
from steersman.runtime.plugins import nearest
from steersman.runtime.replica._pool import Pool
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Decision, Kind, LiveRequest, Ticket

BODY_LIMIT = 32 << 20
_WHY = {
    Reason.DOWN: "down",
    Reason.MODEL: "serving another model",
    Reason.REGION: "in a region that may not hold the data",
    Reason.CONTEXT: "too small for the prompt and max_tokens",
}


class Gateway:
    """An OpenAI-compatible server in front of a pool of replicas; `scheduler` decides every request."""

    def __init__(self, scheduler: Scheduler, pool: Pool, timeout: aiohttp.ClientTimeout = TIMEOUT) -> None:
        self.scheduler = scheduler
        self.pool = pool
        self.metrics = Metrics(scheduler)
        self.inflight = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._relay = Relay(scheduler, pool, self.metrics, timeout)
        self._tenants = {name: i for i, name in enumerate(scheduler.tenants)}
        self._models = {name: i for i, name in enumerate(scheduler.fleet.models)}

    def app(self) -> web.Application:
        """The application; serve it with `handler_cancellation`: a client that leaves frees its replica."""
        app = web.Application(client_max_size=BODY_LIMIT)
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.router.add_post(path, self._answer(self._completions))
        app.router.add_get("/v1/models", self._answer(self._list_models))
        app.router.add_get("/health", self._answer(self._health))
        app.router.add_get("/metrics", self._answer(self._show_metrics))
        app.router.add_route("*", "/{path:.*}", self._answer(self._unknown))
        return app

    async def drained(self) -> None:
        """From now on new requests are refused; returns when the last one in flight has ended."""
        self.draining = True
        await self.idle()

    async def idle(self) -> None:
        """Returns when no request is in flight."""
        await self._idle.wait()

    @staticmethod
    def _answer(
        handler: Callable[[web.Request, str], Awaitable[web.StreamResponse]],
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Every answer names its request; every error has the API's form."""

        async def handle(request: web.Request) -> web.StreamResponse:
            request_id = request.headers.get("X-Request-Id") or uuid.uuid4().hex
            try:
                response = await handler(request, request_id)
            except ApiError as error:
                headers = {**error.headers, "X-Request-Id": request_id}
                response = web.Response(
                    body=error.body(), status=error.status, content_type="application/json", headers=headers
                )
            if not response.prepared:
                response.headers["X-Request-Id"] = request_id
            return response

        return handle

    # What needs no decision

    async def _list_models(self, request: web.Request, request_id: str) -> web.Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "steersman"} for name in self._models]
        return web.json_response({"object": "list", "data": models})

    async def _health(self, request: web.Request, request_id: str) -> web.Response:
        up = {n: bool(u) for n, u in zip(self.pool.names, self.scheduler.replicas["up"], strict=True)}
        status = "draining" if self.draining else "ok" if any(up.values()) else "no replica is up"
        return web.json_response({"status": status, "replicas": up}, status=200 if status == "ok" else 503)

    async def _show_metrics(self, request: web.Request, request_id: str) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _unknown(self, request: web.Request, request_id: str) -> web.Response:
        raise ApiError(404, f"{request.method} {request.path} is not served here", code="not_found")

    # Completions

    async def _completions(self, request: web.Request, request_id: str) -> web.StreamResponse:
        if self.draining:
            raise ApiError(503, "the gateway is shutting down", code="draining", headers={"Retry-After": "5"})
        self.inflight += 1
        self._idle.clear()
        try:
            return await self._decide_and_serve(request, request_id)
        finally:
            self.inflight -= 1
            if not self.inflight:
                self._idle.set()

    async def _decide_and_serve(self, request: web.Request, request_id: str) -> web.StreamResponse:
        tenant = self._tenant(request)
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(413, f"the body is larger than {BODY_LIMIT >> 20} MiB", code="too_large") from None
        call = read_call(body)
        live = self._live_request(tenant, call)
        ticket = self.scheduler.arrive(live)
        tried: list[int] = []
        failure: AttemptFailed | None = None
        while True:
            decision = self.scheduler.decide(ticket, tried)
            if failure is None or decision.kind is not Kind.REFUSED:
                self.metrics.decided(tenant, decision)
            if decision.kind is Kind.HOLD:
                await self._held(ticket)
                continue
            if decision.kind is not Kind.DISPATCH:
                self.scheduler.shed(ticket)
                self.metrics.over(tenant, decision.kind if failure is None else "failed")
                if failure is not None:
                    raise ApiError(502, f"every replica tried failed, at last {failure}", code="replica_failed")
                raise self._turned_away(decision, live, tenant)
            self.scheduler.dispatched(ticket, decision.replica)
            try:
                return await self._relay.serve(request, request_id, body, call, ticket, decision.replica)
            except AttemptFailed as error:
                failure = error
                self.scheduler.withdrawn(ticket)
                self.metrics.error(decision.replica, error.kind)
                tried.append(decision.replica)
            except BaseException:  # the client left, or the answer broke off after its first bytes
                served = self.scheduler.ended(ticket, ok=False)
                if served is not None:
                    self.metrics.over(tenant, "cancelled")
                raise

    async def _held(self, ticket: Ticket) -> None:
        """Let a request wait until it is to be decided anew."""
        try:
            await asyncio.sleep(self.scheduler.held(ticket))
        except asyncio.CancelledError:  # the client left
            self.scheduler.given_up(ticket)
            self.metrics.over(ticket.request.tenant, "cancelled")
            raise
        self.scheduler.resumed(ticket)

    def _tenant(self, request: web.Request) -> int:
        name = request.headers.get("X-Steersman-Tenant")
        if name is None:
            return 0
        if name not in self._tenants:
            raise ApiError(
                400,
                f"there is no tenant {name!r}; {nearest(name, list(self._tenants))}",
                code="unknown_tenant",
                param="X-Steersman-Tenant",
            )
        return self._tenants[name]

    def _live_request(self, tenant: int, call: Call) -> LiveRequest:
        model = -1 if call.model is None else self._models.get(call.model, -2)
        if model == -2:
            raise ApiError(
                404,
                f"model {call.model!r} is not served here; {nearest(str(call.model), list(self._models))}",
                code="model_not_found",
                param="model",
            )
        estimate = self._relay.estimate(tenant, model)
        exact = call.exact_tokens
        return LiveRequest(
            tenant=tenant,
            prompt_tokens=estimate.tokens(call.prompt_bytes) if exact is None else exact,
            max_tokens=call.max_tokens,
            keys=call.keys,
            block_tokens=estimate.block_tokens if exact is None else self.scheduler.prefix_block_tokens,
            model=model,
        )

    def _turned_away(self, decision: Decision, live: LiveRequest, tenant: int) -> ApiError:
        if decision.kind is Kind.SHED:
            return ApiError(
                503,
                f"the fleet cannot keep its promise to tenant {list(self._tenants)[tenant]!r} now; try again",
                code="shed",
                headers={"Retry-After": str(math.ceil(min(60.0, decision.retry_after_s)))},
            )
        if set(decision.reasons) <= {Reason.CONTEXT, Reason.MODEL} and Reason.CONTEXT in decision.reasons:
            return ApiError(
                400,
                f"about {live.prompt_tokens} prompt tokens and {live.max_tokens} for the answer exceed "
                "the context of every replica; shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
                param="messages",
            )
        why = ", ".join(f"{count} {_WHY[reason]}" for reason, count in decision.reasons.items())
        return ApiError(
            503, f"no replica may take this request: {why}", code="no_replica", headers={"Retry-After": "5"}
        )
