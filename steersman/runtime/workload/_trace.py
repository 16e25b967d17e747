"""Recorded requests: reading trace files, and episodes as windows of recorded time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from steersman.runtime.errors import UserError
from steersman.runtime.workload._lengths import MAX_TOKENS
from steersman.runtime.workload._source import Files, Source, Split, Stream


class Trace(NamedTuple):
    """A parsed trace of n requests in order of time."""

    time_s: np.ndarray  # (n,) float64, from 0
    prompt_tokens: np.ndarray  # (n,) int64
    output_tokens: np.ndarray  # (n,) int64
    block_start: np.ndarray  # (n + 1,) int64 into `blocks`; all 0 where the trace knows no prefixes
    blocks: np.ndarray  # int64, from 0: equal means an equal prefix

    @property
    def period_s(self) -> float:
        """The recorded time, with one mean gap after the last request."""
        n = len(self.time_s)
        return float(self.time_s[-1]) * n / (n - 1)


Parser = Callable[[bytes, str], Trace]


class TraceSource(Source):
    """Requests of a trace file. Real order, lengths and arrival pattern are kept.

    Training takes the first `train_share` of the recorded time, held-out episodes the rest. An episode is a
    window of duration · rate_factor · load of recorded time at a random place, compressed to the duration. A
    window longer than its part starts at a random place and goes round and round in it.
    """

    parse: ClassVar[Parser]

    file: str = Field(description="relative to the folder of traces")
    rate_factor: float = Field(default=1.0, gt=0, le=1e4, description="how many times faster than recorded, at load 1")
    level_parts: bool = Field(
        default=False,
        description="slow a busy part down, and speed a calm one up, to the mean rate of the whole",
    )
    train_share: float = Field(default=0.7, gt=0, lt=1, description="share of the recorded time for training")
    max_tokens: int = Field(default=2048, ge=1, le=MAX_TOKENS, description="the client's limit, which cuts outputs off")

    def offered_rps(self, files: Files) -> float:
        trace = self._trace(files)
        return len(trace.time_s) / trace.period_s * self.rate_factor

    def _trace(self, files: Files) -> Trace:
        path = files.find(self.file)
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        return _read(type(self).parse, path, status.st_mtime_ns, status.st_size)

    def stream(
        self,
        rng: np.random.Generator,
        *,
        duration_s: float,
        load: float,
        split: Split,
        block_tokens: int,
        files: Files,
    ) -> Stream:
        trace = self._trace(files)
        time_s = self.times(trace)
        edge = self.train_share * trace.period_s
        low, high = (0.0, edge) if split == "train" else (edge, trace.period_s)
        speed = self.rate_factor * load
        if self.level_parts:
            recorded = max(int(((time_s >= low) & (time_s < high)).sum()), 1)
            speed *= len(time_s) / trace.period_s * (high - low) / recorded
        rows, lap, since_s = window(rng, time_s, low, high, duration_s * speed)
        # Rounding of the division must not push the last arrival out of the window.
        arrival_s = np.minimum(since_s / speed, np.nextafter(duration_s, 0))
        prompt = trace.prompt_tokens[rows]
        output = np.minimum(trace.output_tokens[rows], self.max_tokens)
        blocks = self.blocks(trace, rows, lap, block_tokens)
        count = prompt // block_tokens
        return Stream(arrival_s, prompt, output, np.full(len(rows), self.max_tokens), count, count, blocks)

    def times(self, trace: Trace) -> np.ndarray:
        """The recorded times to use, (n,), from 0 to below the trace's period, never falling."""
        return trace.time_s

    def blocks(self, trace: Trace, rows: np.ndarray, lap: np.ndarray, block_tokens: int) -> np.ndarray:
        """Identities of the full prompt blocks of `rows`, joined. A lap is a text of its own."""
        raise NotImplementedError


def window(
    rng: np.random.Generator, time_s: np.ndarray, low: float, high: float, length: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random window of `length` seconds of the part [low, high): rows, laps, seconds since its start."""
    part = high - low
    phase = rng.uniform(0, part - length if length <= part else part)
    rows, laps, since = [], [], []
    for lap in range(int((phase + length) // part) + 1):
        shift = low + phase - lap * part  # recorded time of the window's start, seen from this lap
        begin, end = np.searchsorted(time_s, [max(low, shift), min(high, shift + length)])
        rows.append(np.arange(begin, end))
        laps.append(np.full(max(end - begin, 0), lap))
        since.append(np.maximum(time_s[begin:end] - shift, 0.0))
    return np.concatenate(rows), np.concatenate(laps), np.concatenate(since)


@functools.lru_cache(maxsize=8)
def _read(parse: Parser, path: Path, mtime_ns: int, size: int) -> Trace:
    """The trace in a file; the time and size of the file are there so that a changed one is read again."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    trace = parse(data, str(path))
    for column in trace:
        column.setflags(write=False)  # shared by every episode of the process
    return trace


def text_lines(data: bytes, where: str) -> list[str]:
    """The lines of a UTF-8 file, without a byte-order mark.

    Raises:
        UserError: it is empty, or not UTF-8 text.
    """
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}:{line}: not UTF-8 text; save the trace as plain UTF-8") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{where}: the file is empty; a trace holds one request a line")
    return lines


def check_tokens(value: object, name: str, where: str) -> int:
    """`value` as a number of tokens.

    Raises:
        UserError: it is no whole number from 1 to MAX_TOKENS.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKENS:
        return value
    shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "…"
    raise UserError(f"{where}: {name} is {shown}, but must be a whole number of tokens from 1 to {MAX_TOKENS:,}")


def check_times(time_s: np.ndarray, lines: list[int], where: str) -> np.ndarray:
    """`time_s` (n,), counted from the first; equal times are fine. `lines` are where they stand in the file.

    Raises:
        UserError: one is before its predecessor, or they do not span a second.
    """
    falls = np.flatnonzero(np.diff(time_s) < 0)
    if len(falls):
        raise UserError(
            f"{where}:{lines[falls[0] + 1]}: the time is before that of the request above; sort the trace by time"
        )
    if len(time_s) < 2 or time_s[-1] - time_s[0] < 1:
        raise UserError(f"{where}: {len(time_s)} requests within a second; a trace must span at least one second")
    return time_s - time_s[0]
