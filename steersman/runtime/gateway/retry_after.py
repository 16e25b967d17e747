"""When to try again: what the gateway says to clients, and what replicas say to it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_UNKNOWN_S = 1.0  # where a replica says nothing that can be read


def retry_after(seconds: float) -> dict[str, str]:
    """The header for clients: whole seconds, at least one, at most a minute."""
    return {"Retry-After": str(math.ceil(min(60.0, max(1.0, seconds))))}


def busy_s(headers: Iterable[tuple[bytes, bytes]]) -> float:
    """Seconds that a replica asks to be left alone for: of Retry-After, a number or a date; else one.

    A date is read beside the answer's own, as clocks of other machines may differ.
    """
    found = dict(headers)
    value = found.get(b"retry-after")
    if value is None:
        return _UNKNOWN_S
    try:
        seconds = float(value)
    except ValueError:
        until = _date(value)
        if until is None:
            return _UNKNOWN_S
        now = _date(found.get(b"date", b"")) or datetime.fromtimestamp(time.time(), UTC)
        seconds = (until - now).total_seconds()
    return seconds if math.isfinite(seconds) and seconds >= 0.0 else _UNKNOWN_S


def _date(value: bytes) -> datetime | None:
    try:
        date = parsedate_to_datetime(value.decode("latin-1"))
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)  # -0000 says that it is UTC
