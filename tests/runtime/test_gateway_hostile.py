"""Clients and replicas that mean no good, at the whole gateway: answered in the API's form, or cut off."""

from __future__ import annotations

import asyncio
import io
import json
import math
import socket

import numpy as np
import pytest
from aiohttp import web
from backends import STREAM, USAGE, Prefer, Served, event, serving
from wire import scripted

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.http.server import HttpLimits
from steersman.runtime.gateway.prompt import read_call
from steersman.runtime.replica._metrics import parse
from steersman.runtime.replica._stream import EventCounter, usage_of

PATH = "/v1/completions"
BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}
DEEP = b"[" * 1000 + b"]" * 1000


def behind(s: Served, port: int) -> None:
    """Another server stands behind the first replica."""
    replica = s.gateway.pool.replicas[0]
    options = replica._options.model_copy(update={"url": f"http://127.0.0.1:{port}"})  # type: ignore[attr-defined]
    replica._options = options  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": [' + DEEP + b"]}]}",
        b'{"messages": [{"role": "user", "content": "x", "tool_calls": ' + DEEP + b"}]}",
        b'{"messages": [{"role": ' + DEEP + b"}]}",
        b'{"messages": [], "tools": ' + DEEP + b"}",
        b'{"prompt": [[' + DEEP + b"]]}",
        b'{"prompt": "x", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_a_body_that_is_nested_without_end_is_400(body: bytes) -> None:
    async with serving(Prefer(0, 1)) as s, s.client.post(PATH, data=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_json"


async def test_odd_values_are_the_replicas_to_judge() -> None:
    async with serving(Prefer(0, 1), model="theirs") as s:
        async with s.client.post(PATH, json={**BODY, "x": "é\u2028", "n": 1.5}) as response:
            assert response.status == 200
        assert json.loads(s.backends[0].bodies[0]) == {**BODY, "model": "theirs", "x": "é\u2028", "n": 1.5}


async def test_a_giant_name_of_a_model_is_not_repeated() -> None:
    body = json.dumps({**BODY, "model": "x" * 5_000_000}).encode()
    async with serving(Prefer(0, 1)) as s, s.client.post(PATH, data=io.BytesIO(body)) as response:
        assert response.status == 404
        assert len(await response.read()) < 1000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [2**70]},
        {"prompt": [-(2**63)]},
        {"prompt": []},
        {"prompt": {}},
        {"prompt": None},
        {"prompt": [[1, 2], "x", None, True]},
        {"prompt": "x", "max_tokens": 2**31},
        {"prompt": "x", "max_tokens": True},
        {"prompt": "x", "stream": "yes"},
        {"messages": [{"content": [None, {"text": None}, {"text": {"a": 1}}, 3]}]},
        {"messages": [{}], "tools": 5},
        {"model": ["m"], "prompt": "x"},
        {"model": "", "prompt": "x"},
    ],
)
async def test_odd_fields_are_refused_or_passed_on_and_never_a_failure(body: dict[str, object]) -> None:
    async with serving(Prefer(0, 1)) as s, s.client.post(PATH, json={"model": "m", "max_tokens": 2} | body) as response:
        assert response.status in (200, 400, 404)


MANY = {
    "messages": b'{"messages": [' + b"{}," * 40_000 + b"{}]}",
    "contents": b'{"messages": [{"content": [' + b'"",' * 40_000 + b'""]}]}',
    "prompts": b'{"prompt": [' + b'"",' * 40_000 + b'""]}',
    "values": b'{"prompt": "", "x": [' + b"[]," * 1_000_001 + b"[]]}",
}


@pytest.mark.parametrize("body", MANY.values(), ids=MANY)
def test_a_body_of_countless_parts_is_refused_before_it_is_read_through(body: bytes) -> None:
    with pytest.raises(ApiError, match="more than") as error:
        read_call(body)
    assert error.value.status == 400


def test_a_long_prompt_is_told_apart_by_its_first_million_tokens() -> None:
    call = read_call(json.dumps({"prompt": "x" * 8_000_000}).encode())
    assert (call.prompt_bytes, len(call.keys)) == (8_000_000, 16_384)
    assert read_call(json.dumps({"prompt": [7] * 100_000}).encode()).exact_tokens == 100_000


async def test_an_endless_answer_is_passed_on_and_not_kept() -> None:
    size = 30_000_000

    async def large(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"x" * size, content_type="application/json")

    async with serving(Prefer(0, 1)) as s:
        s.backends[0].answer = large
        async with s.client.post(PATH, json=BODY) as response:
            await response.content.readexactly(12_000_000)
            (attempt,) = s.gateway.relay.attempts[0]
            assert attempt._parts == []
            assert len(await response.read()) == size - 12_000_000
        await s.idle()
        assert s.metric("requests_total", tenant="strict", outcome="done") == 1


def test_embeddings_need_an_input() -> None:
    assert read_call(b'{"input": "x"}', embeds=True).max_tokens == 1
    with pytest.raises(Exception, match="the body needs 'input'"):
        read_call(b'{"prompt": "x"}', embeds=True)


# Back-pressure from a client through the gateway to a replica


async def test_a_client_that_does_not_read_stops_the_replica_and_is_cut_off() -> None:
    sent = 0
    left = asyncio.Event()

    async def pour(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        piece = event("x" * 60_000)
        try:
            while True:
                await response.write(piece)
                sent += len(piece)
        except (asyncio.CancelledError, ConnectionError):
            left.set()
            raise

    async with serving(Prefer(0, 1), limits=HttpLimits(write_timeout_s=60.0)) as s:
        s.backends[0].answer = pour
        client = socket.create_connection(("127.0.0.1", s.port))
        body = json.dumps({**BODY, "stream": True}).encode()
        client.sendall(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(body)) + body)
        try:
            before, still = -1, 0
            async with asyncio.timeout(20):
                while sent == 0 or still < 30:
                    still = still + 1 if sent == before else 0
                    before = sent
                    await asyncio.sleep(0.005)
            (protocol,) = [c for c in s.server.connections if c.current is not None]
            assert protocol.stalled
            assert protocol.transport is not None
            assert protocol.transport.get_write_buffer_size() < 1 << 20
            s.gateway.sweep(protocol.server.loop.time() + 1e6)  # the replica is not to blame for its silence
            assert not left.is_set()
            protocol.check(protocol.server.loop.time() + 61.0)
            await asyncio.wait_for(left.wait(), 10)
            await s.idle()
            assert s.metric("requests_total", tenant="strict", outcome="cancelled") == 1
            assert s.gateway.scheduler.inflight(0) == 0
        finally:
            client.close()


async def test_a_slow_reader_of_a_large_answer_does_not_harm_the_next_request() -> None:
    async def large(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"x" * 6_000_000, content_type="application/json")

    async with serving(Prefer(0, 1)) as s:
        s.backends[0].answer = large
        body = json.dumps(BODY).encode()
        slow = socket.create_connection(("127.0.0.1", s.port))
        try:
            slow.sendall(
                b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(body)) + body
            )
            async with asyncio.timeout(10):
                while not any(c.stalled for c in s.server.connections):
                    await asyncio.sleep(0.005)
                async with s.client.post(PATH, data=body) as response:
                    assert len(await response.read()) == 6_000_000
        finally:
            slow.close()


async def test_a_replica_that_closed_an_idle_connection_is_asked_once_more() -> None:
    """A server may close just as the next request goes out: that is no failure of it."""
    asked = 0

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        for _ in range(2):
            await reader.readuntil(b"}")
            asked += 1
            if asked == 2:
                break  # the second request on the first connection: gone
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with serving(Prefer(0, 1)) as s, scripted(serve_one) as port:
        behind(s, port)
        for _ in range(2):
            async with s.client.post(PATH, json=BODY) as response:
                assert await response.read() == b"{}"
                assert response.headers["X-Steersman-Replica"] == "r0"
        assert asked == 3
        assert s.metric("errors_total", replica="r0", kind="connect") == 0


# Replicas that speak nonsense


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -5, "completion_tokens": -7},
        {"prompt_tokens": 10**30, "completion_tokens": 3},
        {"prompt_tokens": True, "completion_tokens": 3},
        {"prompt_tokens": 1.5, "completion_tokens": "3"},
        [],
        "none",
    ],
)
async def test_a_usage_that_cannot_be_is_left_out(usage: object) -> None:
    assert usage_of(json.dumps({"usage": usage}).encode()) is None
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].pieces = [*STREAM[:3], event(None, usage=usage), STREAM[-1]]
        async with s.client.post(PATH, json={**BODY, "stream": True}) as response:
            assert (await response.read()).endswith(b"[DONE]\n\n")
        await s.idle()
        view = s.gateway.scheduler.book.views[0]
        assert (view["inflight"], view["context_tokens"]) == (0, 0)
        assert s.metric("output_tokens_total", replica="r0") == 3


@pytest.mark.parametrize(
    "pieces",
    [
        [b"data: {not json}\n\n", b"data: [DONE]\n\n"],
        [b"data: " + b"[" * 5000 + b"\n\n", b"data: [DONE]\n\n"],
        [b"data: []\n\ndata: 3\n\ndata: null\n\n", b"data: [DONE]\n\n"],
        [b'data: {"choices": [3, null, {"delta": 5}, {"text": 7}]}\n\n', b"data: [DONE]\n\n"],
        [b'data: {"choices": {"a": 1}}\r\n\r\n', b"data: [DONE]\r\n\r\n"],
        [b"\xff\xfe\0\n\n", b"data:[DONE]\n\n"],
        [b": ping\n\nevent: x\nretry: 3\nid: 4\n\n", b"data: [DONE]\n\n"],
    ],
)
async def test_a_malformed_stream_passes_through_and_counts_do_not_drift(pieces: list[bytes]) -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].pieces = pieces
        async with s.client.post(PATH, json={**BODY, "stream": True}) as response:
            assert await response.read() == b"".join(pieces)
        await s.idle()
        view = s.gateway.scheduler.book.views[0]
        assert (view["inflight"], view["prefilling"], view["context_tokens"]) == (0, 0, 0)
        assert s.metric("requests_total", tenant="strict", outcome="done") == 1


async def test_a_stream_whose_connection_breaks_after_done_was_whole() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in STREAM:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    async with serving(Prefer(0, 1)) as s, scripted(serve) as port:
        behind(s, port)
        async with s.client.post(PATH, json={**BODY, "stream": True}) as response:
            assert await response.read() == b"".join(STREAM)
        await s.idle()
        assert s.metric("requests_total", tenant="strict", outcome="done") == 1
        assert s.metric("requests_total", tenant="strict", outcome="failed") == 0
        assert s.metric("errors_total", replica="r0", kind="cut") == 0


def test_a_stream_in_one_endless_line_is_not_kept() -> None:
    counter = EventCounter()
    for _ in range(20):
        counter.feed(b"x" * (1 << 20))
    assert len(counter._rest) <= 5 << 20


async def test_headers_of_a_replica_cannot_forge_the_gateways() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Request-Id: theirs\r\nX-Steersman-Replica: other\r\n"
            b"Trailer: X\r\nKeep-Alive: timeout=9\r\nX-Other: kept\r\n\r\n{}"
        )
        await reader.read()

    async with serving(Prefer(0, 1)) as s, scripted(serve) as port:
        behind(s, port)
        async with s.client.post(PATH, json=BODY, headers={"X-Request-Id": "mine"}) as response:
            assert response.headers.getall("X-Request-Id") == ["mine"]
            assert response.headers.getall("X-Steersman-Replica") == ["r0"]
            assert response.headers["X-Other"] == "kept"
            assert "Keep-Alive" not in response.headers


@pytest.mark.parametrize("said", ["nan", "-1", "1e999", "Wed, 21 Oct 2026 07:28:00 GMT", "", "5"])
async def test_a_busy_replica_cools_whatever_it_says_and_is_not_broken(said: str) -> None:
    async def busy(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=429, headers={"Retry-After": said})

    async with serving(Prefer(0, 1)) as s:
        for backend in s.backends:
            backend.answer = busy
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 429
            assert (await response.json())["error"]["code"] == "busy"
            assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert s.gateway.pool.health[0]._opened == 0


@pytest.mark.parametrize("figure", ["NaN", "+Inf", "-3", "1e400", "x"])
def test_figures_that_cannot_be_are_not_read(figure: str) -> None:
    text = f"vllm:num_requests_running 2\nvllm:num_requests_waiting {figure}\nvllm:kv_cache_usage_perc {figure}\n"
    figures = parse(text)
    assert figures is not None
    assert (figures.running, figures.waiting, figures.kv_use) == (2.0, 0.0, 0.0)
    assert math.isnan(figures.prefix_hit_rate)
    assert np.isfinite(figures[:3]).all()


def test_the_usage_of_a_stream_is_the_last_that_can_be() -> None:
    counter = EventCounter()
    counter.feed(
        event("a") + event(None, usage=USAGE) + event(None, usage={"prompt_tokens": -1, "completion_tokens": 1})
    )
    assert counter.usage is not None
    assert counter.usage.completion_tokens == 3
