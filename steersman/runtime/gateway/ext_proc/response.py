"""The response to a request that was sent on, as it comes by: what it tells is counted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from typing import Any

from steersman.runtime.gateway.ext_proc import messages
from steersman.runtime.gateway.ext_proc.answers import NAMESPACE, given_back
from steersman.runtime.gateway.ext_proc.picker import Picker
from steersman.runtime.gateway.prompt import Call
from steersman.runtime.gateway.retry_after import busy_s
from steersman.runtime.replica._stream import EventCounter, Usage, usage_of
from steersman.runtime.ticket import Stage, Ticket

_SERVED = "x-gateway-destination-endpoint-served"
_ADDRESS = "upstream.address"  # the same as an attribute
_WHOLE_BYTES = 8 << 20  # of an answer that is kept, to read its usage


class Response:
    """One response. `begin`, `body` and `end` as its parts come; `over` if it ends in another way."""

    __slots__ = (
        "_assumed",
        "_call",
        "_counter",
        "_mode",
        "_parts",
        "_picker",
        "_sent_s",
        "_shown",
        "_size",
        "_status",
        "_stream",
        "_ticket",
        "begun",
    )

    def __init__(self, picker: Picker, call: Call, ticket: Ticket, mode: int) -> None:
        """mode: in which the proxy shows its body."""
        self._picker, self._call, self._ticket, self._mode = picker, call, ticket, mode
        self._sent_s = picker.gateway.scheduler.now
        self.begun = False
        self._shown = mode != messages.NONE
        self._assumed: asyncio.TimerHandle | None = None
        if not call.stream or not self._shown:
            self._assume()
        self._status = 0
        self._stream = False  # of events
        self._counter = EventCounter()
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def status(self) -> int:
        """Of its head; 0 before that came."""
        return self._status

    @property
    def open(self) -> bool:
        """Whether the request is still on its replica, as far as is known."""
        return self._ticket.stage in (Stage.PREFILLING, Stage.DECODING)

    def begin(self, message: Any) -> bytes:
        """Its head has come. Returns the answer."""
        ticket, gateway = self._ticket, self._picker.gateway
        if not self.open:
            return messages.CONTINUE["response_headers"]
        headers = messages.headers_of(message.response_headers)
        self.begun, self._status = True, int(headers.get(b":status", b"0"))
        self._moved(_served(message))
        replica = ticket.replica
        if self._status == 429:
            gateway.pool.cool(replica, busy_s(list(headers.items())))
            gateway.metrics.error(replica, "busy")
            self.over("failed")
        elif self._status >= 500:
            gateway.pool.failed(replica, self._sent_s)
            gateway.metrics.error(replica, "status")
            self.over("failed")
        else:
            if self._status == 200:
                self._stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self._stream and self._mode == messages.STREAMED and not self._picker.watches():
                self._shown = False
                self._assume()
            if message.response_headers.end_of_stream:
                self.end()
        return self._picker.named(replica, self._shown or self._mode == messages.NONE)

    def body(self, body: Any) -> Collection[bytes]:
        """Some of its body has come. Returns the answers."""
        data = body.body
        self._shown = True  # also where it was not to be
        if self.open:
            if self._stream:
                self._events(data)
            elif (size := self._size + len(data)) <= _WHOLE_BYTES:
                self._size = size
                self._parts.append(data)
            if body.end_of_stream:
                self.end()
        if self._mode == messages.FULL_DUPLEX_STREAMED:
            return given_back("response_body", data, body.end_of_stream)
        return (messages.CONTINUE["response_body"],)

    def _events(self, data: bytes) -> None:
        ticket, counter, scheduler = self._ticket, self._counter, self._picker.gateway.scheduler
        tokens = counter.feed(data)
        if tokens:
            if not ticket.streamed:
                scheduler.first_token(ticket)
                tokens -= 1
            scheduler.streamed(ticket, tokens)
        if counter.done:
            self.over("failed" if counter.failed else "done")

    def _moved(self, endpoint: str | None) -> None:
        """The proxy says which endpoint served: after a retry of its own that is another replica than was picked."""
        ticket, picker = self._ticket, self._picker
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

    def end(self) -> None:
        """It is whole, or nothing more of it will be shown."""
        if not self.open:
            return
        if self._stream and self._shown:  # it ended before [DONE]
            self._picker.gateway.pool.failed(self._ticket.replica, self._sent_s)
            self._picker.gateway.metrics.error(self._ticket.replica, "cut")
            self.over("failed")
        else:
            self.over("done" if self._status == 200 else "rejected")

    def over(self, outcome: str) -> None:
        """The request is over: done, failed, rejected or late."""
        gateway = self._picker.gateway
        if outcome in ("done", "rejected"):
            gateway.pool.answered(self._ticket.replica, self._sent_s)
        usage = self._counter.usage
        if outcome == "done" and not self._shown:
            usage = self._expected()
        elif outcome == "done" and not self._stream:
            usage = usage_of(b"".join(self._parts))
        self._parts.clear()
        gateway.over(self._ticket, self._call, outcome, usage)

    def _assume(self) -> None:
        """The first token does not show: it is taken to come when it was predicted."""
        scheduler, ticket = self._picker.gateway.scheduler, self._ticket
        delay_s = max(0.0, ticket.predicted_ttft_s - (scheduler.now - self._sent_s))
        self._assumed = asyncio.get_running_loop().call_later(delay_s, scheduler.first_token, ticket, True)

    def left(self) -> None:
        """The proxy has nothing more to show. What is not over by now was given up by its client, or by the gateway."""
        if self._assumed is not None:
            self._assumed.cancel()
        gateway = self._picker.gateway
        if self.begun and not self._shown:
            self.end()  # its body is not shown: nothing says that it broke off
        else:
            gateway.broke_off(self._ticket, gateway.cause(self._ticket))

    def _expected(self) -> Usage:
        """What an answer that is not shown counts as: its tenant's mean, which thereby stays what it is."""
        request, book = self._ticket.request, self._picker.gateway.scheduler.book
        mean = math.ceil(book.tenant_views["output_tokens"][request.tenant])
        return Usage(request.prompt_tokens, min(request.max_tokens, max(1, mean)), None)


def _served(message: Any) -> str | None:
    """Which endpoint the response is from, where the proxy says it."""
    for named in message.metadata_context.filter_metadata:
        if named.key == NAMESPACE and (found := messages.text_of(named.value, _SERVED)):
            return found
    for named in message.attributes:
        if found := messages.text_of(named.value, _ADDRESS):
            return found
    return None
