"""The gateway over HTTP, against fake backends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
from collections.abc import Awaitable, Callable

import aiohttp
import numpy as np
import pytest
from backends import STREAM, WHOLE, FakeBackend, Prefer, Served, event, fleet_of, serving

from steersman.runtime.gateway.app import Phase
from steersman.runtime.gateway.attempt import Attempt
from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.http.server import HttpLimits
from steersman.runtime.gateway.passage import Passage
from steersman.runtime.observation import COLUMN
from steersman.runtime.replica._health import HealthConfig, Status
from steersman.runtime.ticket import LiveRequest, Ticket

BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}
STREAMED = {**BODY, "stream": True}
PATH = "/v1/completions"


async def error_of(response: aiohttp.ClientResponse) -> dict[str, object]:
    body = await response.json()
    assert set(body) == {"error"}
    return body["error"]


async def test_a_whole_answer_passes_through_byte_for_byte() -> None:
    async with serving(Prefer(1, 0)) as s:
        body = json.dumps(BODY, indent=3).encode()
        async with s.client.post(PATH, data=body, headers={"X-Request-Id": "abc"}) as response:
            assert await response.read() == WHOLE
            assert response.headers["X-Steersman-Replica"] == "r1"
            assert response.headers["X-Request-Id"] == "abc"
        assert s.backends[1].bodies == [body]
        assert s.backends[1].headers[0]["X-Request-Id"] == "abc"
        assert s.metric("decisions_total", replica="r1") == 1
        assert s.metric("e2e_seconds_count", tenant="strict") == 1
        assert s.metric("output_tokens_total", replica="r1") == 3
        assert s.gateway.scheduler.inflight(1) == 0


async def test_a_stream_passes_through_byte_for_byte_and_is_measured() -> None:
    async with serving(Prefer(0, 1)) as s:
        async with s.client.post(PATH, json=STREAMED) as response:
            assert response.content_type == "text/event-stream"
            assert await response.read() == b"".join(STREAM)
        await s.idle()
        for name in ("ttft", "tpot", "e2e"):
            assert s.metric(f"{name}_seconds_count", tenant="strict") == 1
        assert s.metric("output_tokens_total", replica="r0") == 3
        assert s.metric("requests_total", tenant="strict", outcome="done") == 1


@pytest.mark.parametrize("body", [BODY, STREAMED], ids=["whole", "stream"])
async def test_what_a_request_made_is_freed_without_the_garbage_collector(body: dict[str, object]) -> None:
    async with serving(Prefer(0, 1)) as s:
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)  # what it finds is kept, to be looked at
        try:
            for failing in (False, True):
                s.backends[0].status = 500 if failing else 200
                async with s.client.post(PATH, json=body) as response:
                    assert response.status == 200
                    await response.read()
                await s.idle()
            gc.collect()
            found = {type(thing) for thing in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        assert not found & {Passage, Attempt, Exchange, Ticket, LiveRequest}


async def test_a_client_that_leaves_at_done_was_served() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].pieces = [*STREAM, b": kept open\n\n"]
        s.backends[0].hold = asyncio.Event()
        async with s.client.post(PATH, json=STREAMED) as response:
            while await response.content.readuntil(b"\n\n") != STREAM[-1]:
                pass
            response.close()
        await s.idle()
        assert s.metric("requests_total", tenant="strict", outcome="done") == 1
        assert s.metric("requests_total", tenant="strict", outcome="cancelled") == 0


async def test_a_chunk_reaches_the_client_before_the_stream_ends() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].hold = asyncio.Event()
        async with s.client.post(PATH, json=STREAMED) as response:
            seen = await response.content.readuntil(b"\n\n")
            assert seen == STREAM[0]
            assert s.gateway.scheduler.inflight(0) == 1
            s.backends[0].hold.set()
            await response.read()


async def test_client_credentials_stay_at_the_gateway() -> None:
    async with serving(Prefer(0, 1)) as s:
        async with s.client.post(PATH, json=BODY, headers={"Authorization": "Bearer mine"}) as response:
            assert response.status == 200
        assert "Authorization" not in s.backends[0].headers[0]


async def test_a_backend_gets_its_own_key_and_model_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_KEY", "k")
    async with serving(Prefer(0, 1), model="theirs", api_key_env="BACKEND_KEY") as s:
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 200
        assert s.backends[0].headers[0]["Authorization"] == "Bearer k"
        assert json.loads(s.backends[0].bodies[0]) == {**BODY, "model": "theirs"}


async def test_of_a_body_nothing_changes_but_the_models_name() -> None:
    async with serving(Prefer(0, 1), model="theirs") as s:
        body = '{ "model" :\t"%s", "prompt": "h\\u0065llo", "metadata": {"model": 1.00}, "x": %s1%s}'
        deep = ("[" * 300, "]" * 300)
        async with s.client.post(PATH, data=body % ("m", *deep)) as response:
            assert response.status == 200
        assert s.backends[0].bodies[0].decode() == body % ("theirs", *deep)


async def test_a_bug_of_the_gateway_is_a_request_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    async with serving(Prefer(0, 1)) as s:
        monkeypatch.setattr(s.gateway.relay, "serve", fails)
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 500
        await s.idle()
        assert s.metric("requests_total", tenant="strict", outcome="failed") == 1
        assert s.metric("attained_total", tenant="strict") == 0
        assert s.metric("inflight", replica="r0") == 0
        assert s.metric("answered_errors_total", status="500", code="internal_error") == 1


async def test_the_header_names_the_tenant() -> None:
    async with serving(Prefer(0, 1)) as s:
        async with s.client.post(PATH, json=BODY, headers={"X-Steersman-Tenant": "loose"}):
            pass
        assert s.metric("requests_total", tenant="loose", outcome="done") == 1
        async with s.client.post(PATH, json=BODY, headers={"X-Steersman-Tenant": "lose"}) as response:
            assert response.status == 400
            assert "did you mean 'loose'?" in str((await error_of(response))["message"])


async def test_shed_is_503_with_a_time_to_retry() -> None:
    async with serving(Prefer(3)) as s:
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            error = await error_of(response)
            assert (error["code"], error["type"]) == ("shed", "server_error")
        assert s.metric("requests_total", tenant="strict", outcome="shed") == 1
        assert not s.backends[0].bodies


async def test_a_prompt_too_long_for_every_replica_is_400() -> None:
    async with (
        serving(Prefer(0, 1)) as s,
        s.client.post(PATH, json={**BODY, "max_tokens": 5000}) as response,
    ):
        assert response.status == 400
        assert (await error_of(response))["code"] == "context_length_exceeded"
        assert s.metric("refused_total", reason="context") == 1


async def test_with_all_replicas_down_it_is_503_with_the_reason() -> None:
    async with serving(Prefer(0, 1)) as s:
        for r in range(2):
            s.gateway.scheduler.set_up(r, False)
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 503
            assert "2 down" in str((await error_of(response))["message"])
        async with s.client.get("/health") as response:
            assert response.status == 503
            assert await response.json() == {"status": "no replica is up", "replicas": {"up": 0, "of": 2}}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{bad", 400, "not valid JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b'{"model": "m"}', 400, "'messages' or 'prompt'"),
        (b'{"prompt": "x", "max_tokens": -1}', 400, "max_tokens"),
        (b'{"prompt": "x", "max_tokens": "9"}', 400, "'max_tokens' must be int"),
        (b'{"messages": "x"}', 400, "'messages' must be list"),
        (b'{"messages": ["x"]}', 400, "messages[0]"),
        (b'{"prompt": "x", "model": "n"}', 404, "'n' is not served here"),
    ],
)
async def test_a_bad_body_is_refused_in_the_apis_form(body: bytes, status: int, said: str) -> None:
    async with serving(Prefer(0, 1)) as s, s.client.post(PATH, data=body) as response:
        assert response.status == status
        error = await error_of(response)
        assert said in str(error["message"])
        assert error["type"] == "invalid_request_error"
        assert not s.backends[0].bodies


async def test_a_body_over_the_limit_is_413() -> None:
    async with (
        serving(Prefer(0, 1), limits=HttpLimits(body_bytes=1 << 20)) as s,
        s.client.post(PATH, data=io.BytesIO(b"x" * (1 << 21))) as response,
    ):
        assert response.status == 413
        assert "larger than 1048576 bytes" in str((await error_of(response))["message"])


async def test_an_unknown_path_is_404_in_the_apis_form() -> None:
    async with serving(Prefer(0, 1)) as s, s.client.get("/v1/nothing") as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "not_found"


async def test_errors_are_counted_by_status_and_code() -> None:
    async with serving(Prefer(0, 1)) as s:
        for model in ("m", "n", "n"):
            async with s.client.post(PATH, json={**BODY, "model": model}) as response:
                assert response.status == (200 if model == "m" else 404)
        assert s.metric("answered_errors_total", status="404", code="model_not_found") == 2


async def test_where_there_are_several_models_a_body_names_one() -> None:
    fleet = fleet_of([FakeBackend(), FakeBackend()])
    groups = [group.model_copy(update={"model": f"m{i}"}) for i, group in enumerate(fleet.replicas)]
    async with serving(Prefer(0, 1), fleet=fleet.model_copy(update={"replicas": groups})) as s:
        async with s.client.post(PATH, json={"prompt": "hello"}) as response:
            assert response.status == 400
            assert (await error_of(response))["message"] == "the body needs 'model', one of: m0, m1"
        async with s.client.post(PATH, json={**BODY, "model": "m1"}) as response:
            assert response.headers["X-Steersman-Replica"] == "r1"


async def test_a_load_balancer_may_look_with_head() -> None:
    async with serving(Prefer(0, 1)) as s, s.client.head("/health") as response:
        assert (response.status, await response.read()) == (200, b"")
        assert int(response.headers["Content-Length"]) > 0


async def test_models_are_the_fleets() -> None:
    async with serving(Prefer(0, 1)) as s, s.client.get("/v1/models") as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["m"]


async def test_a_rejection_by_the_replica_passes_through_and_is_not_tried_elsewhere() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].status = 422
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 422
        assert not s.backends[1].bodies
        assert s.metric("requests_total", tenant="strict", outcome="rejected") == 1
        assert s.gateway.pool.status(0) is Status.UP


@pytest.mark.parametrize("status", [401, 403])
async def test_a_replica_that_denies_the_gateway_is_not_the_clients_fault(status: int) -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].status = status
        async with s.client.post(PATH, json=BODY) as response:
            assert (response.status, response.headers["X-Steersman-Replica"]) == (200, "r1")
        assert s.metric("errors_total", replica="r0", kind="denied") == 1
        s.backends[1].status = status
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 502


@pytest.mark.parametrize("body", [BODY, STREAMED])
async def test_a_status_of_500_is_tried_on_another_replica(body: dict[str, object]) -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].status = 500
        async with s.client.post(PATH, json=body) as response:
            assert response.status == 200
            assert response.headers["X-Steersman-Replica"] == "r1"
            await response.read()
        await s.idle()
        assert s.metric("errors_total", replica="r0", kind="status") == 1
        assert [s.gateway.scheduler.inflight(r) for r in range(2)] == [0, 0]
        assert s.gateway.scheduler.book.tenant_views["ended"][0] == 1


@pytest.mark.parametrize("pieces", [[], [b""]])
async def test_a_stream_that_breaks_before_its_first_byte_is_tried_on_another_replica(
    pieces: list[bytes],
) -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].pieces = pieces
        async with s.client.post(PATH, json=STREAMED) as response:
            assert await response.read() == b"".join(STREAM)
            assert response.headers["X-Steersman-Replica"] == "r1"


async def test_a_dead_replica_is_left_out_and_returns_when_it_is_healthy() -> None:
    async with serving(Prefer(0, 1), health=HealthConfig(backoff_s=0.01, recheck_s=0.05)) as s:
        up = s.gateway.scheduler.replicas["up"]
        changes: asyncio.Queue[tuple[int, Status]] = asyncio.Queue()
        await s.backends[0].stop()
        for _ in range(3):
            async with s.client.post(PATH, json=BODY) as response:
                assert response.headers["X-Steersman-Replica"] == "r1"
        assert up.tolist() == [0, 1]
        s.gateway.pool.on_change = lambda r, status: changes.put_nowait((r, status))
        s.gateway.pool.watch(s.gateway.scheduler)
        async with asyncio.timeout(10):
            while await changes.get() != (0, Status.DOWN):
                pass
            await s.backends[0].start()
            assert await changes.get() == (0, Status.RAMPING)
        assert up.tolist() == [1, 1]


async def test_a_watch_goes_on_whatever_its_news_do() -> None:
    async with serving(Prefer(0), 1, health=HealthConfig(scrape_s=0.01, recheck_s=0.01)) as s:
        news: asyncio.Queue[Status] = asyncio.Queue()

        def told(_replica: int, status: Status) -> None:
            news.put_nowait(status)
            raise RuntimeError("a bug")

        s.gateway.pool.on_change = told
        s.gateway.pool.watch(s.gateway.scheduler)
        await s.backends[0].stop()
        async with asyncio.timeout(10):
            assert await news.get() is Status.DOWN
            await s.backends[0].start()
            assert await news.get() is Status.RAMPING


ERROR = b'data: {"error": {"message": "engine died", "type": "InternalServerError", "code": 500}}\n\n'


async def test_a_stream_that_is_only_an_error_is_tried_on_another_replica() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].pieces = [ERROR, b"data: [DONE]\n\n"]
        async with s.client.post(PATH, json=STREAMED) as response:
            assert (response.headers["X-Steersman-Replica"], await response.read()) == ("r1", b"".join(STREAM))
        assert s.metric("errors_total", replica="r0", kind="status") == 1


@pytest.mark.parametrize("text", ["b", '{"error": "no"}'])
async def test_a_stream_that_tells_of_an_error_has_failed(text: str) -> None:
    async with serving(Prefer(0, 1)) as s:
        backend = s.backends[0]
        for last, outcome in ((ERROR, "failed"), (b"", "done")):
            backend.pieces, backend.hold = [event("a"), event(text), last + b"data: [DONE]\n\n"], asyncio.Event()
            async with s.client.post(PATH, json=STREAMED) as response:
                first = await response.content.readany()  # from now on, no other replica can try
                backend.hold.set()
                assert first + await response.read() == b"".join(backend.pieces)
            await s.idle()
            assert s.metric("requests_total", tenant="strict", outcome=outcome) == 1


async def test_a_replica_that_was_started_anew_while_drained_has_lost_its_cache() -> None:
    async with serving(Prefer(0), 1, health=HealthConfig(scrape_s=0.01, recheck_s=0.01)) as s:
        pool, scheduler = s.gateway.pool, s.gateway.scheduler

        def matched_tokens() -> int:
            ticket = scheduler.arrive(LiveRequest(0, 600, 8, np.arange(4, dtype=np.int64)))
            scheduler.observe(ticket)
            scheduler.dispatched(ticket, 0)
            scheduler.ended(ticket, True)
            return ticket.matched_tokens

        assert (matched_tokens(), matched_tokens()) == (0, 256)
        pool.watch(scheduler)
        pool.drain(0, True)
        async with asyncio.timeout(10):
            await s.backends[0].stop()
            while pool.health[0].healthy:
                await asyncio.sleep(0.002)
            await s.backends[0].start()
            while not pool.health[0].healthy:
                await asyncio.sleep(0.002)
        pool.drain(0, False)
        assert (matched_tokens(), matched_tokens()) == (0, 256)
        pool.drain(0, True)
        pool.drain(0, False)
        assert matched_tokens() == 256


async def test_when_every_replica_fails_it_is_502() -> None:
    async with serving(Prefer(0, 1)) as s:
        for backend in s.backends:
            backend.status = 503
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 502
            assert (await error_of(response))["code"] == "replica_failed"
        assert s.metric("requests_total", tenant="strict", outcome="failed") == 1
        assert [s.metric("retries_total", replica=name) for name in ("r0", "r1")] == [1, 0]


@pytest.mark.parametrize("cut", [False, True])
async def test_a_stream_without_done_is_a_failure_that_the_client_sees(cut: bool) -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].pieces, s.backends[0].cut = [event("a"), event("b")], cut
        async with s.client.post(PATH, json=STREAMED) as response:
            body = await response.read()
        assert b"[DONE]" not in body
        last = json.loads(body.strip().rpartition(b"data: ")[2])
        assert last["error"]["code"] == "replica_failed"
        await s.idle()
        assert s.metric("errors_total", replica="r0", kind="cut") == 1
        assert s.metric("requests_total", tenant="strict", outcome="failed") == 1
        assert s.gateway.scheduler.inflight(0) == 0
        assert not s.backends[1].bodies


@pytest.mark.parametrize("body", [BODY, STREAMED])
async def test_a_client_that_leaves_cancels_its_request_at_the_replica(body: dict[str, object]) -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(s.client.post(PATH, json=body))
        await s.backends[0].asked.wait()
        if body is STREAMED:
            (await asking).close()
        else:
            asking.cancel()
        await asyncio.wait_for(s.backends[0].cancelled.wait(), 10)
        await s.idle()
        assert s.gateway.scheduler.inflight(0) == 0
        assert s.metric("requests_total", tenant="strict", outcome="cancelled") == 1


async def test_a_whole_answer_counts_as_decoding_once_its_first_token_is_due() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(s.client.post(PATH, json=BODY))
        view = s.gateway.scheduler.book.views[0]
        async with asyncio.timeout(10):
            while view["inflight"] == 0 or view["prefilling"] > 0:
                await asyncio.sleep(0.005)
                s.gateway.scheduler.catch_up()
        assert view["context_tokens"] > 0
        s.backends[0].hold.set()
        (await asking).close()


async def test_draining_finishes_what_runs_and_refuses_what_is_new() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].hold = asyncio.Event()
        async with s.client.post(PATH, json=STREAMED) as running:
            draining = asyncio.create_task(s.gateway.drained())
            await asyncio.sleep(0)
            async with s.client.post(PATH, json=BODY) as refused:
                assert refused.status == 503
                assert (await error_of(refused))["code"] == "draining"
            assert not draining.done()
            s.backends[0].hold.set()
            assert await running.read() == b"".join(STREAM)
        await asyncio.wait_for(draining, 10)


async def test_what_the_gateway_cuts_off_when_it_stops_is_not_its_clients_doing() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(s.client.post(PATH, json=BODY))
        await s.backends[0].asked.wait()
        s.gateway.phase = Phase.STOPPING
        await s.server.stop()
        await s.idle()
        assert s.metric("requests_total", tenant="strict", outcome="unended") == 1
        assert s.metric("attained_total", tenant="strict") == 0
        await asyncio.gather(asking, return_exceptions=True)


async def test_scraped_metrics_reach_the_scheduler() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.backends[0].metrics = (
            'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_waiting{engine="0"} 2.0\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
            'vllm:prefix_cache_hits_total{engine="0"} 30\nvllm:prefix_cache_queries_total{engine="0"} 40\n'
        )
        s.gateway.pool.watch(s.gateway.scheduler)
        view = s.gateway.scheduler.book.views[0]
        async with asyncio.timeout(10):
            while view["scraped_at_s"] == 0:
                await asyncio.sleep(0.01)
        assert (view["running"], view["waiting"], view["kv_use"]) == (3, 2, 0.25)
        assert s.metric("engine_prefix_hit_rate", replica="r0") == 0.75
        assert b'engine_prefix_hit_rate{replica="r1"}' not in s.gateway.metrics.text()


async def test_metrics_are_prometheus_text() -> None:
    async with serving(Prefer(0, 1)) as s:
        async with s.client.post(PATH, json=BODY):
            pass
        async with s.client.get("/metrics") as response:
            assert response.content_type == "text/plain"
            text = await response.text()
        for line in (
            'steersman_decisions_total{replica="r0"} 1.0',
            'steersman_policy_deployed{place="fallback",version="prefer"} 1.0',
            'steersman_inflight{replica="r0"} 0.0',
            'steersman_replica_up{replica="r1"} 1.0',
            'steersman_policy_decision_seconds_count{arm="current",version="prefer"} 1.0',
        ):
            assert line in text.splitlines()


async def test_a_fallback_is_counted_by_reason() -> None:
    class Broken:
        name = "broken"

        def score(self, rows: object, mask: object) -> object:
            return [float("nan")] * 4

    async with serving(Broken()) as s:
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 200
        assert s.metric("policy_fallbacks_total", version="broken", arm="current", reason="not-finite") == 1
        assert s.metric("decisions_total", replica="r0") == 1


class Waits:
    """A policy that holds every request until it is told to `go`, then sends it to the first replica allowed."""

    name = "waits"

    def __init__(self) -> None:
        self.go = False

    def score(self, rows: np.ndarray, mask: np.ndarray) -> list[float]:
        return [0.0, 0.0, -1.0 if self.go else 1.0, -2.0]


async def until_held(s: Served) -> None:
    async with asyncio.timeout(10):
        while s.metric("held") == 0:
            await asyncio.sleep(0.005)


LOOSE = {"X-Steersman-Tenant": "loose"}  # promised 5 s


async def test_a_held_request_is_decided_anew_and_served() -> None:
    policy = Waits()
    async with serving(policy) as s:
        asking = asyncio.create_task(s.client.post(PATH, json=BODY, headers=LOOSE))
        await until_held(s)
        assert not s.backends[0].bodies
        policy.go = True
        async with await asking as response:
            assert await response.read() == WHOLE
        assert s.metric("decisions_total", replica="hold") >= 1
        assert s.metric("decisions_total", replica="r0") == 1
        assert s.metric("requests_total", tenant="loose", outcome="done") == 1
        assert s.metric("held") == 0


async def test_nobody_is_held_until_the_promise_is_broken() -> None:
    async with serving(Waits()) as s, s.client.post(PATH, json=BODY) as response:
        assert response.status == 200
        assert 1 <= s.metric("decisions_total", replica="hold") <= 19


async def test_a_client_that_leaves_while_held_frees_its_place() -> None:
    async with serving(Waits()) as s:
        asking = asyncio.create_task(s.client.post(PATH, json=BODY, headers=LOOSE))
        await until_held(s)
        asking.cancel()
        async with asyncio.timeout(10):
            await s.idle()
        assert s.metric("held") == 0
        assert s.metric("requests_total", tenant="loose", outcome="cancelled") == 1
        assert s.gateway.scheduler.book.tenant_views["ended"][1] == 1
        assert s.gateway.scheduler.book.tenant_views["attainment"][1] == 1
        assert not s.backends[0].bodies


async def test_draining_waits_for_held_requests() -> None:
    policy = Waits()
    async with serving(policy) as s:
        asking = asyncio.create_task(s.client.post(PATH, json=BODY, headers=LOOSE))
        await until_held(s)
        draining = asyncio.create_task(s.gateway.drained())
        await asyncio.sleep(0)
        assert not draining.done()
        policy.go = True
        async with await asking as response:
            assert await response.read() == WHOLE
        await asyncio.wait_for(draining, 10)


async def test_a_request_whose_replica_failed_may_be_held_before_it_goes_to_another() -> None:
    class Cautious:
        name = "cautious"

        def score(self, rows: np.ndarray, mask: np.ndarray) -> list[float]:
            return [1.0, 0.0, 0.5 if rows[-2, COLUMN["patience"]] > 0.8 else -1.0, -2.0]

    async with serving(Cautious()) as s:
        s.backends[0].status = 500
        async with s.client.post(PATH, json=BODY, headers=LOOSE) as response:
            assert response.headers["X-Steersman-Replica"] == "r1"
        assert s.metric("decisions_total", replica="hold") >= 1
        assert [len(backend.bodies) for backend in s.backends] == [1, 1]


async def test_a_gateway_that_will_stop_says_so_and_goes_on_serving() -> None:
    async with serving(Prefer(0, 1)) as s:
        s.gateway.phase = Phase.LEAVING
        async with s.client.get("/health") as response:
            assert response.status == 503
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 200


@pytest.mark.parametrize("broken", ["decide", "dispatched"])
async def test_a_bug_of_the_gateway_leaves_no_request_open(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    async with serving(Prefer(0, 1)) as s:
        monkeypatch.setattr(s.gateway.scheduler, broken, fails)
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 500
        await s.idle()
        assert s.metric("requests_total", tenant="strict", outcome="failed") == 1
        assert s.gateway.scheduler.book.tenant_views["ended"][0] == 1


async def leaves(s: Served, body: dict[str, object], begun: bool) -> None:
    """A client that leaves while its request is at a replica; begun: after the first byte of its answer."""
    s.backends[0].hold = asyncio.Event()
    asking = asyncio.create_task(s.client.post(PATH, json=body))
    await s.backends[0].asked.wait()
    if begun:
        (await asking).close()
    asking.cancel()


async def is_late(s: Served) -> None:
    s.backends[0].hold = asyncio.Event()
    async with s.client.post(PATH, json=BODY, headers={"X-Steersman-Deadline-Ms": "20"}) as response:
        assert response.status == 500


async def finds_no_replica(s: Served) -> None:
    for backend in s.backends:
        backend.dies = True
    async with s.client.post(PATH, json=BODY) as response:
        assert response.status == 500


async def is_cut(s: Served) -> None:
    s.backends[0].pieces, s.backends[0].cut = STREAM[:2], True
    with pytest.raises(aiohttp.ClientError):
        async with s.client.post(PATH, json=STREAMED) as response:
            await response.read()


async def is_served(s: Served, body: dict[str, object]) -> None:
    with contextlib.suppress(aiohttp.ClientError):  # the end of a stream is counted before its client has it
        async with s.client.post(PATH, json=body) as response:
            await response.read()


@pytest.mark.parametrize(
    "ends",
    [
        lambda s: leaves(s, BODY, False),
        lambda s: leaves(s, STREAMED, True),
        is_late,
        finds_no_replica,
        is_cut,
        lambda s: is_served(s, BODY),
        lambda s: is_served(s, STREAMED),
    ],
)
async def test_a_bug_at_the_end_of_a_request_leaves_nothing_open(
    ends: Callable[[Served], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    async with serving(Prefer(0, 1)) as s:
        monkeypatch.setattr(s.gateway, "ended", fails)
        async with asyncio.timeout(10):
            await ends(s)
            await s.idle()
        assert (s.gateway.inflight, s.gateway.limiter.total) == (0, 0)


async def test_a_bug_while_a_held_request_ends_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    async with serving(Prefer(2)) as s:
        monkeypatch.setattr(s.gateway, "ended", fails)
        asking = asyncio.create_task(s.client.post(PATH, json=BODY))
        await until_held(s)
        asking.cancel()
        async with asyncio.timeout(10):
            await s.idle()
        assert (s.gateway.inflight, s.gateway.limiter.total) == (0, 0)


async def test_a_bug_after_a_request_was_counted_does_not_count_it_twice() -> None:
    def fails(_: object) -> None:
        raise RuntimeError("a bug")

    async with serving(Prefer(0, 1)) as s:
        s.server.on_over = fails
        async with s.client.post(PATH, json=BODY) as response:
            await response.read()
        await s.idle()
        assert (s.gateway.inflight, s.gateway.limiter.total) == (0, 0)
