"""Mooncake's traces: JSON lines with timestamp (ms), input_length, output_length and hash_ids.

Published with Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST '25 (Apache-2.0). A
hash id stands for a prefix block of 512 tokens; the last one of a request may be partly filled.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest
from steersman.runtime.workload._trace import (
    Parser,
    Trace,
    TraceSource,
    check_times,
    check_tokens,
    text_lines,
)

BLOCK_TOKENS = 512
KEYS = ("timestamp", "input_length", "output_length", "hash_ids")


def parse_mooncake(data: bytes, where: str) -> Trace:
    """The trace in the bytes of a JSON-lines file; `where` names it in errors.

    Raises:
        UserError: with the line and what is wrong there.
    """
    times, prompts, outputs, numbers = [], [], [], []
    starts, blocks = [0], []
    # An id is taken together with what stands before it, so that equal blocks are equal prefixes for certain.
    known: dict[tuple[int, int], int] = {}
    for number, line in enumerate(text_lines(data, where), 1):
        if not line.strip():
            continue
        at = f"{where}:{number}"
        row = _row(line, at)
        times.append(_milliseconds(row["timestamp"], at) / 1000)
        prompts.append(check_tokens(row["input_length"], "input_length", at))
        outputs.append(check_tokens(row["output_length"], "output_length", at))
        ids = row["hash_ids"]
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise UserError(f"{at}: hash_ids must be a list of whole numbers")
        if len(ids) != -(-prompts[-1] // BLOCK_TOKENS):
            raise UserError(
                f"{at}: {len(ids)} hash_ids, but input_length {prompts[-1]} makes "
                f"{-(-prompts[-1] // BLOCK_TOKENS)} blocks of {BLOCK_TOKENS} tokens"
            )
        before = -1
        for i in ids[: prompts[-1] // BLOCK_TOKENS]:
            before = known.setdefault((before, i), len(known))
            blocks.append(before)
        starts.append(len(blocks))
        numbers.append(number)
    time_s = check_times(np.array(times, float), numbers, where)
    return Trace(
        time_s,
        np.array(prompts, np.int64),
        np.array(outputs, np.int64),
        np.array(starts, np.int64),
        np.array(blocks, np.int64),
    )


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not valid JSON; every line must be one JSON object") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object, but a {type(row).__name__}")
    for key in KEYS:
        if key not in row:
            raise UserError(f"{where}: {key!r} is missing; {nearest(key, list(row))}")
    return row


def _milliseconds(value: Any, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e15:
        raise UserError(f"{where}: timestamp is {str(value)[:40]!r}, but must be milliseconds, 0 or more")
    return float(value)


class Mooncake(TraceSource):
    """Requests of a Mooncake trace, with its prefix blocks."""

    parse: ClassVar[Parser] = staticmethod(parse_mooncake)

    spread_s: float = Field(
        default=0.0,
        ge=0,
        le=60,
        description="moves each time by up to this, always alike: the published trace counts in steps of 3 s",
    )

    def check(self, block_tokens: int) -> None:
        if block_tokens != BLOCK_TOKENS:
            raise ValueError(f"a mooncake source needs block_tokens: {BLOCK_TOKENS}, got {block_tokens}")

    def times(self, trace: Trace) -> np.ndarray:
        if not self.spread_s:
            return trace.time_s
        moved = trace.time_s + np.random.default_rng(0).uniform(0, self.spread_s, len(trace.time_s))
        return np.minimum(np.sort(moved), np.nextafter(trace.period_s, 0))

    def blocks(self, trace: Trace, rows: np.ndarray, lap: np.ndarray, block_tokens: int) -> np.ndarray:
        joined = [np.zeros(0, np.int64)]
        for number, (begin, end) in enumerate(pairwise(_laps(lap))):
            if end > begin:
                first, last = trace.block_start[rows[begin]], trace.block_start[rows[end - 1] + 1]
                joined.append(trace.blocks[first:last] + number * len(trace.blocks))
        return np.concatenate(joined)


def _laps(lap: np.ndarray) -> np.ndarray:
    """Where each lap begins in `lap` (n,), and n."""
    return np.searchsorted(lap, np.arange(lap[-1] + 2 if len(lap) else 1))


SOURCE = Mooncake
