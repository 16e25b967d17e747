"""A fast mock of an inference server, so that what is measured is the router before it.

python -m steersman.training.bench.gateway.mock

Prints its port, and ends when its standard input does: it cannot outlive who started it. A request without `stream`
is answered at once; with it, `max_tokens` events come one by one, each a write of its own, `gap_ms` apart. The gap is
read from the prompt: not every router passes fields on that it does not know, nor `user`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

import httptools
import uvloop

MODEL = "bench"
PROMPT_TOKENS = 256
GAP_MS = 2.0
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_GAP = re.compile(rb"gap_ms=([0-9.]+)")


def gap_prompt(gap_ms: float) -> str:
    """The words in a prompt that ask for events `gap_ms` milliseconds apart."""
    return f"gap_ms={gap_ms:g}"


def plain(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """A whole answer."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    """A piece of a body of unknown length."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Form:
    """The answers of one endpoint, made once."""

    def __init__(self, kind: str, whole: dict[str, Any], part: dict[str, Any]) -> None:
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 16, "total_tokens": PROMPT_TOKENS + 16}
        common = {"id": "cmpl-0", "created": 0, "model": MODEL}
        self._last = {**common, "object": f"{kind}.chunk" if "." in kind else kind, "choices": []}
        choice = {"index": 0, "logprobs": None}
        answer = {**common, "object": kind, "choices": [{**choice, **whole, "finish_reason": "stop"}], "usage": usage}
        event = {**self._last, "choices": [{**choice, **part, "finish_reason": None}]}
        self.whole = plain(json.dumps(answer).encode())
        self.event = chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def end(self, events: int) -> tuple[bytes, bytes]:
        """The event with the usage, and what ends the stream."""
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": events, "total_tokens": PROMPT_TOKENS + events}
        last = json.dumps({**self._last, "usage": usage}).encode()
        return chunk(b"data: " + last + b"\n\n"), chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


_FORMS = {
    b"/v1/completions": Form("text_completion", {"text": " word" * 16}, {"text": " word"}),
    b"/v1/chat/completions": Form(
        "chat.completion",
        {"message": {"role": "assistant", "content": " word" * 16}},
        {"delta": {"content": " word"}},
    ),
}
# What routers of the field ask of a worker before they send it requests. No `model_path`: they would look for it.
_INFO = {"served_model_name": MODEL, "is_generation": True, "dp_size": 1}
_PAGES = {
    b"/health": plain(b"", kind="text/plain"),
    b"/health_generate": plain(b"", kind="text/plain"),
    b"/v1/models": plain(
        json.dumps(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "mock"}]}
        ).encode()
    ),
    **{
        path: plain(json.dumps(_INFO).encode())
        for path in (b"/get_server_info", b"/server_info", b"/get_model_info", b"/model_info")
    },
}
_NOT_FOUND = plain(b'{"error": {"message": "not served here", "code": 404}}', "404 Not Found")


class MockServer(asyncio.Protocol):
    """One connection; uvloop has set TCP_NODELAY on it."""

    running = 0  # of all connections, for /metrics

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._url, self._body = b"", b""

    def connection_made(self, transport: Any) -> None:  # uvloop's is no subclass of asyncio's
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            MockServer.running -= 1

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        form = _FORMS.get(self._url)
        if form is None:
            self._page()
        else:
            self.complete(form, json.loads(self._body))

    def complete(self, form: Form, request: dict[str, Any]) -> None:
        """Answer a completion."""
        if not request.get("stream"):
            self._transport.write(form.whole)
            self._over()
            return
        MockServer.running += 1
        events = int(request.get("max_tokens") or request["max_completion_tokens"])  # routers may use the newer name
        gap = _GAP.search(self._body)
        self._transport.write(STREAM_HEAD)
        self._stream(form, 0, events, self._loop.time(), float(gap[1] if gap else GAP_MS) / 1e3)

    def _stream(self, form: Form, sent: int, events: int, started_s: float, gap_s: float) -> None:
        """Write an event, or the end. Times are counted from the start, so that delays do not add up."""
        if sent < events:
            self._transport.write(form.event)
            delay_s = started_s + (sent + 1) * gap_s - self._loop.time()
            self._timer = self._loop.call_later(
                max(0.0, delay_s), self._stream, form, sent + 1, events, started_s, gap_s
            )
            return
        self._timer = None
        MockServer.running -= 1
        for part in form.end(events):
            self._transport.write(part)
        self._over()

    def _page(self) -> None:
        if self._url == b"/metrics":
            figures = {"running": MockServer.running, "waiting": 0}
            lines = [f'vllm:num_requests_{k}{{model_name="{MODEL}"}} {v:.1f}' for k, v in figures.items()]
            lines.append(f'vllm:kv_cache_usage_perc{{model_name="{MODEL}"}} {min(1.0, MockServer.running / 1e4)}')
            self._transport.write(plain("".join(line + "\n" for line in lines).encode(), kind="text/plain"))
        else:
            self._transport.write(_PAGES.get(self._url.partition(b"?")[0], _NOT_FOUND))
        self._over()

    def _over(self) -> None:
        if not self._parser.should_keep_alive():
            self._transport.close()


async def serve() -> None:
    """Serve on a free port until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(MockServer, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()


if __name__ == "__main__":
    uvloop.run(serve())
