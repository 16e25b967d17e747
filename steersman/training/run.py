"""A run's folder: its configuration, the results of finished stages, checkpoints, events and the bundle.

runs/<name>/
    config.yaml        the training file as it was run, with every default written out
    stages/*.json      results of finished stages: an interrupted run repeats none of them
    checkpoints/       of the stage that runs
    bundle/            the exported policy
    comparison.json    the final comparison
    figures/           its pictures
    events.out…        TensorBoard
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from steersman.runtime.config import read_yaml, validate
from steersman.runtime.errors import UserError
from steersman.training.config import TrainingConfig


class Run:
    """An open run folder."""

    def __init__(self, folder: Path, config: TrainingConfig) -> None:
        self.folder = folder
        self.config = config
        self.stages = folder / "stages"
        self.checkpoints = folder / "checkpoints"
        self.bundle = folder / "bundle"
        self.learned = folder / "learned"  # a bundle of every algorithm, chosen or not

    @classmethod
    def create(cls, root: Path, config: TrainingConfig, name: str, traces: Path | None = None) -> Run:
        """A new folder under `root`, named by `name` and the time; `traces` is kept for a resumption.

        Raises:
            UserError: it cannot be written.
        """
        folder = root / stamped(name)
        try:
            folder.mkdir(parents=True, exist_ok=False)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
            if traces is not None:
                write_json(folder / "traces.json", str(traces.resolve()))
        except OSError as error:
            raise UserError(f"{folder}: the run folder cannot be written: {error.strerror}") from error
        return cls(folder, config)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing folder, to be resumed.

        Raises:
            UserError: it is not a run folder.
        """
        path = folder / "config.yaml"
        if not path.is_file():
            raise UserError(
                f"{folder}: not a run folder (it has no config.yaml); name one that `steersman train` printed"
            )
        return cls(folder, validate(TrainingConfig, read_yaml(path), str(path)))

    @property
    def traces(self) -> Path | None:
        """The folder of traces that the run was started with."""
        path = self.folder / "traces.json"
        return Path(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def once(self, stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `work`, done at most once for this folder; it must survive a round trip through JSON."""
        path = self.stages / f"{stage}.json"
        if path.exists():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except ValueError:
                raise UserError(f"{path}: damaged; delete it to repeat that stage") from None
        result = work()
        write_json(path, result)
        return result


def stamped(name: str) -> str:
    """`name`, fit for a file, and the time."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-{datetime.now():%Y%m%d-%H%M%S}"


def write_json(path: Path, data: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    temporary.replace(path)
