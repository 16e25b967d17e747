"""TensorBoard for a gateway: what it serves, under the names that training uses, so that both lie side by side."""

from __future__ import annotations

from pathlib import Path
from time import time

from steersman.runtime.outcomes import Summary
from steersman.training import tags


class LiveBoard:
    """Writes the summaries of a gateway's windows. TensorBoard's step is seconds since the first of them."""

    def __init__(self, folder: Path) -> None:
        """folder: a run of its own, for instance `runs/live` beside the training runs."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=5)
        self._began = time()

    def write(self, summary: Summary, more: dict[str, float] | None = None) -> None:
        """One window; `more`: further values by their tags (a shadow's, a canary's)."""
        step = round(time() - self._began)
        values = tags.watched(summary) if summary.arrived else {}
        for tag, value in {**values, **(more or {})}.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()
