"""Files that somebody may write while they are in use."""

from __future__ import annotations

from pathlib import Path


class Changes:
    """Tells whether any of some files has changed since it was asked last: its time or size is another."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._stamps = self._look()

    def any(self) -> bool:
        """Whether one has; true once for each change."""
        before, self._stamps = self._stamps, self._look()
        return self._stamps != before

    def _look(self) -> list[tuple[int, int]]:
        stamps = []
        for path in self._paths:
            try:
                stat = path.stat()
            except OSError:
                stamps.append((0, 0))
            else:
                stamps.append((stat.st_mtime_ns, stat.st_size))
        return stamps
