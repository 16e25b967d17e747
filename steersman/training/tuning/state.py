"""Ray Tune's state of an experiment, made safe: it is copied file by file, so that a kill may leave half of one.

Files that can be read are kept beside it after every result, and put back where a resumption finds damaged ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from ray import cloudpickle


def keep(trials: Path) -> None:
    """Copy the state in the folder of an experiment, if all of it can be read."""
    previous = _previous(trials)
    new = previous.with_suffix(".tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for file in list(_files(trials)):
        shutil.copy2(file, new)
    if sound(new):
        shutil.rmtree(previous, ignore_errors=True)
        new.rename(previous)


def recover(trials: Path) -> bool:
    """Whether there is a state to go on from, after what is damaged was put back. Where nothing is left, it is removed.

    What a removed one had done was not kept, for no trial had a result yet.
    """
    if sound(trials):
        return True
    previous = _previous(trials)
    if not sound(previous):
        shutil.rmtree(trials, ignore_errors=True)
        return False
    for file in list(_files(trials)):
        file.unlink()
    for file in list(_files(previous)):
        shutil.copy2(file, trials)
    return True


def sound(folder: Path) -> bool:
    """Whether a state is there, and every file of it can be read."""
    files = list(_files(folder))
    try:
        for file in files:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            else:
                cloudpickle.loads(file.read_bytes())
    except Exception:  # whatever half a pickle does
        return False
    names = [file.name for file in files]
    return "tuner.pkl" in names and any(name.startswith("experiment_state") for name in names)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("[!.]*") if path.suffix in (".json", ".pkl") and path.is_file())


def _previous(trials: Path) -> Path:
    return trials.with_name(f"{trials.name}.previous")
