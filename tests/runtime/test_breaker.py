"""The circuit breaker and slow start of a replica, on a clock of the test's own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.runtime.replica._health import Health, HealthConfig, Status

CONFIG = HealthConfig(failures_to_open=3, backoff_s=1.0, backoff_max_s=8.0, ramp_s=10.0)


def health(slots: int = 20, config: HealthConfig = CONFIG) -> Health:
    return Health(config, slots)


def opened(now: float = 0.0) -> Health:
    made = health()
    for _ in range(3):
        made.failed(now, sent_s=now)
    return made


def open_s(made: Health, now: float) -> float:
    """Seconds until the breaker is no longer open."""
    return next(t / 10 for t in range(10_000) if made.status(now + t / 10) is not Status.OPEN)


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    made = health()
    made.failed(0.0, sent_s=0.0)
    made.failed(1.0, sent_s=1.0)
    assert made.status(1.0) is Status.UP
    made.failed(2.0, sent_s=2.0)
    assert made.status(2.0) is Status.OPEN


def test_once_its_backoff_is_over_it_starts_slowly_and_then_is_up() -> None:
    made = opened()
    assert made.status(0.9) is Status.OPEN
    assert made.status(1.0) is Status.RAMPING
    assert made.status(10.9) is Status.RAMPING
    assert made.status(11.0) is Status.UP


def test_one_failure_while_it_starts_slowly_opens_it_again_for_twice_as_long() -> None:
    made, now, waits = opened(), 0.0, []
    for _ in range(6):
        waits.append(open_s(made, now))
        now += waits[-1] + 0.5
        assert made.status(now) is Status.RAMPING
        made.failed(now, sent_s=now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_requests_that_were_under_way_when_it_opened_do_not_lengthen_its_backoff() -> None:
    made = opened()
    for _ in range(100):
        made.failed(0.5, sent_s=-0.5)
    assert open_s(made, 0.0) == 1.0


def test_an_answer_to_a_request_from_before_it_opened_does_not_shorten_the_next_backoff() -> None:
    made = opened()
    made.failed(1.5, sent_s=1.5)  # half open
    made.answered(2.0, sent_s=0.5)
    made.failed(4.0, sent_s=4.0)
    assert open_s(made, 4.0) == 4.0


def test_after_it_was_well_again_the_backoff_is_the_first_one() -> None:
    made = opened()
    made.failed(1.5, sent_s=1.5)
    made.answered(20.0, sent_s=20.0)
    for _ in range(3):
        made.failed(30.0, sent_s=30.0)
    assert open_s(made, 30.0) == 1.0


def test_without_a_slow_start_it_is_up_at_once() -> None:
    made = health(config=HealthConfig(ramp_s=0.0))
    for _ in range(3):
        made.failed(0.0, sent_s=0.0)
    assert made.status(1.0) is Status.UP
    assert made.cap(1.0) == math.inf


def test_the_cap_grows_from_one_to_its_slots() -> None:
    made = opened()
    caps = [made.cap(1.0 + t) for t in range(10)]
    assert caps == pytest.approx([1.0 + 2.0 * t for t in range(10)])
    assert made.cap(11.0) == math.inf


def test_cooling_is_no_failure() -> None:
    made = health()
    made.failed(0.0, sent_s=0.0)
    made.failed(0.0, sent_s=0.0)
    made.cool(0.0, 5.0)
    assert made.status(4.9) is Status.OPEN
    assert made.status(5.0) is Status.RAMPING
    made.failed(6.0, sent_s=6.0)
    assert open_s(made, 6.0) == 1.0  # its first backoff: cooling was not one


def test_cooling_makes_up_for_no_failure() -> None:
    made = health()
    made.failed(0.0, sent_s=0.0)
    made.failed(1.0, sent_s=1.0)
    made.cool(2.0, 1.0)
    made.failed(2.5, sent_s=1.5)  # it was under way, and is none the better for the other's 429
    assert made.status(3.4) is Status.OPEN


@pytest.mark.parametrize(
    ("seconds", "status"), [(-5.0, Status.RAMPING), (math.nan, Status.RAMPING), (1e9, Status.OPEN)]
)
def test_how_long_it_cools_is_bounded(seconds: float, status: Status) -> None:
    made = health()
    made.cool(0.0, seconds)
    assert made.status(0.0) is status
    assert made.status(60.0) is not Status.OPEN


def test_it_is_down_while_it_is_not_well_and_then_starts_slowly() -> None:
    made = health()
    made.looked(5.0, False)
    assert made.status(5.0) is Status.DOWN
    made.looked(6.0, True)
    assert made.status(6.0) is Status.RAMPING
    assert made.cap(6.0) == 1.0
    made.looked(7.0, True)  # well as before: the slow start goes on
    assert made.cap(8.0) == 5.0


def test_being_well_does_not_close_the_breaker_before_its_time() -> None:
    made = opened()
    made.looked(0.1, False)
    made.looked(0.2, True)
    assert made.status(0.2) is Status.OPEN


def test_draining_stands_above_all_else() -> None:
    made = opened()
    made.draining = True
    assert made.status(0.0) is made.status(100.0) is Status.DRAINING
    made.draining = False
    assert made.status(0.0) is Status.OPEN


EVENTS = st.sampled_from(["failed", "answered", "cool", "well", "unwell"])


@given(st.lists(st.tuples(EVENTS, st.floats(0, 5))))
def test_it_always_comes_back(events: list[tuple[str, float]]) -> None:
    made, now = health(), 0.0
    for event, pause_s in events:
        now += pause_s
        if event in ("failed", "answered"):
            getattr(made, event)(now, sent_s=now)
        elif event == "cool":
            made.cool(now, 3.0)
        else:
            made.looked(now, event == "well")
        assert made.cap(now) >= 1.0
    made.looked(now, True)
    assert made.status(now + 60.0 + 10.0) is Status.UP
