"""Progress of a training run on the terminal: a live line where there is one, a line now and then where not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10.0


class Stage:
    """One stage in progress. `advance` it with what is worth seeing."""

    def __init__(self, console: Console, title: str, total: int, progress: Progress | None) -> None:
        self._console, self._title, self._total = console, title, total
        self._progress = progress
        self._task = progress.add_task(title, total=total, figures="") if progress else None
        self._started = self._printed = time.monotonic()

    def advance(self, done: int, figures: str) -> None:
        """`done` of the total are done; `figures` say how it goes."""
        now = time.monotonic()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, figures=figures)
        elif now - self._printed >= LINE_EVERY_S or done >= self._total:
            self._printed = now
            left = (now - self._started) / max(1, done) * (self._total - done)
            self._console.print(
                f"{self._title}: {done}/{self._total}  {figures}  {left:.0f} s left",
                soft_wrap=True,
                highlight=False,
            )


@contextmanager
def stage(console: Console, title: str, total: int) -> Iterator[Stage]:
    """Show a stage of `total` steps while the block runs."""
    if not console.is_terminal:
        yield Stage(console, title, total, None)
        return
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        yield Stage(console, title, total, progress)
