"""A bundle on disk that may change while the gateway runs."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from steersman.runtime import archive
from steersman.runtime.errors import UserError
from steersman.runtime.log import named

EVERY_S = 1.0
_log = logging.getLogger("steersman.gateway")

_Stamp = tuple[tuple[int, int, int], ...] | None


class BundleWatch:
    """Looks at a bundle's files each second, and calls `changed(path)` once for every change of their content.

    path: as in `bundle.open_bundle`. A change counts when the files look the same twice: somebody may still be copying.
    """

    def __init__(self, path: Path, changed: Callable[[Path], Awaitable[None]]) -> None:
        self.path = path
        self._changed = changed
        self._stamp = self._before = _stamp(path)
        self._digest = _digest(path)

    async def run(self, every_s: float = EVERY_S) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except Exception:  # whatever a bundle does to those who read it, the next one is looked at
                _log.exception("%s could not be looked at", self.path, extra=named("bundle_watch_failed", {}))

    async def look(self) -> None:
        """Look once."""
        stamp, before = _stamp(self.path), self._before
        self._before = stamp
        if stamp == self._stamp or stamp != before:
            return
        self._stamp = stamp
        digest = await asyncio.to_thread(_digest, self.path)
        if digest != self._digest:
            self._digest = digest
            await self._changed(self.path)


def _stamp(path: Path) -> _Stamp:
    """What changes when somebody writes the files: inode, size and time of each; None where there are none."""
    try:
        found = archive.locate(path)
        files = [found] if found.is_file() else [found / name for name in archive.FILES]
        stats = [file.stat() for file in files]
    except (OSError, UserError):
        return None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _digest(path: Path) -> str:
    """Of the files' content; empty where they cannot be read."""
    try:
        files = archive.read(archive.locate(path))
    except UserError:
        return ""
    return hashlib.sha256(b"".join(files[name] for name in archive.FILES)).hexdigest()
