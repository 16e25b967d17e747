"""One request that Envoy carries: its parts come one by one, each is answered, and what happened is counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import numpy as np

from steersman.runtime.gateway.access import Caller
from steersman.runtime.gateway.access_log import AccessLog
from steersman.runtime.gateway.app import SERVED
from steersman.runtime.gateway.errors import ApiError, internal_error
from steersman.runtime.gateway.ext_proc import messages
from steersman.runtime.gateway.ext_proc.answers import given_back, immediate, picking, refusal
from steersman.runtime.gateway.ext_proc.picker import Picker
from steersman.runtime.gateway.ext_proc.response import Response
from steersman.runtime.gateway.refusals import not_allowed, too_late
from steersman.runtime.gateway.rename import renamed
from steersman.runtime.log import named
from steersman.runtime.ticket import Decision, Kind, Stage, Ticket

_SUBSET_NAMESPACE, _SUBSET = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
Write = Callable[[bytes], Awaitable[None]]
_NOTHING: tuple[bytes, ...] = ()
_log = logging.getLogger("steersman.gateway")


class Session:
    """One request. `take` each part of it as it comes, and `close` at last, whatever happened."""

    __slots__ = (
        "_body",
        "_body_size",
        "_caller",
        "_deadline",
        "_error",
        "_given_up",
        "_headers",
        "_picker",
        "_refusing",
        "_request_mode",
        "_response",
        "_response_mode",
        "_subset",
        "_task",
        "_ticket",
        "_write",
        "_writing",
        "refused",
    )

    def __init__(self, picker: Picker, write: Write) -> None:
        """write: takes an answer to the proxy; it is not called again before it returns."""
        self._picker = picker
        self._write, self._writing = write, asyncio.Lock()
        # Without word of it the modes are those of the endpoint picker protocol.
        self._request_mode = self._response_mode = messages.FULL_DUPLEX_STREAMED
        self._error: ApiError | None = None  # that ended the request
        self._headers: dict[bytes, bytes] = {}
        self._subset: list[str] | None = None
        self._body: list[bytes] = []
        self._body_size = 0
        self._caller: Caller | None = None
        self._ticket: Ticket | None = None
        self._response: Response | None = None  # from when it was sent on
        self._task: asyncio.Task[Any] | None = None  # while a decision is due
        self._deadline: asyncio.TimerHandle | None = None
        self._refusing: asyncio.Task[None] | None = None
        self.refused = False  # the answers to the last part end the request
        self._given_up = False  # it was ended from here in between, and nothing more counts
        picker.sessions.add(self)

    async def take(self, message: Any) -> Collection[bytes]:
        """The next part of the request or of its response. Returns the answers to it, in order."""
        part = message.WhichOneof("request")
        if self._given_up or part is None:
            return _NOTHING
        try:
            if part == "response_body" and self._response is not None:
                return self._response.body(message.response_body)
            if part == "request_headers":
                return await self._request_headers(message)
            if part == "request_body":
                return await self._request_body(message.request_body)
            if part == "response_headers" and self._response is not None:
                self._stop_deadline()
                return (self._response.begin(message),)
            if part == "response_trailers" and self._response is not None:
                self._response.end()
            elif part == "request_trailers" and self._ticket is None:  # its body is whole
                return [*await self._decide("request_headers", False), messages.CONTINUE[part]]
            return (messages.CONTINUE[part],)
        except ApiError as error:
            self.refused = True
            return (self._refusal(error),)

    async def send(self, answer: bytes) -> None:
        """Give an answer to the proxy, after any that is on its way."""
        async with self._writing:
            await self._write(answer)

    # The request

    async def _request_headers(self, message: Any) -> Collection[bytes]:
        if message.HasField("protocol_config"):
            self._request_mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode
        headers = self._headers = messages.headers_of(message.request_headers)
        for hint in message.metadata_context.filter_metadata:
            if hint.key == _SUBSET_NAMESPACE:
                self._subset = messages.texts_of(hint.value, _SUBSET)
        path, method = headers.get(b":path", b"").partition(b"?")[0], headers.get(b":method", b"")
        gateway = self._picker.gateway
        if path == b"/v1/models" and method == b"GET":
            self.refused = True
            return (immediate(200, gateway.pages.models(headers)),)
        if path not in SERVED:
            asked = f"{method.decode('latin-1')} {path.decode('latin-1')}"
            raise ApiError(404, f"{asked} is not served here", code="not_found")
        if method != b"POST":
            raise not_allowed(path, "POST")
        if message.request_headers.end_of_stream:
            return await self._decide("request_headers", False)
        if self._request_mode == messages.BUFFERED:
            return (messages.CONTINUE["request_headers"],)
        if self._request_mode == messages.FULL_DUPLEX_STREAMED:
            return _NOTHING  # the head goes on when the body has shown where to
        raise ApiError(
            500,
            "this proxy does not show the body of requests; set processing_mode.request_body_mode of its ext_proc "
            "filter to BUFFERED or FULL_DUPLEX_STREAMED",
            code="misconfigured",
        )

    async def _request_body(self, body: Any) -> Collection[bytes]:
        self._body.append(body.body)
        self._body_size += len(body.body)
        if self._body_size > self._picker.body_bytes:
            raise ApiError(413, f"the body is larger than {self._picker.body_bytes} bytes", code="bad_request")
        if self._request_mode == messages.BUFFERED:
            return await self._decide("request_body", True)
        return await self._decide("request_headers", True) if body.end_of_stream else _NOTHING

    async def _decide(self, part: str, ends: bool) -> Collection[bytes]:
        """The answers that send the request on.

        part: of the request, whose answer says where to; ends: the body ends the request.

        Raises:
            ApiError: it is turned away.
        """
        picker, gateway = self._picker, self._picker.gateway
        scheduler, body = gateway.scheduler, b"".join(self._body)
        self._body.clear()
        headers = self._headers
        path = headers[b":path"].partition(b"?")[0]
        caller, call, ticket = gateway.enter(headers, path, body)
        self._caller, self._ticket = caller, ticket
        loop = asyncio.get_running_loop()
        if caller.deadline_s is not None:
            self._deadline = loop.call_later(caller.deadline_s, self._too_late)
        exclude = self._outside()
        self._task = asyncio.current_task()
        try:
            decision = await gateway.decided(headers.get(b"x-request-id", b"-"), caller, ticket, exclude)
        except asyncio.CancelledError:
            if not ticket.late or self._task is None:
                raise
            self._task.uncancel()
            raise self._late() from None
        finally:
            self._task = None
        if decision.kind is not Kind.DISPATCH:
            gateway.turn_away(ticket, decision.kind)
            error = gateway.turned_away(decision, ticket.request)
            if decision.kind is Kind.SHED:
                error.status = 429  # what the endpoint picker protocol wants for a request that is dropped
            elif exclude and error.status == 503:
                error = ApiError(
                    503,
                    "none of the endpoints that the proxy offers may take this request",
                    code="no_replica",
                    headers=error.headers,
                )
            raise error
        replica, chosen = decision.replica, self._ranked(decision)
        scheduler.dispatched(ticket, replica)
        self._response = Response(picker, call, ticket, self._response_mode)
        endpoints = self._endpoints(chosen)
        sent = renamed(body, call, gateway.pool.replicas[replica].served_model)
        if self._request_mode == messages.FULL_DUPLEX_STREAMED:
            return [picker.picked(part, replica, endpoints), *given_back("request_body", sent, ends)]
        if sent is body:
            return (picker.picked(part, replica, endpoints),)
        answer = picking(part, endpoints, gateway.pool.replicas[replica].headers)
        common = getattr(answer, part).response
        common.body_mutation.body = sent
        messages.set_header(common.header_mutation, "content-length", b"%d" % len(sent))
        return (answer.SerializeToString(),)

    def _outside(self) -> list[int]:
        """Replicas that are not in the subset that the proxy gave."""
        if self._subset is None:
            return []
        endpoints = self._picker.endpoints
        count = len(self._picker.gateway.pool.replicas)
        return [replica for replica in range(count) if endpoints.of(replica) not in self._subset]

    def _ranked(self, decision: Decision) -> list[int]:
        """The replica that was chosen and, as many as are wanted, the next best by the same scores."""
        wanted, scheduler = self._picker.fallbacks, self._picker.gateway.scheduler
        if not wanted or decision.scores is None:
            return [decision.replica]
        scores = np.where(scheduler.mask, decision.scores, -np.inf)
        count = len(scheduler.replicas)
        better = scores[:count] > scores[count:].max()  # than to hold it, or to shed it
        order = [int(r) for r in np.argsort(-scores[:count], kind="stable") if better[r] and r != decision.replica]
        return [decision.replica, *order[:wanted]]

    def _endpoints(self, replicas: Sequence[int]) -> str:
        """The endpoints of replicas, the first of which has the request.

        Raises:
            ApiError: that one's is not known.
        """
        picker, ticket = self._picker, self._ticket
        assert ticket is not None
        found = [picker.endpoints.of(replica) for replica in replicas]
        if found[0] is None:
            picker.gateway.scheduler.withdrawn(ticket)
            picker.gateway.turn_away(ticket, "failed")
            raise ApiError(
                503,
                f"{picker.gateway.pool.names[replicas[0]]}: its address is not known now",
                code="no_replica",
                headers={"Retry-After": "5"},
            )
        return ",".join(endpoint for endpoint in found if endpoint is not None)

    # Other ends

    def waits_for(self, replica: int) -> bool:
        """Whether a replica owes it the head of a response."""
        ticket, response = self._ticket, self._response
        if ticket is None or response is None or response.begun or self._given_up:
            return False
        return ticket.replica == replica

    def give_up(self, error: ApiError) -> None:
        """Answer the client from here: the response has not begun."""
        assert self._ticket is not None
        if self._response is not None and self._response.open:
            self._response.over("late" if self._ticket.late else "failed")
        self._given_up = True
        self._refusing = asyncio.get_running_loop().create_task(self._end(self._refusal(error)))

    async def _end(self, answer: bytes) -> None:
        try:
            await self.send(answer)
        except Exception:
            if self in self._picker.sessions:  # else its client has left meanwhile
                _log.exception("a request could not be ended", extra=named("request_failed", {}))

    def _too_late(self) -> None:
        """The deadline has come: the request ends, as its answer has not begun."""
        assert self._ticket is not None
        self._ticket.late = True
        if self._task is not None:
            self._task.cancel()
        elif not self._given_up:
            self.give_up(self._late())

    def _late(self) -> ApiError:
        assert self._caller is not None
        return too_late(self._caller.deadline_s)

    def broken(self) -> bytes:
        """A bug of ours ended it. Returns the answer."""
        if self._ticket is not None:
            self._picker.gateway.broke_off(self._ticket, "failed")
        return self._refusal(internal_error())

    def _refusal(self, error: ApiError) -> bytes:
        """The answer with an error, which ends the request."""
        self._error = error
        self._picker.gateway.metrics.answered_error(error.status, error.code)
        return refusal(error)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def close(self) -> None:
        """The proxy has nothing more to show."""
        self._picker.sessions.discard(self)
        self._stop_deadline()
        ticket, caller, gateway = self._ticket, self._caller, self._picker.gateway
        try:
            if self._response is not None:
                self._response.left()
            elif ticket is not None and ticket.stage is Stage.WAITING:
                gateway.turn_away(ticket, "failed")
        finally:
            if ticket is not None and caller is not None:
                gateway.leave(caller, ticket)
            if gateway.access_log is not None:
                self._log(gateway.access_log)

    def _log(self, access_log: AccessLog) -> None:
        headers, error = self._headers, self._error
        if error is not None:
            status = error.status
        elif self._response is not None:
            status = self._response.status
        else:
            status = 200 if self.refused else 0  # the list of models is the only answer made here that is no error
        access_log.line(
            headers.get(b"x-request-id", b"-"),
            headers.get(b":method", b""),
            headers.get(b":path", b"").partition(b"?")[0],
            status,
            (error.code or "") if error is not None else "",
            self._ticket,
        )
