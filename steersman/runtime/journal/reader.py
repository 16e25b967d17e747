"""A journal's folder read back: all requests on one time line, and the decisions about them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, Zone
from steersman.runtime.guard import Reason
from steersman.runtime.journal.segment import Segment, unpack
from steersman.runtime.journal.store import segment_paths
from steersman.runtime.tenant import Tenant


@dataclass(frozen=True)
class Recording:
    """The n requests of a journal in order of arrival, run after run of the gateway.

    Their indices of tenants, models and zones are those here. Between two runs the clock stands still
    for a mean gap: a gateway that was off had no traffic to learn from.
    """

    folder: Path
    paths: list[Path]  # of the files that could be read
    problems: list[str]  # a sentence for each that could not
    fleet: Fleet  # the last one
    tenants: dict[str, Tenant]  # the last promise to each
    models: list[str]
    zones: list[Zone]
    started: datetime  # of the first run
    lost_decisions: int  # that the gateways could not write, as far as the files tell
    table: np.ndarray  # REQUEST (n,)
    time_s: np.ndarray  # float64 (n,), of arrival, from 0
    run: np.ndarray  # int64 (n,): 0, 1, …
    runs: list[str]  # their names in the headers
    down: np.ndarray  # bool (n,): at its last decision, some replica was down
    key_start: np.ndarray  # int64 (n + 1,)
    keys: np.ndarray  # int64: prefix keys, joined

    @property
    def period_s(self) -> float:
        """The recorded time, with one mean gap after the last request."""
        n = len(self.time_s)
        return float(self.time_s[-1]) * n / (n - 1)


class Decisions(NamedTuple):
    """d recorded decisions of a policy, in their order; those that the guard made alone are not among them."""

    rows: np.ndarray  # float32 (d, C, WIDTH)
    mask: np.ndarray  # bool (d, C)
    choice: np.ndarray  # int64 (d,): a candidate
    left_out: int  # that matched, but were beyond the limit or on another fleet


def read_journal(folder: Path) -> Recording:
    """The journal in `folder`, as it was when this process first read it: a gateway may go on writing.

    Raises:
        UserError: there is none, or nothing in it can be read.
    """
    return _read(Path(folder).resolve(), Path(folder))


@functools.lru_cache(maxsize=4)
def _read(_: Path, folder: Path) -> Recording:
    try:
        paths = segment_paths(folder)
    except OSError as error:
        raise UserError(f"{folder}: the journal cannot be read: {error.strerror or error}") from None
    if not paths:
        raise UserError(f"{folder}: holds no file of a journal; name the folder that the gateway journals to")
    problems: list[str] = []
    kept = [(path, _slim(segment)) for path, segment in _segments(paths, problems)]
    if not kept:
        raise UserError(f"no file of the journal {folder} can be read; the first: {problems[0]}")
    return _joined(folder, kept, problems)


def _segments(paths: list[Path], problems: list[str]) -> Iterator[tuple[Path, Segment]]:
    for path in paths:
        try:
            yield path, unpack(path.read_bytes(), str(path))
        except FileNotFoundError:
            problems.append(f"{path}: has been removed meanwhile")
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror or error}")
        except UserError as error:
            problems.append(str(error))


class _Slim(NamedTuple):
    """What is kept of every file."""

    segment: Segment  # without its observations
    down: np.ndarray


def _slim(segment: Segment) -> _Slim:
    last = np.cumsum(segment.requests["decisions"]) - 1
    down = (segment.reasons[last] == Reason.DOWN).any(axis=1)
    return _Slim(Segment(segment.header, segment.requests, segment.keys, segment.decisions[:0], {}), down)


def _joined(folder: Path, kept: list[tuple[Path, _Slim]], problems: list[str]) -> Recording:
    headers = [slim.segment.header for _, slim in kept]
    latest = headers[-1]
    tenants = {name: tenant for header in headers for name, tenant in header.tenants.items()}
    models = list(dict.fromkeys(name for header in reversed(headers) for name in header.fleet.models))
    zones = list(dict.fromkeys(zone for header in reversed(headers) for zone in header.fleet.zones))
    runs = list(dict.fromkeys(header.run for header in headers))
    tables = []
    for _, slim in kept:
        header, table = slim.segment.header, slim.segment.requests.copy()
        table["tenant"] = np.array([list(tenants).index(name) for name in header.tenants])[table["tenant"]]
        own = np.array([models.index(name) for name in header.fleet.models])
        table["model"] = np.where(table["model"] >= 0, own[table["model"]], -1)
        mask = table["regions"].copy()
        table["regions"] = 0
        for i, zone in enumerate(header.fleet.zones):
            table["regions"] |= (mask >> i & 1) << zones.index(zone)
        tables.append(table)
    table = np.concatenate(tables)
    run = np.repeat([runs.index(header.run) for header in headers], [len(t) for t in tables])
    order = np.lexsort((table["number"], table["arrival_us"], run))
    start = np.cumsum(table["keys"], dtype=np.int64) - table["keys"]
    keys = np.concatenate([slim.segment.keys for _, slim in kept])
    table, run = table[order], run[order]
    key_start = np.concatenate([[0], np.cumsum(table["keys"], dtype=np.int64)])
    place = np.arange(key_start[-1]) + np.repeat(start[order] - key_start[:-1], table["keys"])
    lost = {header.run: header.lost_decisions for header in headers}
    return Recording(
        folder=folder,
        paths=[path for path, _ in kept],
        problems=problems,
        fleet=latest.fleet,
        tenants=tenants,
        models=models,
        zones=zones,
        started=datetime.fromtimestamp(headers[0].started_s, UTC),
        lost_decisions=sum(lost.values()),
        table=table,
        time_s=_time_line(table["arrival_us"], run),
        run=run,
        runs=runs,
        down=np.concatenate([slim.down for _, slim in kept])[order],
        key_start=key_start,
        keys=keys[place],
    )


def _time_line(arrival_us: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Seconds since the first arrival, without the time between runs."""
    gap = np.diff(arrival_us, prepend=arrival_us[:1]) / 1e6
    first = np.diff(run, prepend=run[:1]) != 0
    within = gap[1:][~first[1:]]
    gap[first] = within.mean() if len(within) else 1.0
    return np.cumsum(gap)


def recorded_decisions(recording: Recording, requests: np.ndarray, limit: int) -> Decisions:
    """The newest `limit` decisions about the requests that are True in `requests`, bool (n,).

    Raises:
        UserError: their observations are of another schema.
    """
    wanted = {name: recording.table["number"][requests & (recording.run == r)] for r, name in enumerate(recording.runs)}
    found: list[tuple[np.ndarray, ...]] = []
    room, left_out = limit, 0
    names = recording.fleet.names
    candidates = 0  # those of the newest file
    for _, segment in _segments(recording.paths[::-1], []):
        header, table = segment.header, segment.decisions
        candidates = candidates or header.candidates
        chosen = np.flatnonzero(np.isin(table["number"], wanted[header.run]) & (table["choice"] >= 0))
        if not len(chosen):
            continue
        if room <= 0 or header.fleet.names != names or header.candidates != candidates:
            left_out += len(chosen)
            continue
        left_out += max(0, len(chosen) - room)
        chosen = chosen[-room:]
        room -= len(chosen)
        run = np.full(len(chosen), recording.runs.index(header.run))
        found.append((segment.rows[chosen], segment.mask[chosen], table["choice"][chosen], table["order"][chosen], run))
    if not found:
        return Decisions(np.zeros((0, 2, 0), np.float32), np.zeros((0, 2), np.bool_), np.zeros(0, np.int64), left_out)
    rows, mask, choice, order, run = (np.concatenate(column) for column in zip(*found, strict=True))
    sequence = np.lexsort((order, run))
    return Decisions(rows[sequence], mask[sequence], choice[sequence].astype(np.int64), left_out)
