"""The audit log: for each request with a rule on where its data may go, where it went.

One JSON object a line. Each holds the SHA-256 of the line before it, so that a line that was changed, taken out or put
in shows: `steersman audit` checks it. No prompt text, no key, no client address.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, Zone
from steersman.runtime.ticket import Kind

START = "0" * 64  # stands for the line before the first


class AuditConfig(Model):
    """Where the log goes."""

    file: Path
    rotate_mib: float = Field(default=64.0, gt=0, description="a full file is closed and numbered; the chain goes on")


class Audit:
    """An audit log that is written to. Lines gather in memory and are written about once a second, by `flush`.

    `decided` is for the event loop, `flush` for another thread: a disk may take its time.
    """

    def __init__(self, config: AuditConfig, fleet: Fleet) -> None:
        """
        Raises:
            UserError: the file cannot be written, or its last line is not one of an audit log.
        """
        self._config = config
        self._names = fleet.names
        self._zones = fleet.zones
        self._zone_of = [Zone(g.region, frozenset(g.data_classes)) for g in fleet.groups]
        self._waiting: list[dict[str, Any]] = []
        self._flushing = threading.Lock()
        self.failed = 0  # writes that failed; what they held is tried again
        try:
            self._last = _last_hash(config.file) or _last_hash(_last_closed(config.file)) or START
            with config.file.open("ab"):
                pass
        except OSError as error:
            raise UserError(f"audit: {config.file} cannot be written: {error.strerror or error}") from None

    @property
    def waiting(self) -> int:
        """Lines that are not written yet."""
        return len(self._waiting)

    def decided(
        self, request_id: bytes, tenant: str, mask: int, data_class: str | None, kind: Kind, replica: int, policy: str
    ) -> None:
        """A request with a rule was dispatched to `replica`, shed or refused. `mask`: the zones that it may go to."""
        line: dict[str, Any] = {
            "time": time.time(),
            "request": request_id.decode("ascii", "replace"),
            "tenant": tenant,
            "data_class": data_class,
            "allowed": _plain([zone for i, zone in enumerate(self._zones) if mask >> i & 1]),
            "decision": str(kind),
            "policy": policy,
        }
        if replica >= 0:
            zone = self._zone_of[replica]
            line |= {
                "replica": self._names[replica],
                "region": zone.region,
                "kept": bool(mask >> self._zones.index(zone) & 1),
            }
        self._waiting.append(line)

    def flush(self) -> None:
        """Write what has gathered. A disk that is full is tried again at the next call; nothing is dropped."""
        with self._flushing:
            self._write(len(self._waiting))

    def _write(self, count: int) -> None:
        """Write the first `count` lines that wait; more may come meanwhile."""
        if not count:
            return
        lines, last = [], self._last
        for fields in self._waiting[:count]:
            line = orjson.dumps({**fields, "before": last})
            last = hashlib.sha256(line).hexdigest()
            lines.append(line + b"\n")
        try:
            size = self._config.file.stat().st_size if self._config.file.exists() else 0
            if size > self._config.rotate_mib * 2**20:
                self._rotate()
                size = 0
            with self._config.file.open("ab") as file:
                try:
                    file.write(b"".join(lines))
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)  # no half lines
                    raise
        except OSError:
            self.failed += 1
            return
        self._last = last
        del self._waiting[:count]

    def _rotate(self) -> None:
        file = self._config.file
        last = _number(_last_closed(file))
        os.replace(file, file.with_name(f"{file.name}.{1 if last == math.inf else last + 1:.0f}"))


def _last_closed(file: Path) -> Path:
    """The last file that was closed before `file`; `file` itself where there is none."""
    return max((p for p in file.parent.glob(file.name + ".*") if _number(p) < math.inf), key=_number, default=file)


def _number(path: Path) -> float:
    """Of a file that is closed; infinite: the one that is written to."""
    return float(path.suffix[1:]) if path.suffix[1:].isdecimal() else math.inf


class Checked(NamedTuple):
    """What an audit log says of itself."""

    lines: int
    dispatched: int
    violations: int  # requests that went where they may not: a bug of ours


def check(files: Sequence[Path]) -> Checked:
    """Verify the files of an audit log: those that were closed by their numbers, then the one that is written to.

    What a chain cannot show: that lines are missing before its first one, or after its last one.

    Raises:
        UserError: a file cannot be read, or the chain is broken: names the file and the line.
    """
    before, count, dispatched, violations = None, 0, 0, 0
    for path, number, line in _lines(sorted(files, key=_number)):
        try:
            fields = json.loads(line)
            stated = fields["before"]
            decision, kept = fields["decision"], fields.get("kept", True)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a line of an audit log; it was damaged or changed") from None
        if before is not None and stated != before:
            raise UserError(
                f"{path}, line {number}: does not follow the line before it; a line was changed or is missing"
            )
        before = hashlib.sha256(line).hexdigest()
        count += 1
        dispatched += decision == Kind.DISPATCH
        violations += not kept
    return Checked(count, dispatched, violations)


def _lines(files: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    for path in files:
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    yield path, number, line.rstrip(b"\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _last_hash(path: Path) -> str:
    """Of the file's last line; empty where there is none."""
    if not path.exists() or not path.stat().st_size:
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        tail = file.read()
    if not tail.endswith(b"\n"):
        raise UserError(f"audit: {path} ends in half a line; move it away, so that a new one is begun")
    return hashlib.sha256(tail.rstrip(b"\n").rpartition(b"\n")[2]).hexdigest()


def _plain(zones: Sequence[Zone]) -> list[dict[str, Any]]:
    return [{"region": zone.region, "data_classes": sorted(zone.data_classes)} for zone in zones]
