"""One attempt on one replica: a request goes out, its answer comes back byte for byte, tokens are counted."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable

import aiohttp
from aiohttp import web

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.metrics import Metrics
from steersman.runtime.gateway.prompt import Call, TokenEstimate
from steersman.runtime.replica._pool import Pool
from steersman.runtime.replica._stream import EventCounter, Usage, usage_of
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Stage, Ticket

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=3.0, sock_read=300.0)
_LARGE = 1 << 20
_BROKEN = (aiohttp.ClientError, OSError, TimeoutError)


class AttemptFailed(Exception):
    """A replica failed before anything was sent to the client: another one may try."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _PostFailed(Exception):
    """A replica took no request, or gave no answer to it."""


class Relay:
    """Carries a dispatched request to its replica, and the answer back to the client."""

    def __init__(
        self, scheduler: Scheduler, pool: Pool, metrics: Metrics, timeout: aiohttp.ClientTimeout = TIMEOUT
    ) -> None:
        self.scheduler = scheduler
        self.pool = pool
        self.metrics = metrics
        self._timeout = timeout
        self._estimates: dict[tuple[int, int], TokenEstimate] = {}

    def estimate(self, tenant: int, model: int) -> TokenEstimate:
        """How prompts of a tenant for a model turn into tokens, learnt from the answers."""
        return self._estimates.setdefault((tenant, model), TokenEstimate())

    async def serve(
        self, request: web.Request, request_id: str, body: bytes, call: Call, ticket: Ticket, replica: int
    ) -> web.StreamResponse:
        """One attempt on one replica.

        Raises:
            AttemptFailed: it failed before the client got a byte.
        """
        upstream = self.pool.replicas[replica]
        if upstream.served_model is not None and upstream.served_model != call.model:
            body = json.dumps({**json.loads(body), "model": upstream.served_model}).encode()
        headers = {
            "Content-Type": request.headers.get("Content-Type", "application/json"),
            "Accept-Encoding": "identity",  # the stream is read on its way
            "X-Request-Id": request_id,
            **upstream.headers,
        }
        assumed = None
        if not call.stream:
            # The first token does not show: it is taken to come when it was predicted.
            assumed = asyncio.get_running_loop().call_later(
                ticket.predicted_ttft_s, self.scheduler.first_token, ticket, True
            )
        try:
            answer = await self._post(upstream.base_url + request.path, body, headers)
            return await self._pass_on(request, request_id, answer, call, ticket)
        except _PostFailed as error:
            self.pool.failed(replica, self.scheduler)
            raise AttemptFailed("connect", f"{self.pool.names[replica]}: {error}") from None
        finally:
            if assumed is not None:
                assumed.cancel()

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> aiohttp.ClientResponse:
        def post() -> Awaitable[aiohttp.ClientResponse]:
            # The HTTP client wants large bodies as files.
            data = body if len(body) < _LARGE else io.BytesIO(body)
            return self.pool.session.post(url, data=data, headers=headers, timeout=self._timeout)

        try:
            try:
                return await post()
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # It may have closed an idle connection just as the request went out: once more on a new one.
                headers["Connection"] = "close"
                return await post()
        except _BROKEN as error:
            raise _PostFailed(_said(error)) from None

    async def _pass_on(
        self,
        request: web.Request,
        request_id: str,
        answer: aiohttp.ClientResponse,
        call: Call,
        ticket: Ticket,
    ) -> web.StreamResponse:
        replica = ticket.replica
        async with answer:
            if answer.status >= 500:
                raise AttemptFailed("status", f"{self.pool.names[replica]} gave status {answer.status}")
            self.pool.answered(replica)
            passed = {
                "Content-Type": answer.headers.get("Content-Type", "application/json"),
                "X-Steersman-Replica": self.pool.names[replica],
                "X-Request-Id": request_id,
            }
            if answer.status == 200 and answer.content_type == "text/event-stream":
                return await self._relay_stream(request, answer, passed, call, ticket)
            return await self._relay_whole(answer, passed, call, ticket)

    async def _relay_whole(
        self, answer: aiohttp.ClientResponse, headers: dict[str, str], call: Call, ticket: Ticket
    ) -> web.Response:
        try:
            body = await answer.read()
        except _BROKEN as error:
            self.pool.failed(ticket.replica, self.scheduler)
            raise AttemptFailed("cut", f"{self.pool.names[ticket.replica]}: {_said(error)}") from None
        ok = answer.status == 200
        self._over(ticket, call, usage_of(body) if ok else None, "done" if ok else "rejected")
        return web.Response(body=body, status=answer.status, headers=headers)

    async def _relay_stream(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        headers: dict[str, str],
        call: Call,
        ticket: Ticket,
    ) -> web.StreamResponse:
        counter = EventCounter()
        response: web.StreamResponse | None = None
        problem = "the stream ended early"
        while True:
            try:
                chunk = await answer.content.readany()
            except _BROKEN as error:
                problem = _said(error)
                break
            if not chunk:
                break
            tokens = counter.feed(chunk)
            if tokens and not ticket.streamed:
                self.scheduler.first_token(ticket)
                tokens -= 1
            self.scheduler.streamed(ticket, tokens)
            if counter.done and ticket.stage is not Stage.OVER:
                # Before the client has it: one that leaves at [DONE] was served in full.
                self._over(ticket, call, counter.usage, "done")
            if response is None:
                response = web.StreamResponse(headers={**headers, "Cache-Control": "no-cache"})
                await response.prepare(request)
            await response.write(chunk)
        name = self.pool.names[ticket.replica]
        if response is None:
            self.pool.failed(ticket.replica, self.scheduler)
            raise AttemptFailed("cut", f"{name}: {problem}")
        if not counter.done:
            self.pool.failed(ticket.replica, self.scheduler)
            self.metrics.error(ticket.replica, "cut")
            self._over(ticket, call, None, "failed")
            # The status is sent already; clients of the API read an error event.
            event = ApiError(502, f"the answer of {name} broke off: {problem}", code="replica_failed").body()
            await response.write((b"\n\n" if counter.cut else b"") + b"data: " + event + b"\n\n")
        await response.write_eof()
        return response

    def _over(self, ticket: Ticket, call: Call, usage: Usage | None, outcome: str) -> None:
        request, replica = ticket.request, ticket.replica
        ok = outcome == "done"
        served = self.scheduler.ended(ticket, ok, usage.completion_tokens if usage else None)
        self.metrics.over(request.tenant, outcome)
        if served is not None and ok:
            self.metrics.served(request.tenant, replica, served)
        if usage is not None and usage.prompt_tokens > 0 and call.exact_tokens is None:
            self.estimate(request.tenant, request.model).learn(call.prompt_bytes, usage.prompt_tokens)


def _said(error: BaseException) -> str:
    """What an exception of the HTTP client means, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    return "the connection broke"
