"""Small servers of the OpenAI API on free ports, and a gateway in front of them, for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
from aiohttp import web
from simulated import TENANTS

from steersman.runtime.fleet import Backend, Fleet
from steersman.runtime.gateway.access import Access, GatewayTenant
from steersman.runtime.gateway.app import Gateway
from steersman.runtime.gateway.audit import Audit
from steersman.runtime.gateway.http.server import HttpLimits, Server
from steersman.runtime.gateway.keys import Keys
from steersman.runtime.gateway.limits import FairShares
from steersman.runtime.replica._health import HealthConfig
from steersman.runtime.replica._pool import Pool
from steersman.runtime.scheduler import Scheduler


def event(text: str | None, **fields: object) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": None}]
    return b"data: " + json.dumps({"choices": choices, **fields}).encode() + b"\n\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
STREAM = [event("a"), event("b"), event("c"), event(None, usage=USAGE), b"data: [DONE]\n\n"]
WHOLE = json.dumps({"object": "text_completion", "choices": [{"text": "abc"}], "usage": USAGE}).encode()


class FakeBackend:
    """A server that answers as told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None  # in place of all below
        self.status = 200
        self.pieces = STREAM
        self.cut = False  # drop the connection after the pieces
        self.dies = False  # drop it before any answer
        self.hold: asyncio.Event | None = None  # wait for it before the last piece, or a whole answer
        self.asked = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.metrics = ""
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.answer is not None:
            return await self.answer(request)
        self.bodies.append(await request.read())
        self.headers.append(request.headers.copy())
        self.asked.set()
        try:
            if self.dies:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            if self.status != 200:
                return web.json_response({"error": {"message": "no"}}, status=self.status)
            if not json.loads(self.bodies[-1]).get("stream"):
                if self.hold is not None:
                    await self.hold.wait()
                return web.Response(body=WHOLE, content_type="application/json")
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for piece in self.pieces[:-1]:
                await response.write(piece)
            if self.hold is not None:
                await self.hold.wait()
            for piece in self.pieces[-1:]:
                await response.write(piece)
            if self.cut:
                assert request.transport is not None
                request.transport.abort()
            return response
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/v1/embeddings", self.complete)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.show_metrics)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        self._site = web.TCPSite(self._runner, "127.0.0.1", port)
        await self._site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics)

    async def stop_listening(self) -> None:
        assert self._site is not None
        await self._site.stop()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


class Prefer:
    """A policy that ranks candidates in a fixed order, best first; others come after them."""

    name = "prefer"

    def __init__(self, *order: int) -> None:
        self.order = order

    def score(self, rows: np.ndarray, mask: np.ndarray) -> list[float]:
        return [float(-self.order.index(c)) if c in self.order else -9.0 for c in range(len(mask))]


def fleet_of(backends: list[FakeBackend], **options: object) -> Fleet:
    base = {"profile": "llama-3.1-8b-h100-bf16", "model": "m", "kv_tokens": 20000, "max_model_len": 4000}
    groups = [
        {**base, "name": f"r{i}", "backend": {"kind": "openai", "options": {"url": b.url, **options}}}
        for i, b in enumerate(backends)
    ]
    return Fleet.model_validate({"description": "For tests.", "replicas": groups})


class Served:
    """A gateway in front of fake backends, and a client of it."""

    def __init__(
        self, gateway: Gateway, client: aiohttp.ClientSession, backends: list[FakeBackend], server: Server
    ) -> None:
        self.gateway = gateway
        self.client = client
        self.backends = backends
        self.server, self.port = server, server.port

    def metric(self, name: str, **labels: str) -> float:
        value = self.gateway.metrics.registry.get_sample_value(f"steersman_{name}", labels)
        return 0.0 if value is None else value

    async def idle(self) -> None:
        """Wait until the gateway has counted the end of every request."""
        await self.gateway.idle()


@asynccontextmanager
async def serving(
    policy: object,
    count: int = 2,
    *,
    fleet: Fleet | None = None,
    tenants: Mapping[str, GatewayTenant] | None = None,
    keys: Keys | None = None,
    fair: FairShares | None = None,
    audit: Audit | None = None,
    limits: HttpLimits | None = None,
    health: HealthConfig | None = None,
    **options: object,
) -> AsyncIterator[Served]:
    """`count` fake backends behind a gateway with `policy`, on a free port."""
    backends = [FakeBackend() for _ in range(count)]
    for backend in backends:
        await backend.start()
    fleet = fleet_of(backends, **options) if fleet is None else at(fleet, backends)
    pool = Pool(fleet, health)
    await pool.start()
    access = Access(fleet, tenants or {n: GatewayTenant(**t.model_dump()) for n, t in TENANTS.items()}, keys)
    slack = {"policy_limit_s": 10.0}  # a busy machine is no reason for a fallback here
    scheduler = Scheduler(fleet, access.rows, policy, Prefer(*range(count)), **slack)  # type: ignore[arg-type]
    gateway = Gateway(scheduler, pool, access, fair=fair, audit=audit, open_metrics=keys is None)
    server = Server(gateway.handle, limits)
    await server.start(host="127.0.0.1", port=0)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as client:
            yield Served(gateway, client, backends, server)
    finally:
        await server.stop()
        gateway.relay.close()
        await pool.stop()
        for backend in backends:
            await backend.stop()


def at(fleet: Fleet, backends: list[FakeBackend]) -> Fleet:
    """The fleet, with a fake backend behind each of its replicas, in order."""
    groups = [
        group.model_copy(update={"backend": Backend(kind="openai", options={"url": backend.url})})
        for group, backend in zip(fleet.replicas, backends, strict=True)
    ]
    return fleet.model_copy(update={"replicas": groups})
