"""From headers to a caller: tenant, promise, priority, deadline, and where its data may go."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from backends import Prefer, event, serving
from hypothesis import given
from hypothesis import strategies as st
from simulated import fleet

from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway.access import Access, Caller, GatewayTenant
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.limits import FairShares, Limits

SLO = {"ttft_s": 0.5, "tpot_s": 0.03}
SLOW = {"ttft_s": 60.0, "tpot_s": 1.0}
BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}
PATH = "/v1/completions"


def tenants(**changes: object) -> dict[str, GatewayTenant]:
    """Two: `one` with a promise besides and `changes`, and `two`."""
    one = {"slo": SLO, "slos": {"batch": SLOW}, **changes}
    return {"one": GatewayTenant.model_validate(one), "two": GatewayTenant.model_validate({"slo": SLO})}


def zoned() -> Fleet:
    """Zones, sorted: (eu, -), (eu, health), (us, -), (us, health, cards)."""
    return fleet(
        {"region": "eu"},
        {"region": "us", "data_classes": ["health", "cards"]},
        {"region": "us"},
        {"region": "eu", "data_classes": ["health"]},
    )


def caller(access: Access, **headers: str) -> Caller:
    return access.caller({name.replace("_", "-").encode(): value.encode() for name, value in headers.items()})


def refused(access: Access, **headers: str) -> str:
    with pytest.raises(ApiError) as error:
        caller(access, **headers)
    assert error.value.status == 400
    return error.value.message


def regions_of(access: Access, **headers: str) -> list[tuple[str, list[str]]]:
    mask = caller(access, **headers).regions
    return [(zone.region, sorted(zone.data_classes)) for i, zone in enumerate(zoned().zones) if mask >> i & 1]


def test_who_says_nothing_is_the_first_tenant_with_its_defaults() -> None:
    access = Access(fleet({}), tenants(priority=3))
    assert caller(access) == Caller(0, 0, 3, 0, None, None)


def test_a_tenants_promises_are_rows_of_their_own() -> None:
    access = Access(fleet({}), tenants())
    assert list(access.rows) == ["one", "one/batch", "two"]
    assert access.rows["one/batch"].slo.ttft_s == 60.0
    assert caller(access, x_steersman_slo="batch")[:2] == (1, 0)
    assert caller(access, x_steersman_tenant="two")[:2] == (2, 1)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"x_steersman_tenant": "tow"}, "did you mean 'two'?"),
        ({"x_steersman_slo": "bach"}, "tenant 'one' has no promise named 'bach'; did you mean 'batch'?"),
        ({"x_steersman_tenant": "two", "x_steersman_slo": "batch"}, "it has none"),
        ({"x_steersman_priority": "high"}, "X-Steersman-Priority must be a number from -100 to 100, not 'high'"),
        ({"x_steersman_priority": "101"}, "from -100 to 100"),
        ({"x_steersman_priority": "nan"}, "from -100 to 100"),
        ({"x_steersman_deadline_ms": "0"}, "from 1 to 86400000"),
        ({"x_steersman_deadline_ms": "inf"}, "from 1 to 86400000"),
        ({"x_steersman_deadline_ms": ""}, "not ''"),
        ({"x_steersman_regions": "mars"}, "the fleet has no region 'mars'; known: eu, us"),
        ({"x_steersman_regions": ""}, "the fleet has no region ''"),
        ({"x_steersman_regions": "eu,"}, "the fleet has no region ''"),
        ({"x_steersman_data_class": "healt"}, "no replica may see data of class 'healt'; did you mean 'health'?"),
        ({"x_steersman_regions": "eu", "x_steersman_data_class": "cards"}, "no replica is where"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(headers: dict[str, str], said: str) -> None:
    assert said in refused(Access(zoned(), tenants()), **headers)


def test_numbers_are_read() -> None:
    access = Access(fleet({}), tenants())
    assert caller(access, x_steersman_priority="-7").priority == -7
    assert caller(access, x_steersman_deadline_ms="250").deadline_s == 0.25


def test_regions_and_classes_choose_zones() -> None:
    access = Access(zoned(), tenants())
    assert caller(access).regions == 0
    assert regions_of(access, x_steersman_regions="eu") == [("eu", []), ("eu", ["health"])]
    assert regions_of(access, x_steersman_regions="eu , us", x_steersman_data_class="health") == [
        ("eu", ["health"]),
        ("us", ["cards", "health"]),
    ]
    assert regions_of(access, x_steersman_data_class="cards") == [("us", ["cards", "health"])]


def test_a_request_narrows_what_its_tenant_may_and_never_widens_it() -> None:
    access = Access(zoned(), tenants(regions=["eu"], data_class="health"))
    assert regions_of(access) == [("eu", ["health"])]
    assert regions_of(access, x_steersman_regions="eu,us") == [("eu", ["health"])]
    assert "no replica is where" in refused(access, x_steersman_regions="us")
    assert "no replica is where" in refused(access, x_steersman_data_class="cards")


@given(
    st.sampled_from([[], ["eu"], ["us"], ["eu", "us"]]),
    st.sampled_from([None, "health"]),
    st.sampled_from([None, "eu", "us", "us,eu"]),
    st.sampled_from([None, "health", "cards"]),
)
def test_a_zone_that_is_allowed_is_allowed_by_tenant_and_request(
    regions: list[str], data_class: str | None, asked: str | None, asked_class: str | None
) -> None:
    access = Access(zoned(), tenants(regions=regions, data_class=data_class))
    headers = {"x_steersman_regions": asked, "x_steersman_data_class": asked_class}
    allowed = [
        (zone.region, sorted(zone.data_classes))
        for zone in zoned().zones
        if (not regions or zone.region in regions)
        and (asked is None or zone.region in asked)
        and {data_class, asked_class} - {None} <= zone.data_classes
    ]
    given_ = {name: value for name, value in headers.items() if value is not None}
    if not allowed:
        refused(access, **given_)
    else:
        found = regions_of(access, **given_)
        assert found == allowed or (caller(access, **given_).regions == 0 and len(allowed) == 4)


def test_a_tenant_whose_data_may_go_nowhere_is_said_at_the_start() -> None:
    with pytest.raises(ValueError, match="no replica in eu may see data of class 'cards'"):
        Access(zoned(), tenants(regions=["eu"], data_class="cards"))


def test_callers_are_remembered_within_bounds() -> None:
    access = Access(fleet({}), tenants())
    for i in range(5000):
        caller(access, x_steersman_deadline_ms=str(i + 1))
    assert len(access._known) < 4100
    before = len(access._known)
    caller(access, x_steersman_deadline_ms="0" * 5000 + "1")
    assert len(access._known) == before


# At the gateway


async def code_of(response: aiohttp.ClientResponse) -> object:
    return (await response.json())["error"]["code"]


async def test_a_deadline_that_passes_before_the_answer_is_504_and_cancels_at_the_replica() -> None:
    async with serving(Prefer(0, 1), tenants=tenants()) as s:
        s.backends[0].hold = asyncio.Event()
        async with s.client.post(PATH, json=BODY, headers={"X-Steersman-Deadline-Ms": "30"}) as response:
            assert (response.status, await code_of(response)) == (504, "deadline_exceeded")
        await asyncio.wait_for(s.backends[0].cancelled.wait(), 10)
        await s.idle()
        assert s.metric("requests_total", tenant="one", outcome="late") == 1
        assert s.gateway.scheduler.inflight(0) == 0
        s.backends[0].hold = None
        async with s.client.post(PATH, json=BODY, headers={"X-Steersman-Deadline-Ms": "60000"}) as response:
            assert response.status == 200


async def test_a_deadline_does_not_cut_a_stream_that_has_begun() -> None:
    async with serving(Prefer(0, 1), tenants=tenants()) as s:
        s.backends[0].hold = asyncio.Event()
        body = {**BODY, "stream": True}
        async with s.client.post(PATH, json=body, headers={"X-Steersman-Deadline-Ms": "2000"}) as response:
            await response.content.readuntil(b"\n\n")
            (attempt,) = s.gateway.relay.attempts[0]
            attempt._owner.too_late()
            s.backends[0].hold.set()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_a_further_promise_counts_apart() -> None:
    async with serving(Prefer(0, 1), tenants=tenants()) as s:
        async with s.client.post(PATH, json=BODY, headers={"X-Steersman-SLO": "batch"}) as response:
            assert response.status == 200
        assert s.metric("requests_total", tenant="one/batch", outcome="done") == 1
        assert s.metric("requests_total", tenant="one", outcome="done") == 0


async def test_over_a_limit_is_429_with_a_time_to_retry_and_never_reaches_a_replica() -> None:
    limits = Limits(requests_per_minute=1)
    async with serving(Prefer(0, 1), tenants=tenants(limits=limits)) as s:
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 200
        async with s.client.post(PATH, json=BODY, headers={"X-Steersman-SLO": "batch"}) as response:
            assert (response.status, await code_of(response)) == (429, "rate_limit_exceeded")
            assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert len(s.backends[0].bodies) == 1
        assert s.metric("limited_total", tenant="one", limit="requests") == 1
        async with s.client.post(PATH, json=BODY, headers={"X-Steersman-Tenant": "two"}) as response:
            assert response.status == 200


@pytest.mark.parametrize("how", ["shed", "rejected", "failed"])
async def test_tokens_of_requests_that_nobody_served_come_back(how: str) -> None:
    policy = Prefer(3) if how == "shed" else Prefer(0, 1)
    async with serving(policy, tenants=tenants(limits=Limits(tokens_per_minute=30))) as s:
        for backend in s.backends:
            backend.status = {"shed": 200, "rejected": 422, "failed": 500}[how]
        for _ in range(2):
            async with s.client.post(PATH, json={**BODY, "max_tokens": 20}) as response:
                assert response.status == {"shed": 503, "rejected": 422, "failed": 502}[how]


async def test_tokens_that_an_answer_used_are_what_counts() -> None:
    async with serving(Prefer(0, 1), tenants=tenants(limits=Limits(tokens_per_minute=45))) as s:
        statuses = []
        for _ in range(6):
            async with s.client.post(PATH, json={**BODY, "max_tokens": 20}) as response:
                statuses.append(response.status)
        assert statuses == [200, 200, 200, 429, 429, 429]  # 10 tokens each, and more than 20 must be there


@pytest.mark.parametrize(
    "asked", [{"n": 4}, {"best_of": 4, "n": 1}, {"prompt": ["a", "b", "c", "d"]}, {"n": 2, "prompt": [[1], [2]]}]
)
async def test_each_answer_that_is_asked_for_counts_at_first(asked: dict[str, object]) -> None:
    async with serving(Prefer(0, 1), tenants=tenants(limits=Limits(tokens_per_minute=100))) as s:
        s.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(s.client.post(PATH, json={**BODY, **asked, "max_tokens": 20}))
        await s.backends[0].asked.wait()
        async with s.client.post(PATH, json={**BODY, "max_tokens": 20}) as response:
            assert response.status == 429
        s.backends[0].hold.set()
        async with await asking as response:
            assert response.status == 200


async def test_tokens_that_were_counted_are_what_counts_where_a_stream_tells_of_none() -> None:
    async with serving(Prefer(0, 1), tenants=tenants(limits=Limits(tokens_per_minute=45))) as s:
        s.backends[0].pieces = [event("a"), event("b"), event("c"), b"data: [DONE]\n\n"]
        for _ in range(2):
            async with s.client.post(PATH, json={**BODY, "max_tokens": 30, "stream": True}) as response:
                assert response.status == 200


async def test_a_place_among_requests_at_once_is_freed_when_its_client_leaves() -> None:
    async with serving(Prefer(0, 1), tenants=tenants(limits=Limits(concurrent=1))) as s:
        s.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(s.client.post(PATH, json=BODY))
        await s.backends[0].asked.wait()
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 429
        asking.cancel()
        await s.idle()
        s.backends[0].hold = None
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 200


async def test_on_a_full_fleet_a_tenant_keeps_to_its_share() -> None:
    async with serving(Prefer(0, 1), tenants=tenants(), fair=FairShares(full_at=0.001)) as s:  # 512 slots
        s.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(s.client.post(PATH, json=BODY))
        await s.backends[0].asked.wait()
        async with s.client.post(PATH, json=BODY) as response:
            assert (response.status, await code_of(response)) == (429, "rate_limit_exceeded")
        assert s.metric("limited_total", tenant="one", limit="share") == 1
        s.backends[0].hold.set()
        (await asking).close()
