"""What a journal may take: settings of the writer."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from steersman.runtime.config import Model


class JournalConfig(Model):
    """Where decisions are journalled, and within which bounds."""

    folder: Path = Field(description="of one gateway alone; made if it is missing")
    segment_decisions: int = Field(default=4096, ge=1, le=1 << 20, description="decisions of a file")
    segment_s: float = Field(
        default=60.0, gt=0, description="a file is begun after so long, even if it is small: what a crash may cost"
    )
    max_mib: int = Field(default=512, ge=1, description="all files together; the oldest ones go")
    memory_mib: int = Field(
        default=256, ge=1, description="for decisions that are not written yet; beyond it, new ones are dropped"
    )
