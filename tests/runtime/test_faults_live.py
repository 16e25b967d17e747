"""What becomes of requests when replicas break: `steersman bench faults` in little, with fake backends."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest
import uvloop
from aiohttp import web
from backends import STREAM, WHOLE, FakeBackend, Prefer, Served, serving

from steersman.runtime.gateway.attempt import Attempt, AttemptFailed
from steersman.runtime.gateway.descriptors import room
from steersman.runtime.gateway.http.upstream import Upstream
from steersman.runtime.replica import Scraped
from steersman.runtime.replica._health import HealthConfig, Status
from steersman.runtime.replica._metrics import parse

BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}
STREAMED = {**BODY, "stream": True}
PATH = "/v1/completions"
HANGS = HealthConfig(read_timeout_s=0.01)


async def whole(s: Served) -> str:
    """Ask for a whole answer. Returns who gave it."""
    async with s.client.post(PATH, json=BODY) as response:
        assert await response.read() == WHOLE
        return response.headers["X-Steersman-Replica"]


async def hanging(s: Served, replica: int, body: dict[str, object] = BODY) -> asyncio.Task[aiohttp.ClientResponse]:
    """A request that `replica` has, and does not answer."""
    backend = s.backends[replica]
    backend.hold = asyncio.Event()
    backend.asked.clear()
    asking = asyncio.create_task(s.client.post(PATH, json=body))
    await backend.asked.wait()
    return asking


def swept(s: Served, *gaps_s: float) -> None:
    """Let so much time pass for the gateway between looks at who is silent."""
    at_s = asyncio.get_running_loop().time()
    s.gateway.sweep(at_s)
    for gap_s in gaps_s:
        s.gateway.sweep(at_s := at_s + gap_s)


@pytest.mark.parametrize("cut", [False, True])
async def test_a_replica_whose_streams_never_end_well_is_left_out(cut: bool) -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].pieces, s.backends[0].cut = STREAM[:2], cut
        for _ in range(3):
            async with s.client.post(PATH, json=STREAMED) as response:
                assert b"replica_failed" in await response.read()
        assert s.gateway.pool.status(0) is Status.OPEN
        async with s.client.post(PATH, json=STREAMED) as response:
            assert await response.read() == b"".join(STREAM)


async def test_answers_of_4xx_never_open_the_breaker() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].status = 400
        for _ in range(10):
            async with s.client.post(PATH, json=BODY) as response:
                assert response.status == 400
        assert s.gateway.pool.status(0) is Status.UP
        assert not s.backends[1].bodies


async def test_a_silent_replica_is_not_asked_twice_for_one_request() -> None:
    async with serving(Prefer(0, 1), health=HANGS) as s:
        assert await whole(s) == "r0"  # its connection is now one that was used before
        asking = await hanging(s, 0)
        swept(s, 1.0)
        async with await asking as response:
            assert response.headers["X-Steersman-Replica"] == "r1"
        assert [len(backend.bodies) for backend in s.backends] == [2, 1]
        assert s.metric("errors_total", replica="r0", kind="broke") == 1


async def test_a_gateway_that_stood_still_takes_nobody_for_silent() -> None:
    async with serving(Prefer(0, 1), health=HANGS) as s:
        asking = await hanging(s, 0)
        swept(s, 100.0)
        assert s.backends[0].hold is not None
        s.backends[0].hold.set()
        async with await asking as response:
            assert response.headers["X-Steersman-Replica"] == "r0"


async def test_a_gateway_that_is_always_late_still_gives_up_who_is_silent() -> None:
    async with serving(Prefer(0, 1), health=HANGS) as s:
        asking = await hanging(s, 0)
        swept(s, 3.0, 3.0)
        async with await asking as response:
            assert response.headers["X-Steersman-Replica"] == "r1"


@pytest.mark.parametrize("body", [BODY, STREAMED])
async def test_what_a_dead_replica_owes_the_first_byte_of_goes_elsewhere(body: dict[str, object]) -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].pieces = [b"never sent"]
        asking = await hanging(s, 0, body)
        s.gateway.replica_changed(0, Status.DOWN)
        async with await asking as response:
            assert response.headers["X-Steersman-Replica"] == "r1"
            assert await response.read() == (WHOLE if body is BODY else b"".join(STREAM))
        assert s.gateway.scheduler.inflight(0) == 0


async def test_a_stream_that_has_begun_waits_for_a_frozen_replica() -> None:
    async with serving(Prefer(0, 1)) as s:
        async with await (await hanging(s, 0, STREAMED)) as response:
            await response.content.readuntil(b"\n\n")
            s.gateway.replica_changed(0, Status.DOWN)
            assert s.backends[0].hold is not None
            s.backends[0].hold.set()
            assert (await response.read()).endswith(STREAM[-1])
        assert not s.backends[1].bodies


async def test_a_stream_does_not_wait_for_ever_for_a_replica_that_is_down() -> None:
    async with serving(Prefer(0, 1)) as s, await (await hanging(s, 0, STREAMED)) as response:
        await response.content.readuntil(b"\n\n")
        swept(s, *[2.0] * 16)
        assert s.gateway.inflight == 1
        s.gateway.pool.health[0].looked(s.gateway.scheduler.now, False)
        swept(s, *[2.0] * 16)
        assert b"replica_failed" in await response.read()


async def test_all_that_a_dead_replica_held_is_served_and_its_breaker_opens_once() -> None:
    async with serving(Prefer(0, 1), health=HealthConfig(backoff_s=0.05, ramp_s=0.0)) as s:
        asking = [asyncio.create_task(whole(s)) for _ in range(20)]
        s.backends[0].hold = asyncio.Event()
        async with asyncio.timeout(10):
            while len(s.backends[0].bodies) < 20:
                await asyncio.sleep(0.005)
        for attempt in list(s.gateway.relay.attempts[0]):
            attempt.give_up("it was killed")
        assert set(await asyncio.gather(*asking)) == {"r1"}
        health, now = s.gateway.pool.health[0], s.gateway.scheduler.now
        assert health.status(now + 0.06) is Status.UP


async def test_a_replica_that_gives_500_to_what_another_one_answers_is_left_out() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].status = 500
        for _ in range(3):
            assert await whole(s) == "r1"
        assert s.gateway.pool.status(0) is Status.OPEN


async def test_a_request_that_every_replica_gives_500_to_takes_none_of_them_out() -> None:
    async with serving(Prefer(0, 1)) as s:
        for backend in s.backends:
            backend.status = 500
        for _ in range(10):
            async with s.client.post(PATH, json=BODY) as response:
                assert response.status == 502
        assert [s.gateway.pool.status(r) for r in range(2)] == [Status.UP, Status.UP]


async def test_a_lone_replica_that_gives_500_is_left_out() -> None:
    async with serving(Prefer(0), 1) as s:
        s.backends[0].status = 500
        for _ in range(3):
            async with s.client.post(PATH, json=BODY) as response:
                assert response.status == 502
        assert s.gateway.pool.status(0) is Status.OPEN


async def test_a_request_that_kills_replicas_does_not_kill_them_all() -> None:
    async with serving(Prefer(0, 1, 2, 3), 4) as s:
        for backend in s.backends:
            backend.dies = True
        async with s.client.post(PATH, json=STREAMED) as response:
            assert response.status == 502
        assert [len(backend.bodies) for backend in s.backends] == [1, 1, 1, 0]
        assert s.gateway.inflight == 0


async def test_nor_where_their_connections_were_used_before() -> None:
    policy = Prefer()
    async with serving(policy, 4) as s:
        for replica, backend in enumerate(s.backends):
            policy.order = (replica,)
            assert await whole(s) == f"r{replica}"
            backend.bodies.clear()
            backend.answer = dying(backend)
        policy.order = (0, 1, 2, 3)
        async with s.client.post(PATH, json=STREAMED) as response:
            assert response.status == 502
        assert [len(backend.bodies) for backend in s.backends] == [1, 1, 1, 0]


def dying(backend: FakeBackend) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """What `backend` does with a request that ends its process."""

    async def die(request: web.Request) -> web.StreamResponse:
        backend.bodies.append(await request.read())
        await backend.stop_listening()
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    return die


async def test_with_every_breaker_open_a_request_is_told_when_to_come_again() -> None:
    async with serving(Prefer(0, 1)) as s:
        for backend in s.backends:
            await backend.stop()
        for _ in range(3):
            async with s.client.post(PATH, json=BODY) as response:
                assert response.status == 502
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
        assert s.gateway.inflight == 0


async def test_a_replica_whose_code_fails_is_down_and_still_watched() -> None:
    async with serving(Prefer(0, 1), health=HealthConfig(scrape_s=0.01, recheck_s=0.01)) as s:
        replica, pool = s.gateway.pool.replicas[0], s.gateway.pool
        changes: asyncio.Queue[tuple[int, Status]] = asyncio.Queue()

        async def broken(session: aiohttp.ClientSession) -> bool:
            raise RuntimeError("a bug")

        well: Callable[[aiohttp.ClientSession], Awaitable[bool]] = replica.healthy
        replica.healthy = broken  # type: ignore[method-assign]
        pool.on_change = lambda r, status: changes.put_nowait((r, status))
        pool.watch(s.gateway.scheduler)
        async with asyncio.timeout(10):
            assert await changes.get() == (0, Status.DOWN)
            replica.healthy = well  # type: ignore[method-assign, assignment]
            assert await changes.get() == (0, Status.RAMPING)


def test_figures_that_are_no_numbers_are_no_figures() -> None:
    text = "vllm:num_requests_running NaN\nvllm:num_requests_waiting +Inf\nvllm:kv_cache_usage_perc 0.5\n"
    assert parse(text) is None
    assert parse("vllm:num_requests_running 1\n" + text) == Scraped(1.0, 0.0, 0.5)


@pytest.mark.parametrize("status", [500, 429])
async def test_a_connection_that_is_free_again_is_left_alone(status: int) -> None:
    class Free:
        """A connection whose answer comes whole and at once; another request may have it then."""

        aborted = False

        def send(self, head: bytes, body: bytes, attempt: Attempt) -> None:
            attempt.head(status, [])
            attempt.end()

        def pause(self, paused: bool) -> None: ...

        def abort(self) -> None:
            self.aborted = True

        def idle(self) -> Free:
            return self

    async with serving(Prefer(0, 1)) as s:
        connection, exchange = Free(), SimpleNamespace(on_pause=None, started=False)
        told: asyncio.Future[AttemptFailed] = asyncio.get_running_loop().create_future()
        owner = SimpleNamespace(suspects=[], failed=told.set_result)
        attempt = Attempt(s.gateway.relay, exchange, None, SimpleNamespace(replica=0), owner)  # type: ignore[arg-type]
        attempt.start(connection, b"", b"")  # type: ignore[arg-type]
        await told
        assert not connection.aborted
        assert exchange.on_pause is None


async def test_hundreds_of_clients_that_leave_leave_nothing_behind() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].hold = asyncio.Event()
        fresh = s.gateway.scheduler.book.views.copy()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\n".encode()
        for body in (BODY, STREAMED):
            data = json.dumps(body).encode()
            for wait in (False, True):
                leaving = []
                for _ in range(50):
                    _, writer = await asyncio.open_connection("127.0.0.1", s.port)
                    writer.write(head + b"content-length: %d\r\n\r\n" % len(data) + data)
                    leaving.append(writer)
                if wait:
                    await s.backends[0].asked.wait()
                for writer in leaving:
                    writer.transport.abort()
                async with asyncio.timeout(10):
                    while s.gateway.inflight:
                        await asyncio.sleep(0.005)
        views = s.gateway.scheduler.book.views
        for name in ("inflight", "prefilling", "prefill_tokens", "prompt_tokens", "context_tokens"):
            assert np.array_equal(views[name], fresh[name])
        assert s.gateway.limiter.total == 0
        assert not any(s.gateway.relay.attempts)


def test_clients_get_no_more_descriptors_than_leave_one_for_their_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, taken: limits.append(taken))
    clients = room()
    assert limits[-1] == (4096, 4096)
    assert clients is not None
    assert 1500 < clients < 2048


def test_a_connection_that_nobody_waits_for_is_forgotten() -> None:
    async def connect_and_leave() -> int:
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        for turns in range(100):
            connecting = asyncio.create_task(upstream.connect())
            for _ in range(turns % 8):
                await asyncio.sleep(0)
            connecting.cancel()
            for made in await asyncio.gather(connecting, return_exceptions=True):
                if not isinstance(made, BaseException):
                    made.abort()
        server.close()
        await server.wait_closed()
        async with asyncio.timeout(10):
            while upstream.open:
                await asyncio.sleep(0.005)
        return len(upstream.open)

    assert uvloop.run(connect_and_leave()) == 0
