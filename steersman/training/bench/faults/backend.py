"""The mock backend, and what can be wrong with it.

python -m steersman.training.bench.faults.backend PORT

Prints its port (0: a free one is taken), and ends when its standard input does. A line of standard input is the name
of a fault, a key of `FAULTS`, which every completion from then on shows; an empty line ends it. `/health` and
`/metrics` stay well: those are not what a fault is seen by.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import uvloop

from steersman.training.bench.gateway.mock import STREAM_HEAD, Form, MockServer, chunk, plain

WHOLE_S = 0.2  # that an answer takes which is not streamed: long enough to be hit by a fault
DRIP_S = 1e-3  # between two bytes
POISON = "poison"  # a word in a prompt that makes any replica answer with 500
FLOOD = "flood me"  # words in a prompt that ask for megabytes at once
_FLOOD_EVENT, _FLOOD_EVENTS = chunk(b'data: {"choices": [{"text": "%b"}]}\n\n' % (b"word " * 8000)), 150
_ERROR = b'{"error": {"message": "as told", "type": "mock", "code": "mock"}}'


class FaultyServer(MockServer):
    """One connection."""

    fault = ""  # of all connections

    def complete(self, form: Form, request: dict[str, Any]) -> None:
        if FLOOD.encode() in self._body:
            self._flood(form)
        elif POISON.encode() in self._body:
            self.status_500(form, request)
        elif FaultyServer.fault:
            FAULTS[FaultyServer.fault](self, form, request)
        elif request.get("stream"):
            super().complete(form, request)
        else:
            self._whole(form)

    def _whole(self, form: Form) -> None:
        MockServer.running += 1
        self._timer = self._loop.call_later(WHOLE_S, self._last, form.whole)

    def _last(self, data: bytes) -> None:
        self._timer = None
        MockServer.running -= 1
        self._transport.write(data)
        self._over()

    def silent(self, form: Form, request: dict[str, Any]) -> None:
        """Never answer."""

    def drip(self, form: Form, request: dict[str, Any]) -> None:
        """Answer byte by byte."""
        answer = STREAM_HEAD + form.event * 4 + b"".join(form.end(4)) if request.get("stream") else form.whole
        MockServer.running += 1
        self._drop(answer, 0)

    def _drop(self, answer: bytes, sent: int) -> None:
        if sent + 1 == len(answer):
            self._last(answer[sent:])
            return
        self._transport.write(answer[sent : sent + 1])
        self._timer = self._loop.call_later(DRIP_S, self._drop, answer, sent + 1)

    def reset(self, form: Form, request: dict[str, Any]) -> None:
        """Break the connection instead of answering: the peer gets a RST."""
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def head_only(self, form: Form, request: dict[str, Any]) -> None:
        """Close after the head."""
        self._transport.write(
            STREAM_HEAD if request.get("stream") else form.whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        )
        self._transport.close()

    def cut(self, form: Form, request: dict[str, Any]) -> None:
        """Close in the middle of a stream."""
        if not request.get("stream"):
            self._whole(form)
            return
        self._transport.write(STREAM_HEAD + form.event * 3)
        self._transport.close()

    def bad_sse(self, form: Form, request: dict[str, Any]) -> None:
        """A stream whose events are no events, and that has no end."""
        if not request.get("stream"):
            self._whole(form)
            return
        garbage = b'data: {"choices": [{"oops\n\ndata\x00\xff\xfe: [DONE\n\nevent: \r\r\ndata: [DO'
        self._transport.write(STREAM_HEAD + chunk(garbage) + b"0\r\n\r\n")
        self._over()

    def bad_http(self, form: Form, request: dict[str, Any]) -> None:
        """What is no answer of HTTP."""
        self._transport.write(b"HTTP/1.1 fine\r\ncontent-length: some\r\n\r\n\x00\x01")
        self._transport.close()

    def no_done(self, form: Form, request: dict[str, Any]) -> None:
        """A stream that ends well, but without [DONE]."""
        if not request.get("stream"):
            self._whole(form)
            return
        self._transport.write(STREAM_HEAD + form.event * 3 + b"0\r\n\r\n")
        self._over()

    def status_500(self, form: Form, request: dict[str, Any]) -> None:
        """An error of the server."""
        self._status("500 Internal Server Error")

    def status_400(self, form: Form, request: dict[str, Any]) -> None:
        """An error of the client, so the server says."""
        self._status("400 Bad Request")

    def status_429(self, form: Form, request: dict[str, Any]) -> None:
        """Too busy, for a second."""
        self._status("429 Too Many Requests\r\nretry-after: 1")

    def _status(self, status: str) -> None:
        self._transport.write(plain(_ERROR, status))
        self._over()

    def _flood(self, form: Form) -> None:
        self._transport.write(STREAM_HEAD + _FLOOD_EVENT * _FLOOD_EVENTS + b"".join(form.end(_FLOOD_EVENTS)))
        self._over()


FAULTS: dict[str, Callable[[FaultyServer, Form, dict[str, Any]], None]] = {
    "silent": FaultyServer.silent,
    "drip": FaultyServer.drip,
    "reset": FaultyServer.reset,
    "head-only": FaultyServer.head_only,
    "cut": FaultyServer.cut,
    "bad-sse": FaultyServer.bad_sse,
    "bad-http": FaultyServer.bad_http,
    "no-done": FaultyServer.no_done,
    "500": FaultyServer.status_500,
    "400": FaultyServer.status_400,
    "429": FaultyServer.status_429,
}


async def serve(port: int) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(FaultyServer, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    told = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
    async for line in told:
        FaultyServer.fault = line.decode().strip()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
