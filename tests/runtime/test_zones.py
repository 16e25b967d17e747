"""Data residency and backups: no policy, retry, hold or fallback sends a request where its data may not go."""

from __future__ import annotations

import asyncio
import json
import math
from functools import cache

import numpy as np
import pytest
from backends import FakeBackend, Prefer, fleet_of, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import fleet

from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway.access import Access, GatewayTenant
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.guard import Reason
from steersman.runtime.replica._health import HealthConfig
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Kind, LiveRequest

SLO = {"ttft_s": 60.0, "tpot_s": 1.0}
REGIONS, CLASSES = ["eu", "us", "ap"], ["health", "cards"]
PATH = "/v1/completions"


class Scripted:
    """A policy that gives whatever the test draws."""

    name = "scripted"

    def __init__(self) -> None:
        self.scores: list[float] | None = None

    def score(self, rows: np.ndarray, mask: np.ndarray) -> list[float]:
        if self.scores is None:
            raise RuntimeError("no scores")
        return self.scores


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    groups = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "region": st.sampled_from(REGIONS),
                    "data_classes": st.lists(st.sampled_from(CLASSES), unique=True),
                    "backup": st.sampled_from([0, 0, 0, 1, 2]),
                    "model": st.sampled_from(["m", "m", "n"]),
                    "max_model_len": st.sampled_from([4000, 4000, 500]),
                }
            ),
            min_size=2,
            max_size=6,
        )
    )
    return fleet(*groups)


SCORES = st.one_of(
    st.none(), st.lists(st.sampled_from([math.nan, math.inf, -1.0, 0.0, 1.0, 2.0]), min_size=8, max_size=8)
)


@settings(deadline=None, max_examples=150)
@given(fleets(), st.data())
def test_whatever_happens_a_request_never_reaches_a_replica_outside(fleet: Fleet, data: st.DataObject) -> None:
    draw, replicas = data.draw, range(len(fleet.groups))
    tenant = GatewayTenant.model_validate({"slo": SLO})
    access = Access(fleet, {"a": tenant})
    policy, fallback = Scripted(), Scripted()
    s = Scheduler(fleet, access.rows, policy, fallback, candidates=8, policy_limit_s=math.inf, clock=lambda: 0.0)
    for _ in range(draw(st.integers(1, 8))):
        asked = draw(st.lists(st.sampled_from(REGIONS), unique=True))
        data_class = draw(st.one_of(st.none(), st.sampled_from(CLASSES)))
        model = draw(st.sampled_from([-1, 0]))
        prompt_tokens = draw(st.sampled_from([10, 1000]))
        headers = {b"x-steersman-regions": ",".join(asked).encode()} if asked else {}
        if data_class is not None:
            headers[b"x-steersman-data-class"] = data_class.encode()
        within = [
            r
            for r, group in enumerate(fleet.groups)
            if (not asked or group.region in asked) and (data_class is None or data_class in group.data_classes)
        ]
        try:
            caller = access.caller(headers)
        except ApiError:  # there is no such region or class, or not both in one place
            known = set(asked) <= {group.region for group in fleet.groups}
            assert not within or not known
            continue
        ticket = s.arrive(LiveRequest(0, prompt_tokens, 10, model=model, regions=caller.regions))
        tried: list[int] = []
        for _ in range(6):  # decided, held and decided anew, failed and tried elsewhere
            for r in replicas:
                s.set_up(r, draw(st.sampled_from([True, True, False])), kept_cache=True)
                s.set_cap(r, draw(st.sampled_from([math.inf, math.inf, 0.0])))
            policy.scores, fallback.scores = draw(SCORES), draw(SCORES)
            decision = s.decide(ticket, tried)
            able = [
                r
                for r in within
                if s.replicas["up"][r]
                and r not in tried
                and (model < 0 or s.replicas["model"][r] == model)
                and prompt_tokens + 10 <= fleet.groups[r].max_model_len
            ]
            if decision.kind is Kind.HOLD:
                s.held(ticket)
                s.resumed(ticket)
            elif decision.kind is Kind.DISPATCH:
                assert decision.replica in able
                free = [r for r in able if r not in s._caps]
                lowest = min(fleet.groups[r].backup for r in free or able)
                assert fleet.groups[decision.replica].backup == lowest
                s.dispatched(ticket, decision.replica)
                s.withdrawn(ticket)
                tried.append(decision.replica)
            else:
                assert decision.kind is Kind.SHED or not able
        s.shed(ticket)


def zoned(*groups: dict[str, object]) -> Fleet:
    """A fleet for `serving`: what is behind its replicas is filled in there."""
    base = fleet_of([FakeBackend()] * len(groups), url="http://x")
    made = [group.model_copy(update={**changes}) for group, changes in zip(base.replicas, groups, strict=True)]
    return base.model_copy(update={"replicas": made})


def tenants(**changes: object) -> dict[str, GatewayTenant]:
    return {"a": GatewayTenant.model_validate({"slo": SLO, **changes})}


def body(**changes: object) -> bytes:
    return json.dumps({"model": "m", "prompt": "hello", "max_tokens": 3, **changes}).encode()


@pytest.mark.parametrize("headers", [{"X-Steersman-Regions": "eu"}, {"X-Steersman-Data-Class": "health"}])
async def test_a_failing_region_is_an_error_and_not_a_way_out_of_it(headers: dict[str, str]) -> None:
    groups = ({"region": "us"}, {"region": "eu", "data_classes": ["health"]}, {"region": "us"})
    async with serving(Prefer(0, 2, 1), 3, fleet=zoned(*groups), tenants=tenants()) as s:
        s.backends[1].status = 500
        async with s.client.post(PATH, data=body(), headers=headers) as response:
            assert response.status == 502
        await s.backends[1].stop()
        for _ in range(5):  # until its breaker opens, and then
            async with s.client.post(PATH, data=body(), headers=headers) as response:
                assert response.status in (502, 503)
        assert s.metric("refused_total", reason="region") >= 1
        assert not s.backends[0].bodies
        assert not s.backends[2].bodies
        async with s.client.post(PATH, data=body()) as response:
            assert response.status == 200


async def test_why_no_replica_may_take_it_is_said() -> None:
    groups = ({"region": "us"}, {"region": "eu"})
    async with serving(Prefer(0, 1), 2, fleet=zoned(*groups), tenants=tenants(regions=["eu"])) as s:
        s.gateway.pool.drain(1, True)
        async with s.client.post(PATH, data=body()) as response:
            assert response.status == 503
            assert "1 where its data may not go, 1 down" in (await response.text())
        assert s.gateway.scheduler.reasons[:2].tolist() == [Reason.REGION, Reason.DOWN]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_backup_takes_what_no_primary_may_take(stream: bool) -> None:
    groups = ({"backup": 2}, {"backup": 1}, {})
    health = HealthConfig(failures_to_open=1, backoff_s=60.0)
    async with serving(Prefer(0, 1, 2), 3, fleet=zoned(*groups), tenants=tenants(), health=health) as s:

        async def asked() -> str:
            async with s.client.post(PATH, data=body(stream=stream)) as response:
                await response.read()
                return response.headers["X-Steersman-Replica"]

        assert await asked() == "r2"
        s.backends[2].status = 500
        assert await asked() == "r1"  # tried on the primary first
        assert await asked() == "r1"
        assert len(s.backends[2].bodies) == 2
        s.gateway.pool.drain(1, True)
        assert await asked() == "r0"
        s.gateway.pool.drain(1, False)
        assert await asked() == "r1"


async def test_a_backup_stands_in_for_what_the_primaries_cannot_serve() -> None:
    groups = ({"max_model_len": 50}, {"backup": 1})
    async with serving(Prefer(0, 1), 2, fleet=zoned(*groups), tenants=tenants()) as s:
        async with s.client.post(PATH, data=body(max_tokens=500)) as response:
            assert response.headers["X-Steersman-Replica"] == "r1"
        async with s.client.post(PATH, data=body()) as response:
            assert response.headers["X-Steersman-Replica"] == "r0"


async def test_a_tenants_data_stays_where_it_may_be_whatever_its_requests_ask() -> None:
    groups = ({"region": "us", "data_classes": ["cards"]}, {"region": "eu", "data_classes": ["cards"]})
    async with serving(Prefer(0, 1), 2, fleet=zoned(*groups), tenants=tenants(regions=["eu"])) as s:
        for headers, status in (
            ({}, 200),
            ({"X-Steersman-Regions": "eu,us"}, 200),
            ({"X-Steersman-Data-Class": "cards"}, 200),
            ({"X-Steersman-Regions": "us"}, 400),
        ):
            async with s.client.post(PATH, data=body(), headers=headers) as response:
                assert response.status == status
        assert not s.backends[0].bodies


async def test_while_primaries_start_slowly_and_are_full_a_backup_helps() -> None:
    async with serving(Prefer(0, 1), 2, fleet=zoned({}, {"backup": 1}), tenants=tenants()) as s:
        s.gateway.scheduler.set_cap(0, 1.0)
        s.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(s.client.post(PATH, data=body()))
        await s.backends[0].asked.wait()
        async with s.client.post(PATH, data=body()) as response:
            assert response.headers["X-Steersman-Replica"] == "r1"
        s.backends[0].hold.set()
        (await asking).close()


def test_a_fleet_has_at_most_62_zones() -> None:
    with pytest.raises(ValueError, match="at most 62"):
        fleet(*[{"region": f"r{i}"} for i in range(63)])
    assert fleet(*[{"region": f"r{i}"} for i in range(62)]).zone_mask(["r61"], None).bit_length() <= 62


@cache
def largest() -> tuple[Fleet, Scheduler]:
    made = fleet(*[{"region": f"r{i:02}"} for i in range(62)])
    access = Access(made, {"a": GatewayTenant.model_validate({"slo": SLO})})
    return made, Scheduler(made, access.rows, Scripted(), Scripted())


@settings(deadline=None, max_examples=20)
@given(st.sets(st.integers(0, 61), min_size=1))
def test_every_zone_of_the_largest_fleet_is_told_apart(chosen: set[int]) -> None:
    large, s = largest()
    s.observe(s.arrive(LiveRequest(0, 10, 10, regions=large.zone_mask([f"r{i:02}" for i in chosen], None))))
    assert set(np.flatnonzero(s.mask[:62])) == chosen
