"""The files that a finished benchmark leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steersman.training.benchmark.board import write_board
from steersman.training.benchmark.figures import Figures
from steersman.training.benchmark.folder import Folder
from steersman.training.benchmark.page import page
from steersman.training.benchmark.plain import as_json
from steersman.training.run import write_json


def write(folder: Folder, found: Sequence[Figures]) -> dict[str, Any]:
    """Write results.json, report.html and the TensorBoard runs; returns what is in results.json."""
    results = as_json(found, folder.plan.budget, folder.plan.command)
    write_json(folder.path / "results.json", results)
    (folder.path / "report.html").write_text(page(folder, found), encoding="utf-8")
    write_board(folder.path / "tensorboard", found)
    return results
