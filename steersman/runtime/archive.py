"""The two files of a bundle, in a folder or a zip: read within limits, written whole or not at all."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from steersman.runtime.errors import UserError

MANIFEST, GRAPH = "policy.json", "policy.onnx"
FILES = (MANIFEST, GRAPH)
LARGEST = 64 << 20  # bytes of one file; the largest scorer has under 20 MB
MOST_ENTRIES = 64  # of a zip


def locate(path: Path) -> Path:
    """The bundle that `path` means: a bundle folder, a zip, or a training run's folder that holds `bundle/`.

    Raises:
        UserError: it is none of these.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a run folder, a bundle folder or a bundle's .zip")
    if any((path / name).exists() for name in FILES):
        return path
    if (path / "bundle").is_dir():
        return path / "bundle"
    if (path / "config.yaml").is_file():
        raise UserError(
            f"{path}: this run has exported no policy yet; finish it with `steersman train --resume {path}`"
        )
    raise UserError(f"{path}: holds no {MANIFEST} and no bundle/; name a run folder or a bundle folder")


def read(path: Path) -> dict[str, bytes]:
    """The bytes of both files of the bundle at `path`, a folder or zip.

    Raises:
        UserError: one is missing, unreadable or too large, or the zip is damaged or unsafe.
    """
    try:
        return _read_zip(path) if path.is_file() else {name: _read_file(path / name) for name in FILES}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_file(path: Path) -> bytes:
    if not path.exists():
        raise UserError(f"{path}: missing; copy the bundle whole or export the policy again")
    if not path.is_file():
        raise UserError(f"{path}: not a file; copy the bundle whole or export the policy again")
    _check_size(path.stat().st_size, str(path))
    return path.read_bytes()


def _check_size(size: int, where: str) -> None:
    if size > LARGEST:
        raise UserError(f"{where}: {size >> 20} MiB, but no bundle's file has over {LARGEST >> 20}; not loaded")


def _read_zip(path: Path) -> dict[str, bytes]:
    _check_size(path.stat().st_size, str(path))
    return unpack(path.read_bytes(), str(path))


def unpack(data: bytes, where: str) -> dict[str, bytes]:
    """The bytes of both files of a bundle in the bytes of a zip. `where` names it.

    Raises:
        UserError: one is missing or too large, or the zip is damaged or unsafe.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _check_entries(entries, where)
            return {name: _read_entry(archive, _find(entries, name, where), where) for name in FILES}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        remedy = "copy it anew or export the policy again"
        raise UserError(f"{where}: not a bundle's zip, or a damaged one ({error}); {remedy}") from None


def pack(files: Mapping[str, bytes]) -> bytes:
    """A bundle as the bytes of a zip; equal bundles give equal bytes."""
    buffer = io.BytesIO()
    _fill_zip(buffer, files)
    return buffer.getvalue()


def _check_entries(entries: list[zipfile.ZipInfo], path: str) -> None:
    if len(entries) > MOST_ENTRIES:
        raise UserError(f"{path}: {len(entries)} entries, but a bundle has {len(FILES)} files; not loaded")
    for entry in entries:
        name = entry.orig_filename
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or ":" in name:
            raise UserError(f"{path}: the entry {name!r} points outside of the archive; not loaded")


def _find(entries: list[zipfile.ZipInfo], name: str, path: str) -> zipfile.ZipInfo:
    """The entry `name`, at the top or in one folder: people zip the folder as well as what is in it."""
    found = [e for e in entries if PurePosixPath(e.filename).name == name and e.filename.count("/") <= 1]
    if not found:
        raise UserError(f"{path}: {name} is missing; copy the bundle whole or export the policy again")
    if len(found) > 1:
        raise UserError(f"{path}: {name} stands {len(found)} times; zip one bundle only")
    return found[0]


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: str) -> bytes:
    where = f"{path}/{entry.filename}"
    _check_size(entry.file_size, where)
    with archive.open(entry) as file:
        data = file.read(LARGEST + 1)  # whatever its header says
    _check_size(len(data), where)
    return data


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a bundle: into a zip if the name ends in `.zip`, else into a folder. An older bundle is replaced.

    Everything is written beside `path` first and then renamed. A zip is replaced in one step; a folder takes
    two renames, so that for a moment there is no bundle, but never half of one.

    Raises:
        UserError: `path` cannot be written, or is something else than a bundle.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            if path.is_dir():
                raise UserError(f"{path}: a folder stands in the place of the zip; choose another name")
            _write_zip(temporary, files)
            temporary.replace(path)
        else:
            _refuse_foreign(path)
            temporary.mkdir()
            for name, data in files.items():
                _write_synced(temporary / name, data)
            _swap(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: the bundle cannot be written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def _refuse_foreign(path: Path) -> None:
    """Never replace what is no bundle."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file stands in the place of the bundle's folder; choose another name")
    foreign = sorted({entry.name for entry in path.iterdir()} - set(FILES)) if path.exists() else []
    if foreign:
        raise UserError(f"{path}: holds {foreign[0]}, which is no part of a bundle; choose another folder")


def _swap(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = new.with_suffix(".old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    _remove(old)


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with path.open("wb") as file:
        _fill_zip(file, files)
        file.flush()
        os.fsync(file.fileno())


def _fill_zip(file: IO[bytes], files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # A fixed time: equal bundles are equal files.
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
