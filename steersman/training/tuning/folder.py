"""The folder of a tuning: what was asked, the table of trials, TensorBoard's HParams.

tunings/<name>-<stamp>/
    tuning.yaml, traces.json    what was asked
    trials.csv, best.yaml       what came of it
    tensorboard/                a run for each trial
    trials/                     Ray Tune's own; of a heuristic: stages/ and checkpoints/, as a training has
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from steersman.runtime.config import read_yaml, validate
from steersman.runtime.errors import UserError
from steersman.training.run import stamped, write_json
from steersman.training.tuning.space import TuningConfig

TOLD = "worth"  # the metric
FIXED = ("trial", TOLD, "rounds")  # columns before those of the point


def create(root: Path, tuning: TuningConfig, name: str, traces: Path | None) -> Path:
    """A new folder under `root` for a tuning.

    Raises:
        UserError: it cannot be written.
    """
    folder = root / stamped(name)
    try:
        folder.mkdir(parents=True, exist_ok=False)
        text = yaml.safe_dump(tuning.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        (folder / "tuning.yaml").write_text(text, encoding="utf-8")
        write_json(folder / "traces.json", str(traces.resolve()) if traces else None)
    except OSError as error:
        raise UserError(f"{folder}: the folder of a tuning cannot be written: {error.strerror}") from error
    return folder


def opened(folder: Path) -> TuningConfig:
    """The tuning that an existing folder is for.

    Raises:
        UserError: it is for none.
    """
    path = folder / "tuning.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a folder of a tuning (it has no tuning.yaml); name one that was printed")
    return validate(TuningConfig, read_yaml(path), str(path))


def traces_of(folder: Path) -> str | None:
    """The folder of traces that the tuning was started with."""
    found: str | None = json.loads((folder / "traces.json").read_text(encoding="utf-8"))
    return found


def table(rows: list[dict[str, Any]], shown: int = 12) -> Table:
    """The best trials for a terminal."""
    made = Table(box=None, pad_edge=False)
    columns = list(rows[0])
    for name in columns:
        made.add_column(name, justify="left" if name == "trial" else "right")
    for row in rows[:shown]:
        made.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return made


def beside(rows: list[dict[str, Any]]) -> Table:
    """Few trials of many numbers: a column each."""
    made = Table("", *(str(row["trial"]) for row in rows), box=None, pad_edge=False)
    for column in made.columns[1:]:
        column.justify = "right"
    for name in list(rows[0])[1:]:
        made.add_row(name, *(f"{row[name]:.4g}" for row in rows))
    return made


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """trials.csv, best.yaml and `tensorboard/`. rows: best first, each with the columns FIXED and its point."""
    with (folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    point = {key: value for key, value in rows[0].items() if key not in FIXED}
    (folder / "best.yaml").write_text(yaml.safe_dump({"worth": rows[0][TOLD], "point": point}), encoding="utf-8")
    from torch.utils.tensorboard import SummaryWriter, summary

    protocol: Any = summary
    for row in rows:
        with SummaryWriter(str(folder / "tensorboard" / row["trial"])) as events:
            made: Any = events
            values = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in row.items() if k in point}
            for message in protocol.hparams(values, {f"tune/{TOLD}": row[TOLD]}):
                made.file_writer.add_summary(message)
            made.add_scalar(f"tune/{TOLD}", row[TOLD], row["rounds"])
