"""When a replica gets no requests, and how it comes back. Times are by hand, seconds."""

from __future__ import annotations

import asyncio
import math
import time
from types import SimpleNamespace

import pytest
from simulated import TENANTS
from test_scheduler import Clock, Fixed, counts, scheduler

from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway.limits import Bucket
from steersman.runtime.replica import _pool, _pulse
from steersman.runtime.replica._health import Health, HealthConfig, Status
from steersman.runtime.replica._pool import Pool
from steersman.runtime.replica._pulse import Pulse
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Kind, LiveRequest

CONFIG = HealthConfig(failures_to_open=3, backoff_s=1.0, ramp_s=10.0)


def opened(at_s: float = 10.0, failures: int = 3) -> Health:
    """One whose breaker opened at a time."""
    health = Health(CONFIG, 100)
    for _ in range(failures):
        health.failed(at_s, sent_s=at_s - 1.0)
    return health


def test_a_few_failures_open_the_breaker() -> None:
    assert opened(failures=2).status(10.0) is Status.UP
    assert opened(failures=3).status(10.0) is Status.OPEN


def test_an_answer_between_them_keeps_it_closed() -> None:
    health = opened(failures=2)
    health.answered(10.0, sent_s=9.0)
    health.failed(10.0, sent_s=9.0)
    assert health.status(10.0) is Status.UP


def test_one_that_fails_every_other_request_is_left_out() -> None:
    health = Health(CONFIG, 100)
    for _ in range(5):
        health.failed(1.0, sent_s=1.0)
        health.answered(1.0, sent_s=1.0)
    assert health.status(1.0) is Status.OPEN


def test_one_that_fails_a_request_now_and_then_is_not() -> None:
    health = Health(CONFIG, 100)
    for at_s in range(100):
        health.failed(at_s, sent_s=at_s)
        for _ in range(4):
            health.answered(at_s, sent_s=at_s)
        assert health.status(at_s) is Status.UP


def test_all_that_one_outage_fails_opens_it_once() -> None:
    health = opened(failures=64)
    assert health.status(10.9) is Status.OPEN
    assert health.status(11.1) is Status.RAMPING


def test_a_late_failure_from_before_the_outage_does_not_open_it_again() -> None:
    health = opened()
    health.failed(12.0, sent_s=9.0)
    assert health.status(12.0) is Status.RAMPING


def test_a_failure_while_it_starts_slowly_opens_it_for_twice_as_long() -> None:
    health = opened()
    health.failed(12.0, sent_s=11.5)
    assert health.status(13.9) is Status.OPEN
    assert health.status(14.1) is Status.RAMPING


def test_a_late_answer_from_before_the_outage_does_not_forgive_it() -> None:
    health = opened()
    health.answered(10.5, sent_s=9.0)
    health.failed(12.0, sent_s=11.5)
    assert health.status(13.9) is Status.OPEN


def test_a_replica_that_is_back_may_take_more_and_more() -> None:
    health = opened()
    caps = [health.cap(at_s) for at_s in (11.0, 13.5, 16.0, 21.0)]
    assert caps == [1.0, 26.0, 51.0, math.inf]


def test_one_that_asks_to_be_left_alone_is_no_failure() -> None:
    health = Health(CONFIG, 100)
    health.cool(10.0, 5.0)
    assert health.status(14.9) is Status.OPEN
    health.cool(20.0, 5.0)  # no longer than before
    assert health.status(25.1) is Status.RAMPING


# Clocks


@pytest.mark.parametrize("jump_s", [3600.0, -500.0])
def test_a_clock_that_jumps_costs_no_count_and_no_decision(jump_s: float) -> None:
    clock = Clock()
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0), clock=clock)
    fresh = counts(s)
    for moment in range(3):  # before the dispatch, before the first token, before the end
        ticket = s.arrive(LiveRequest(0, 1000, 100))
        clock.now += jump_s * (moment == 0)
        decision = s.decide(ticket)
        assert (decision.kind, decision.fallback) == (Kind.DISPATCH, None)
        s.dispatched(ticket, decision.replica)
        clock.now += jump_s * (moment == 1)
        s.first_token(ticket)
        s.streamed(ticket, 3)
        clock.now += jump_s * (moment == 2)
        assert s.ended(ticket, True, 4) is not None
    assert counts(s) == fresh


def test_a_clock_that_jumps_back_gives_no_tenant_more() -> None:
    bucket = Bucket(60.0, now=1000.0)
    bucket.take(60.0)
    assert bucket.wait_s(1.0, 500.0) == pytest.approx(1.0)
    assert bucket.wait_s(1.0, 501.5) == 0.0


async def test_a_loop_that_stood_still_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pulse, "BEAT_S", 0.01)
    monkeypatch.setattr(_pulse, "STILL_S", 0.1)
    loop = asyncio.get_running_loop()
    pulse, began_s = Pulse(), loop.time()
    try:
        time.sleep(0.3)
        async with asyncio.timeout(10):
            while not pulse.stopped_since(began_s):
                await asyncio.sleep(0.01)
        assert not pulse.stopped_since(loop.time())
    finally:
        pulse.close()


async def test_a_look_that_is_only_slow_counts_when_the_next_one_is_slow_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pool, "SLOW_S", 0.0)
    fleet = Fleet.model_validate(
        {
            "description": "For tests.",
            "replicas": [
                {
                    "name": "r",
                    "profile": "llama-3.1-8b-h100-bf16",
                    "kv_tokens": 20000,
                    "backend": {"kind": "openai", "options": {"url": "http://127.0.0.1:9"}},
                }
            ],
        }
    )
    pool = Pool(fleet)
    looks = iter([False, True, False, False])

    async def look(index: int, scheduler: object) -> bool:
        return next(looks)

    monkeypatch.setattr(pool, "_look", look)
    monkeypatch.setattr(pool, "_pulse", SimpleNamespace(stopped_since=lambda _: False, close=lambda: None))
    pool.attach(Scheduler(fleet, TENANTS))
    seen = []
    for _ in range(4):
        await pool._update(0, pool._scheduler)  # type: ignore[arg-type]
        seen.append(pool.status(0))
    assert seen == [Status.UP, Status.UP, Status.UP, Status.DOWN]
