"""What a tenant may take, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.runtime.gateway.limits import Bucket, FairShares, Limiter, Limits, OverLimit


def limiter(fair: FairShares | None = None, **limits: Limits) -> Limiter:
    return Limiter(["a", "b", "c"], [1.0, 2.0, 1.0], limits, fair)


def admitted(limiter: Limiter, tenant: int, tokens: float = 1, slots: float = 100, now: float = 0.0) -> bool:
    try:
        limiter.admit(tenant, tokens, slots, now)
    except OverLimit:
        return False
    return True


def test_without_limits_everything_is_admitted() -> None:
    assert all(admitted(limiter(), 0, 1e9) for _ in range(1000))


def test_a_minutes_requests_may_come_at_once_and_then_only_as_time_goes_by() -> None:
    limits = limiter(a=Limits(requests_per_minute=60))
    assert [admitted(limits, 0) for _ in range(61)] == [True] * 60 + [False]
    assert [admitted(limits, 0, now=2.0) for _ in range(3)] == [True, True, False]
    assert admitted(limits, 1)  # others are not touched


def test_who_is_over_is_told_which_limit_and_how_long_to_wait() -> None:
    limits = limiter(a=Limits(requests_per_minute=30))
    for _ in range(30):
        limits.admit(0, 1, 100, 0.0)
    with pytest.raises(OverLimit, match="tenant 'a' is over its 30 requests per minute") as over:
        limits.admit(0, 1, 100, 0.5)
    assert over.value.limit == "requests"
    assert over.value.retry_after_s == pytest.approx(1.5)
    assert admitted(limits, 0, now=0.5 + over.value.retry_after_s)


def test_what_was_refused_was_not_counted() -> None:
    limits = limiter(a=Limits(requests_per_minute=2, tokens_per_minute=100))
    assert admitted(limits, 0, tokens=90)
    assert not admitted(limits, 0, tokens=50)
    assert admitted(limits, 0, tokens=10)  # the refused one took neither a request nor tokens
    assert limits.open[0] == limits.total == 2


def test_a_clock_that_jumps_back_gives_nothing_and_takes_nothing() -> None:
    bucket = Bucket(60.0, 1000.0)
    bucket.take(60.0)
    assert bucket.wait_s(1.0, 1000.0) == pytest.approx(1.0)
    assert bucket.wait_s(1.0, 10.0) == pytest.approx(1.0)
    assert bucket.wait_s(1.0, 11.0) == 0.0


def test_a_clock_that_jumps_ahead_gives_no_more_than_a_minute() -> None:
    bucket = Bucket(60.0, 0.0)
    bucket.wait_s(1.0, 1e12)
    bucket.take(60.0)
    assert bucket.wait_s(1.0, 1e12) == pytest.approx(1.0)


def test_a_request_that_is_larger_than_a_minutes_tokens_waits_for_a_full_bucket_only() -> None:
    limits = limiter(a=Limits(tokens_per_minute=100))
    assert admitted(limits, 0, tokens=1000)
    assert not admitted(limits, 0, tokens=1, now=60.0)  # the rest is paid back first
    assert admitted(limits, 0, tokens=1, now=600.0)


def test_tokens_that_were_not_used_come_back_and_those_beyond_are_paid() -> None:
    limits = limiter(a=Limits(tokens_per_minute=100))
    limits.admit(0, 100, 100, 0.0)
    assert not admitted(limits, 0, 1)
    limits.ended(0, 100, 40)
    assert admitted(limits, 0, 60)
    assert not admitted(limits, 0, 1)
    limits.ended(0, 60, 160)
    assert not admitted(limits, 0, 1, now=59.0)
    assert admitted(limits, 0, 1, now=61.0)


def test_tokens_of_which_nobody_told_stay_taken() -> None:
    limits = limiter(a=Limits(tokens_per_minute=100))
    limits.admit(0, 100, 100, 0.0)
    limits.ended(0, 100, None)
    assert not admitted(limits, 0, 50)


def test_requests_at_once_are_bounded_and_free_their_place_when_they_end() -> None:
    limits = limiter(a=Limits(concurrent=2))
    assert [admitted(limits, 0) for _ in range(3)] == [True, True, False]
    limits.ended(0, 1, None)
    assert [admitted(limits, 0) for _ in range(2)] == [True, False]


def test_while_the_fleet_has_room_shares_bind_nobody() -> None:
    limits = limiter(FairShares())
    assert [admitted(limits, 0, slots=10) for _ in range(10)] == [True] * 10


def test_on_a_full_fleet_everybody_gets_a_share_by_weight() -> None:
    limits = limiter(FairShares())
    for _ in range(12):
        limits.admit(0, 1, 12, 0.0)
    assert not admitted(limits, 0, slots=12)
    assert sum(admitted(limits, 1, slots=12) for _ in range(20)) == 8  # weight 2 of 3
    for _ in range(9):
        limits.ended(0, 1, None)
    assert sum(admitted(limits, 0, slots=12) for _ in range(20)) == 1  # back to 4 of 12, as soon as it is full again


def test_a_fleet_of_which_nothing_is_up_is_not_full() -> None:
    limits = limiter(FairShares())
    assert [admitted(limits, 0, slots=0) for _ in range(3)] == [True] * 3


def test_nobodys_share_is_less_than_one_request() -> None:
    limits = limiter(FairShares())
    limits.admit(1, 1, 1, 0.0)
    assert admitted(limits, 0, slots=1)
    assert not admitted(limits, 0, slots=1)
    assert admitted(limits, 2, slots=1)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 400), st.floats(0, 20), st.one_of(st.none(), st.integers(0, 400)))
    ),
)
def test_counts_return_to_zero_and_no_minute_gives_more_than_two_minutes_worth(
    steps: list[tuple[int, int, float, int | None]],
) -> None:
    limits = limiter(FairShares(), a=Limits(requests_per_minute=10), b=Limits(tokens_per_minute=1000, concurrent=3))
    now, running, admitted_a = 0.0, [], []
    for tenant, tokens, pause_s, used in steps:
        now += pause_s
        if admitted(limits, tenant, tokens, 5, now):
            running.append((tenant, tokens, used))
            if tenant == 0:
                admitted_a.append(now)
        if len(running) > 4:
            limits.ended(*running.pop(0))
        assert limits.total == len(running) == sum(limits.open)
        assert limits.open[1] <= 3
    for over in running:
        limits.ended(*over)
    assert limits.open == [0, 0, 0]
    for i, start in enumerate(admitted_a):
        assert sum(start <= at < start + 60.0 for at in admitted_a[i:]) <= 20
