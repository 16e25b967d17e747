"""The files of a journal's folder: written whole or not at all, named in order, the oldest removed."""

from __future__ import annotations

import os
import re
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

SUFFIX = ".npz.zst"
MOST_FILES = 16_384  # with little traffic, files are small and many: a reader must still get through them
_NAME = re.compile(r"journal-(\d{8,})-\d{8}T\d{6}Z" + re.escape(SUFFIX))


def segment_paths(folder: Path) -> list[Path]:
    """A journal's files in the order in which they were written, whatever the wall clock did.

    Raises:
        OSError: the folder cannot be read.
    """
    numbered = [(int(found[1]), path) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


class Store:
    """A folder that never holds more than `limit` bytes and MOST_FILES segments. Every method may raise OSError."""

    def __init__(self, folder: Path, limit: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".journal-*{SUFFIX}.tmp"):  # of a gateway that was killed
            left.unlink(missing_ok=True)
        self.folder, self.limit = folder, limit
        self._files = deque((path, path.stat().st_size) for path in segment_paths(folder))
        self.bytes = sum(size for _, size in self._files)
        self.sequence = int(_NAME.fullmatch(self._files[-1][0].name)[1]) + 1 if self._files else 1  # type: ignore[index]
        self._make_room(0)

    def put(self, data: bytes) -> Path:
        """Write the next file. Room is made first: the bound holds at every moment."""
        if len(data) > self.limit:
            raise OSError(f"a file of {len(data) >> 20} MiB exceeds the bound of {self.limit >> 20} MiB")
        self._make_room(len(data))
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        path = self.folder / f"journal-{self.sequence:08d}-{stamp}{SUFFIX}"
        temporary = path.with_name(f".{path.name}.tmp")
        self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
        try:
            write_synced(temporary, data)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._files.append((path, len(data)))
        self.bytes += len(data)
        self.sequence += 1
        _sync_folder(self.folder)
        return path

    @property
    def files(self) -> int:
        """How many files there are."""
        return len(self._files)

    def _make_room(self, size: int) -> None:
        while self._files and (self.bytes + size > self.limit or len(self._files) >= MOST_FILES):
            path, freed = self._files[0]
            path.unlink(missing_ok=True)
            self._files.popleft()
            self.bytes -= freed


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
