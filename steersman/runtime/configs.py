"""Finding shipped configuration files by name: `default` is `configs/workloads/default.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from steersman.runtime.config import read_yaml
from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest

# The project's own folder in a checkout or an editable install, then the one that the user stands in.
ROOTS = (Path(__file__).resolve().parents[2] / "configs", Path("configs"))


def find_config(folder: str, name: str | Path) -> Path:
    """The path that `name` means: a file, the folder of a journal, or the name of a file in `configs/<folder>`.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    journal = path.is_dir() and any(path.glob("journal-*"))
    if path.suffix in (".yaml", ".yml") or path.is_file() or journal:
        if not path.is_file() and not journal:
            raise UserError(f"{path}: no such file")
        return path
    for root in ROOTS:
        candidate = root / folder / f"{name}.yaml"
        if candidate.is_file():
            return candidate
    known = sorted({path.stem for path in config_files(folder)})
    raise UserError(f"there is no file {name} and no shipped one of that name in {folder}; {nearest(str(name), known)}")


def config_files(folder: str) -> Iterator[Path]:
    """The shipped files of `configs/<folder>`."""
    seen: set[Path] = set()
    for root in ROOTS:
        for path in sorted((root / folder).glob("*.yaml")):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def describe(path: Path) -> str:
    """The one-sentence description in a configuration file."""
    return str(read_yaml(path).get("description", ""))
