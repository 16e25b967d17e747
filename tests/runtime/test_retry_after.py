"""When to try again, as the gateway says it and as replicas do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.runtime.gateway.retry_after import busy_s, retry_after


@pytest.mark.parametrize(("seconds", "said"), [(0.0, "1"), (1.2, "2"), (59.5, "60"), (1e9, "60"), (float("nan"), "1")])
def test_retry_after_is_whole_seconds_up_to_a_minute(seconds: float, said: str) -> None:
    assert retry_after(seconds) == {"Retry-After": said}


@pytest.mark.parametrize(
    ("said", "seconds"), [(b"7", 7.0), (b"0", 0.0), (b"", 1.0), (b"soon", 1.0), (b"-3", 1.0), (b"nan", 1.0)]
)
def test_a_replica_says_seconds(said: bytes, seconds: float) -> None:
    assert busy_s([(b"retry-after", said)]) == seconds


def test_a_date_counts_from_the_answers_own() -> None:
    headers = [(b"date", b"Wed, 21 Oct 2015 07:28:00 GMT"), (b"retry-after", b"Wed, 21 Oct 2015 07:28:20 GMT")]
    assert busy_s(headers) == 20.0


def test_without_one_it_counts_from_now() -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 3000.0 < busy_s([(b"retry-after", until.encode())]) <= 3600.0


def test_a_date_that_is_over_is_no_reason_to_ask_at_once() -> None:
    headers = [(b"date", b"Wed, 21 Oct 2015 07:28:00 GMT"), (b"retry-after", b"Wed, 21 Oct 2015 07:27:00 GMT")]
    assert busy_s(headers) == 1.0


@given(st.binary(), st.binary())
def test_whatever_it_says_is_a_time_or_nothing(said: bytes, date: bytes) -> None:
    assert busy_s([(b"date", date), (b"retry-after", said)]) >= 0.0
