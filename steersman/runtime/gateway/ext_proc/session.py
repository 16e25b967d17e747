"""One request that Envoy carries: its parts come one by one, each is answered, and what happened is counted."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import numpy as np

from steersman.runtime.gateway.access import Caller
from steersman.runtime.gateway.app import COMPLETIONS, EMBEDDINGS, Gateway
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.ext_proc import messages
from steersman.runtime.gateway.ext_proc.endpoints import Endpoints
from steersman.runtime.gateway.prompt import Call
from steersman.runtime.gateway.relay import busy_s, renamed
from steersman.runtime.replica._stream import EventCounter, Usage, usage_of
from steersman.runtime.ticket import Decision, Kind, Stage, Ticket

DESTINATION = "x-gateway-destination-endpoint"
_SUBSET_NAMESPACE, _SUBSET = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
_NAMESPACE, _SERVED = "envoy.lb", "x-gateway-destination-endpoint-served"
_ADDRESS = "upstream.address"  # the same as an attribute
_CHUNK_BYTES = 64 << 10  # of a body that is given back: what the protocol recommends
_WHOLE_BYTES = 8 << 20  # of an answer that is kept, to read its usage
_REMEMBERED = 1024  # answers

Write = Callable[[bytes], Awaitable[None]]
_NOTHING: tuple[bytes, ...] = ()


class Picker:
    """What all requests share: the gateway that decides, where its replicas are, and answers made before."""

    def __init__(self, gateway: Gateway, endpoints: Endpoints, fallbacks: int, body_bytes: int) -> None:
        """fallbacks: further endpoints named for a request; body_bytes: bound on its body."""
        self.gateway = gateway
        self.endpoints = endpoints
        self.fallbacks = fallbacks
        self.body_bytes = body_bytes
        self.sessions: set[Session] = set()
        self._picked: dict[tuple[str, int, str], bytes] = {}
        self._named: dict[int, bytes] = {}
        gateway.on_down = self.went_down

    def picked(self, part: str, replica: int, endpoints: str) -> bytes:
        """The answer to `part` that sends a request to a replica."""
        key = (part, replica, endpoints)
        found = self._picked.get(key)
        if found is None:
            if len(self._picked) >= _REMEMBERED:
                self._picked.clear()
            found = self._picked[key] = self.picking(part, replica, endpoints).SerializeToString()
        return found

    def picking(self, part: str, replica: int, endpoints: str) -> Any:
        """The same as a message: headers to set, and the metadata that says the same."""
        answer = messages.ProcessingResponse()
        mutation = getattr(answer, part).response.header_mutation
        mutation.remove_headers.append("authorization")  # what a client shows here is not the replica's
        messages.set_header(mutation, DESTINATION, endpoints.encode())
        messages.set_header(mutation, "accept-encoding", b"identity")  # tokens are counted
        for name, value in self.gateway.pool.replicas[replica].headers.items():
            messages.set_header(mutation, name.lower(), value.encode("latin-1"))
        outer = answer.dynamic_metadata.fields.add(key=_NAMESPACE)
        inner = outer.value.struct_value.fields.add(key=DESTINATION)
        inner.value.string_value = endpoints
        return answer

    def named(self, replica: int) -> bytes:
        """The answer to the head of a response: the client is told which replica it comes from."""
        found = self._named.get(replica)
        if found is None:
            answer = messages.ProcessingResponse()
            mutation = answer.response_headers.response.header_mutation
            messages.set_header(mutation, "x-steersman-replica", self.gateway.pool.names[replica].encode())
            found = self._named[replica] = answer.SerializeToString()
        return found

    def went_down(self, replica: int) -> None:
        """A replica does not answer any more: those that wait for it are told so."""
        name = self.gateway.pool.names[replica]
        for session in [s for s in self.sessions if s.waits_for(replica)]:
            self.gateway.metrics.error(replica, "silent")
            session.give_up(ApiError(502, f"{name}: it does not answer any more", code="replica_failed"))


class Session:
    """One request. `take` each part of it as it comes, and `close` at last, whatever happened."""

    __slots__ = (
        "_answered",
        "_assumed",
        "_body",
        "_body_size",
        "_call",
        "_caller",
        "_counter",
        "_deadline",
        "_given_up",
        "_headers",
        "_parts",
        "_picker",
        "_refusing",
        "_request_mode",
        "_response_mode",
        "_sent_s",
        "_size",
        "_status",
        "_stream",
        "_subset",
        "_task",
        "_ticket",
        "_write",
        "refused",
    )

    def __init__(self, picker: Picker, write: Write) -> None:
        """write: sends an answer that is not one to a part that came."""
        self._picker = picker
        self._write = write
        # Without word of it the modes are those of the endpoint picker protocol.
        self._request_mode = self._response_mode = messages.FULL_DUPLEX_STREAMED
        self._headers: dict[bytes, bytes] = {}
        self._subset: list[str] | None = None
        self._body: list[bytes] = []
        self._body_size = 0
        self._caller: Caller | None = None
        self._call: Call | None = None
        self._ticket: Ticket | None = None
        self._task: asyncio.Task[Any] | None = None  # while a decision is due
        self._deadline: asyncio.TimerHandle | None = None
        self._assumed: asyncio.TimerHandle | None = None
        self._refusing: asyncio.Task[None] | None = None
        self.refused = False  # the answers to the last part end the request
        self._given_up = False  # it was ended from here in between, and nothing more counts
        self._sent_s = 0.0
        self._answered = False  # a response has begun
        self._status = 0
        self._stream = False
        self._counter = EventCounter()
        self._parts: list[bytes] = []
        self._size = 0
        picker.sessions.add(self)

    async def take(self, message: Any) -> Collection[bytes]:
        """The next part of the request or of its response. Returns the answers to it, in order."""
        part = message.WhichOneof("request")
        if self._given_up or part is None:
            return _NOTHING
        try:
            if part == "response_body":
                return self._response_body(message.response_body)
            if part == "request_headers":
                return await self._request_headers(message)
            if part == "request_body":
                return await self._request_body(message.request_body)
            if part == "response_headers":
                return (self._response_headers(message),)
            if part == "response_trailers":
                self._ended()
            elif self._ticket is None:  # trailers of a request: its body is whole
                return [*await self._decide("request_headers", False), messages.CONTINUE[part]]
            return (messages.CONTINUE[part],)
        except ApiError as error:
            self.refused = True
            return (refusal(error),)

    # The request

    async def _request_headers(self, message: Any) -> Collection[bytes]:
        if message.HasField("protocol_config"):
            self._request_mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode
        headers = self._headers = messages.headers_of(message.request_headers)
        for named in message.metadata_context.filter_metadata:
            if named.key == _SUBSET_NAMESPACE:
                self._subset = messages.texts_of(named.value, _SUBSET)
        path, method = headers.get(b":path", b"").partition(b"?")[0], headers.get(b":method", b"")
        gateway = self._picker.gateway
        if path == b"/v1/models" and method == b"GET":
            self.refused = True
            return (_immediate(200, gateway.models(headers)),)
        if path not in COMPLETIONS and path != EMBEDDINGS:
            asked = f"{method.decode('latin-1')} {path.decode('latin-1')}"
            raise ApiError(404, f"{asked} is not served here", code="not_found")
        if method != b"POST":
            raise ApiError(405, f"{path.decode()} takes POST", code="method_not_allowed", headers={"Allow": "POST"})
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
        self._caller, self._call, self._ticket = caller, call, ticket
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
            self._turned_away(decision.kind)
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
        self._sent_s = scheduler.now
        if not call.stream or self._response_mode == messages.NONE:
            # The first token does not show: it is taken to come when it was predicted.
            self._assumed = loop.call_later(ticket.predicted_ttft_s, scheduler.first_token, ticket, True)
        endpoints = self._endpoints(chosen)
        sent = renamed(body, call, gateway.pool.replicas[replica].served_model)
        if self._request_mode == messages.FULL_DUPLEX_STREAMED:
            return [picker.picked(part, replica, endpoints), *_given_back("request_body", sent, ends)]
        if sent is body:
            return (picker.picked(part, replica, endpoints),)
        answer = picker.picking(part, replica, endpoints)
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

    def _turned_away(self, outcome: str) -> None:
        """A waiting request is over."""
        ticket, gateway = self._ticket, self._picker.gateway
        assert ticket is not None
        gateway.scheduler.shed(ticket)
        ticket.used = 0
        gateway.ended(ticket, outcome)

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
            self._turned_away("failed")
            raise ApiError(
                503,
                f"{picker.gateway.pool.names[replicas[0]]}: its address is not known now",
                code="no_replica",
                headers={"Retry-After": "5"},
            )
        return ",".join(endpoint for endpoint in found if endpoint is not None)

    # The response

    def _response_headers(self, message: Any) -> bytes:
        ticket, gateway = self._ticket, self._picker.gateway
        if ticket is None or ticket.stage not in (Stage.PREFILLING, Stage.DECODING):
            return messages.CONTINUE["response_headers"]
        headers = messages.headers_of(message.response_headers)
        self._stop_timers(also_assumed=False)
        self._answered, self._status = True, int(headers.get(b":status", b"0"))
        self._moved(_served(message))
        replica = ticket.replica
        if self._status >= 500 or self._status == 429:
            if self._status == 429:
                gateway.pool.cool(replica, busy_s(list(headers.items())))
            else:
                gateway.pool.failed(replica, self._sent_s)
            gateway.metrics.error(replica, "busy" if self._status == 429 else "status")
            self._over("failed")
            return self._picker.named(replica)
        if self._response_mode != messages.NONE and self._status == 200:
            self._stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        if message.response_headers.end_of_stream:
            self._ended()
        return self._picker.named(replica)

    def _response_body(self, body: Any) -> Collection[bytes]:
        data, ticket = body.body, self._ticket
        if ticket is not None and ticket.stage is not Stage.OVER:
            if self._stream:
                counter, scheduler = self._counter, self._picker.gateway.scheduler
                tokens = counter.feed(data)
                if tokens:
                    if not ticket.streamed:
                        scheduler.first_token(ticket)
                        tokens -= 1
                    scheduler.streamed(ticket, tokens)
                if counter.done:
                    self._over("done")
            elif (size := self._size + len(data)) <= _WHOLE_BYTES:
                self._size = size
                self._parts.append(data)
            if body.end_of_stream:
                self._ended()
        if self._response_mode == messages.FULL_DUPLEX_STREAMED:
            return _given_back("response_body", data, body.end_of_stream)
        return (messages.CONTINUE["response_body"],)

    def _moved(self, endpoint: str | None) -> None:
        """The proxy says which endpoint served: after a retry of its own that is another replica than was picked."""
        ticket, picker = self._ticket, self._picker
        assert ticket is not None
        if endpoint is None or endpoint == picker.endpoints.of(ticket.replica):
            return
        gateway, first = picker.gateway, ticket.replica
        for replica in picker.endpoints.at(endpoint):
            gateway.pool.failed(first, self._sent_s)
            gateway.metrics.error(first, "connect")
            gateway.metrics.retried(first)
            gateway.scheduler.withdrawn(ticket)
            gateway.scheduler.observe(ticket)
            gateway.scheduler.dispatched(ticket, replica)
            return

    def _ended(self) -> None:
        """The response is whole."""
        ticket = self._ticket
        if ticket is None or ticket.stage not in (Stage.PREFILLING, Stage.DECODING):
            return
        if self._stream:  # it ended before [DONE]
            gateway = self._picker.gateway
            gateway.pool.failed(ticket.replica, self._sent_s)
            gateway.metrics.error(ticket.replica, "cut")
            self._over("failed")
        else:
            self._over("done" if self._status == 200 else "rejected")

    def _over(self, outcome: str) -> None:
        assert self._ticket is not None
        assert self._call is not None
        gateway = self._picker.gateway
        if outcome in ("done", "rejected"):
            gateway.pool.answered(self._ticket.replica, self._sent_s)
        usage = self._counter.usage
        if not self._stream and outcome == "done":
            usage = self._expected() if self._response_mode == messages.NONE else usage_of(b"".join(self._parts))
        self._parts.clear()
        gateway.over(self._ticket, self._call, outcome, usage)

    def _expected(self) -> Usage:
        """What an answer that is not shown counts as: its tenant's mean, which thereby stays what it is."""
        assert self._ticket is not None
        request, book = self._ticket.request, self._picker.gateway.scheduler.book
        mean = math.ceil(book.tenant_views["output_tokens"][request.tenant])
        return Usage(request.prompt_tokens, min(request.max_tokens, max(1, mean)), None)

    # Other ends

    def waits_for(self, replica: int) -> bool:
        """Whether a replica owes it the head of a response."""
        ticket = self._ticket
        return ticket is not None and not self._answered and not self._given_up and ticket.replica == replica

    def give_up(self, error: ApiError) -> None:
        """Answer the client from here: the response has not begun."""
        assert self._ticket is not None
        if self._ticket.stage in (Stage.PREFILLING, Stage.DECODING):
            self._over("late" if self._ticket.late else "failed")
        self._given_up = True
        self._refusing = asyncio.get_running_loop().create_task(self._send(refusal(error)))

    async def _send(self, answer: bytes) -> None:
        with contextlib.suppress(Exception):  # whatever gRPC says when the client has left meanwhile
            await self._write(answer)

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
        return ApiError(
            504,
            f"no answer began within {self._caller.deadline_s:g} s, the request's deadline",
            code="deadline_exceeded",
        )

    def _stop_timers(self, also_assumed: bool = True) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if also_assumed and self._assumed is not None:
            self._assumed.cancel()

    def close(self) -> None:
        """The proxy has nothing more to show: what is not over by now was given up by its client."""
        self._picker.sessions.discard(self)
        self._stop_timers()
        ticket, caller, gateway = self._ticket, self._caller, self._picker.gateway
        if ticket is None or caller is None:
            return
        if ticket.stage in (Stage.PREFILLING, Stage.DECODING):
            if self._answered and self._response_mode == messages.NONE:
                self._ended()  # its body is not shown: nothing says that it broke off
            elif (served := gateway.scheduler.ended(ticket, ok=False, left=True)) is not None:
                gateway.ended(ticket, "cancelled", served)
        elif ticket.stage is Stage.WAITING:
            self._turned_away("failed")
        gateway.leave(caller, ticket)


def _served(message: Any) -> str | None:
    """Which endpoint the response is from, where the proxy says it."""
    for named in message.metadata_context.filter_metadata:
        if named.key == _NAMESPACE and (found := messages.text_of(named.value, _SERVED)):
            return found
    for named in message.attributes:
        if found := messages.text_of(named.value, _ADDRESS):
            return found
    return None


def _given_back(part: str, body: bytes, ends: bool) -> list[bytes]:
    """The answers that let a body go on, where the proxy has handed it over."""
    answers = []
    for start in range(0, max(1, len(body)), _CHUNK_BYTES):
        answer = messages.ProcessingResponse()
        piece = getattr(answer, part).response.body_mutation.streamed_response
        piece.body = body[start : start + _CHUNK_BYTES]
        piece.end_of_stream = ends and start + _CHUNK_BYTES >= len(body)
        answers.append(answer.SerializeToString())
    return answers


def refusal(error: ApiError) -> bytes:
    """The answer that ends a request with an error in the API's form."""
    return _immediate(error.status, error.body(), error.headers, error.code or "error")


def _immediate(status: int, body: bytes, headers: dict[str, str] | None = None, details: str = "") -> bytes:
    answer = messages.ProcessingResponse()
    immediate = answer.immediate_response
    immediate.status.code, immediate.body, immediate.details = status, body, details
    for name, value in {"content-type": "application/json", **(headers or {})}.items():
        messages.set_header(immediate.headers, name.lower(), value.encode("latin-1", "replace"))
    return bytes(answer.SerializeToString())
