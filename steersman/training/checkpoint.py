"""Checkpoints: written whole or not at all, and the one before is kept, so that a damaged file costs one step."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from steersman.runtime.errors import UserError

T = TypeVar("T")


def previous(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, write: Callable[[Path], None]) -> None:
    """Replace the checkpoint by what `write` puts into the file that it is given, which has the same suffix.

    Raises:
        UserError: it cannot be written; the checkpoint is as it was.
    """
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if path.exists():
            path.replace(previous(path))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the checkpoint cannot be written ({error.strerror}); the one before is kept: make room, and go "
            "on with --resume"
        ) from error


def load(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` finds in the checkpoint, or in the one before where it is damaged; None where there is none.

    Raises:
        UserError: both are damaged.
    """
    kept = [one for one in (path, previous(path)) if one.exists()]
    for one in kept:
        try:
            found = read(one)
        except Exception:  # whatever a damaged file makes of a reader: of zip, of pickles, of arrays
            continue
        if one != path:
            print(f"{path} is damaged; going on from the checkpoint before it", file=sys.stderr)
        return found
    if kept:
        raise UserError(f"{path}: the checkpoint is damaged, and so is the one before; delete both to start it anew")
    return None
