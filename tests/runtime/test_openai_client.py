"""The OpenAI package as a client of the gateway: answers, streams, its classes of errors, and leaving early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from backends import Prefer, Served, serving
from openai import (
    APIError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
)

from steersman.runtime.gateway.access import GatewayTenant
from steersman.runtime.gateway.keys import Keys, add_key
from steersman.runtime.gateway.limits import Limits

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
WORDS = ["Fair", " winds", "."]
HELLO = [{"role": "user", "content": "Hello"}]


def _chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


class Engine:
    """Answers as an engine of the field does."""

    def __init__(self) -> None:
        self.pause: asyncio.Event | None = None  # waited for after the first word
        self.left = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if request.path.endswith("embeddings"):
            vectors = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]
            return web.json_response({"object": "list", "data": vectors, "model": "m", "usage": USAGE})
        if not asked.get("stream"):
            if self.pause is not None:
                try:
                    await self.pause.wait()
                except asyncio.CancelledError:
                    self.left.set()
                    raise
            base = {"id": "c1", "created": 1, "model": "m", "usage": USAGE}
            if request.path.endswith("chat/completions"):
                message = {"role": "assistant", "content": "".join(WORDS)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                return web.json_response({**base, "object": "chat.completion", "choices": [choice]})
            choice = {"index": 0, "text": "".join(WORDS), "finish_reason": "stop"}
            return web.json_response({**base, "object": "text_completion", "choices": [choice]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = [_chunk({"role": "assistant"}), *(_chunk({"content": w}) for w in WORDS), _chunk({}, "stop")]
        if asked.get("stream_options", {}).get("include_usage"):
            events.append({**_chunk({}), "choices": [], "usage": USAGE})
        try:
            for i, event in enumerate(events):
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                if i == 1 and self.pause is not None:
                    await self.pause.wait()
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        return response


class Asking:
    """A gateway with keys in front of one engine, and clients of it."""

    def __init__(self, served: Served, engine: Engine, key: str) -> None:
        self.served, self.engine, self.key = served, engine, key
        self.clients: list[AsyncOpenAI] = []

    def client(self, key: str | None = None, **options: object) -> AsyncOpenAI:
        url = f"http://127.0.0.1:{self.served.port}/v1"
        settings = {"max_retries": 0, **options}
        made = AsyncOpenAI(base_url=url, api_key=key or self.key, **settings)  # type: ignore[arg-type]
        self.clients.append(made)
        return made


@asynccontextmanager
async def asking(tmp_path: Path, **tenant: object) -> AsyncIterator[Asking]:
    tenants = {
        "a": GatewayTenant.model_validate({"slo": {"ttft_s": 60.0, "tpot_s": 1.0}, **tenant}),
        "b": GatewayTenant.model_validate({"slo": {"ttft_s": 60.0, "tpot_s": 1.0}}),
    }
    key = add_key(tmp_path / "keys.yaml", "test", "a")
    keys = Keys(tmp_path / "keys.yaml", tenants)
    async with serving(Prefer(0), 1, tenants=tenants, keys=keys) as served:
        engine = Engine()
        served.backends[0].answer = engine
        a = Asking(served, engine, key)
        try:
            yield a
        finally:
            for client in a.clients:
                await client.close()


async def test_models(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        assert [model.id async for model in a.client().models.list()] == ["m"]


async def test_chat(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        raw = await a.client().chat.completions.with_raw_response.create(
            model="m", messages=HELLO, extra_headers={"X-Request-Id": "mine"}
        )
        answer = raw.parse()
        assert answer.choices[0].message.content == "Fair winds."
        assert answer.usage.total_tokens == 8
        assert raw.headers["x-steersman-replica"] == "r0"
        assert raw.headers["x-request-id"] == "mine"
        assert answer._request_id == "mine"


async def test_a_chat_as_a_stream(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        stream = await a.client().chat.completions.create(
            model="m", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert [c.choices[0].delta.content for c in chunks[1:4]] == WORDS
        assert chunks[-1].usage.completion_tokens == 3
        await a.served.idle()
        assert a.served.metric("output_tokens_total", replica="r0") == 3
        assert a.served.metric("ttft_seconds_count", tenant="a") == 1


async def test_completions(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        answer = await a.client().completions.create(model="m", prompt="Hello", max_tokens=5)
        assert answer.choices[0].text == "Fair winds."


async def test_embeddings(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        answer = await a.client().embeddings.create(model="m", input=["Hello"])
        assert answer.data[0].embedding == [0.5, -0.25]
        assert a.served.metric("requests_total", tenant="a", outcome="done") == 1


async def test_a_wrong_key_is_an_authentication_error(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        with pytest.raises(AuthenticationError) as error:
            await a.client("sk-steersman-wrong").chat.completions.create(model="m", messages=HELLO)
        assert error.value.code == "invalid_api_key"
        assert error.value.request_id


async def test_another_tenants_key_is_a_permission_error(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        client = a.client(default_headers={"X-Steersman-Tenant": "b"})
        with pytest.raises(PermissionDeniedError) as error:
            await client.chat.completions.create(model="m", messages=HELLO)
        assert (error.value.code, error.value.param) == ("wrong_tenant", "X-Steersman-Tenant")


async def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        with pytest.raises(NotFoundError, match="known: m") as error:
            await a.client().chat.completions.create(model="nothing", messages=HELLO)
        assert (error.value.code, error.value.param) == ("model_not_found", "model")


async def test_a_prompt_that_is_too_long_is_a_bad_request(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        with pytest.raises(BadRequestError) as error:
            await a.client().chat.completions.create(model="m", messages=HELLO, max_tokens=10_000)
        assert error.value.code == "context_length_exceeded"
        assert error.value.type == "invalid_request_error"


async def test_over_a_limit_is_a_rate_limit_error_with_a_time_to_retry(tmp_path: Path) -> None:
    async with asking(tmp_path, limits=Limits(requests_per_minute=1)) as a:
        await a.client().chat.completions.create(model="m", messages=HELLO)
        with pytest.raises(RateLimitError) as error:
            await a.client().chat.completions.create(model="m", messages=HELLO)
        assert error.value.code == "rate_limit_exceeded"
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 60


async def test_a_fleet_that_fails_is_a_server_error(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        a.served.backends[0].answer, a.served.backends[0].status = None, 500
        with pytest.raises(InternalServerError) as error:
            await a.client().chat.completions.create(model="m", messages=HELLO)
        assert (error.value.status_code, error.value.code) == (502, "replica_failed")
        assert isinstance(error.value, APIStatusError)


async def test_a_replicas_own_refusal_is_the_clients_to_see(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        a.served.backends[0].answer, a.served.backends[0].status = None, 422
        with pytest.raises(APIStatusError) as error:
            await a.client().chat.completions.create(model="m", messages=HELLO)
        assert error.value.status_code == 422


async def test_a_client_that_retries_is_served_when_the_fleet_is_well_again(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        engine, backend = a.served.backends[0].answer, a.served.backends[0]
        assert engine is not None

        async def once(request: web.Request) -> web.StreamResponse:
            await request.read()
            backend.answer = engine
            return web.Response(status=500)

        backend.answer = once
        answer = await a.client(max_retries=2).chat.completions.create(model="m", messages=HELLO)
        assert answer.choices[0].message.content == "Fair winds."


async def test_a_stream_that_breaks_off_is_an_error_with_its_reason(tmp_path: Path) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: " + json.dumps(_chunk({"content": "Fair"})).encode() + b"\n\n")
        return response

    async with asking(tmp_path) as a:
        a.served.backends[0].answer = cut
        stream = await a.client().chat.completions.create(model="m", messages=HELLO, stream=True)
        seen = [(await anext(stream)).choices[0].delta.content]
        with pytest.raises(APIError, match="the answer broke off") as error:
            await anext(stream)
        assert error.value.code == "replica_failed"
        assert seen == ["Fair"]


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_leaving_in_the_middle_of_a_stream_stops_the_replica(tmp_path: Path, how: str) -> None:
    async with asking(tmp_path) as a:
        a.engine.pause = asyncio.Event()
        client = a.client()
        first = asyncio.Event()

        async def read() -> None:
            stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
            async with stream:
                async for chunk in stream:
                    if chunk.choices[0].delta.content:
                        first.set()
                        if how == "close":
                            return

        reading = asyncio.create_task(read())
        await asyncio.wait_for(first.wait(), 10)
        if how == "cancel":
            reading.cancel()
        await asyncio.wait([reading])
        await asyncio.wait_for(a.engine.left.wait(), 10)
        await a.served.idle()
        assert a.served.metric("requests_total", tenant="a", outcome="cancelled") == 1
        assert a.served.gateway.scheduler.inflight(0) == 0


async def test_a_client_that_gives_up_waiting_stops_the_replica(tmp_path: Path) -> None:
    async with asking(tmp_path) as a:
        a.engine.pause = asyncio.Event()
        with pytest.raises(APITimeoutError):
            await a.client(timeout=0.2).chat.completions.create(model="m", messages=HELLO)
        await asyncio.wait_for(a.engine.left.wait(), 10)
        await a.served.idle()
        assert a.served.gateway.scheduler.inflight(0) == 0
