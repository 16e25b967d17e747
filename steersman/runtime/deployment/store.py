"""Policies that were pushed: their bundles and an index in a folder, or all of it in memory.

The folder holds `NAME-SHA8.zip` for each bundle, and `policies.json`, which names them and says which one decides.
Every file is written beside its place and renamed. One gateway owns a folder.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from steersman.runtime import archive
from steersman.runtime.bundle import open_zip
from steersman.runtime.config import Model, validate
from steersman.runtime.deployment.deployment import PREDECESSORS
from steersman.runtime.deployment.release import BrokenPolicy, Release
from steersman.runtime.errors import UserError
from steersman.runtime.manifest import SchemaError
from steersman.runtime.plugins import nearest
from steersman.runtime.policy import BoundPolicy, Policy
from steersman.runtime.ticket import Fallback

FORMAT = 1
INDEX = "policies.json"
KEPT = 20  # policies; of more, the oldest that nobody refers to go


class Entry(Model):
    """A policy of the store."""

    name: str
    summary: str = ""
    pushed: str = Field(description="UTC, ISO 8601")
    heuristic: str = Field(default="", description="what it is named by; empty: a bundle")


class Trials(Model):
    """Policies that are tried beside the current one, by version."""

    shadow: str = ""
    canary: str = ""
    share: float = Field(default=0.0, description="of the requests, that the canary decides")


class Index(Model):
    """`policies.json`."""

    format: int = FORMAT
    configured: str = Field(default="", description="version that the gateway was last started with")
    current: str = ""
    predecessors: tuple[str, ...] = Field(default=(), description="oldest first")
    trials: Trials = Trials()
    orderly: bool = Field(default=False, description="the gateway ended as it was told to, and wrote this last")
    policies: dict[str, Entry] = Field(default={}, description="by version, oldest first")


class Prepared(NamedTuple):
    """A policy that was loaded and verified, and is not in the store yet."""

    release: Release
    entry: Entry
    data: bytes = b""  # of a bundle's zip


class PolicyStore:
    """Policies by version; safe to use from several threads.

    `load` gives a new policy each time, so that two places of a deployment never share one's memory.

    folder: None keeps all in memory. heuristic: gives the policy of a name such as `jsed?decode_weight=0`.

    Raises:
        UserError: the folder cannot be written, or its index cannot be read.
    """

    def __init__(self, folder: Path | None, heuristic: Callable[[str], Policy]) -> None:
        self._folder = folder
        self._heuristic = heuristic
        self._data: dict[str, bytes] = {}  # bundles, where there is no folder
        self._lock = threading.Lock()
        self.index = Index()
        self.interrupted = ""  # why the trials of the index must not go on, once the gateway has begun
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = (folder / INDEX).read_text(encoding="utf-8") if (folder / INDEX).exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder}: the folder of pushed policies cannot be used: {_said(error)}") from None
        if text:
            self.index = _parse(text, folder / INDEX)

    # One policy

    def prepare_zip(self, data: bytes, where: str) -> Prepared:
        """A bundle from the bytes of a zip, verified.

        Raises:
            UserError: it is damaged, altered, or of another version; the sentence begins with `where`.
        """
        bundle = open_zip(data, where)
        made = bundle.manifest
        release = Release(bundle.fastest(), made.version, made.summary)
        return Prepared(release, Entry(name=made.name, summary=made.summary, pushed=_now()), data)

    def prepare_path(self, path: Path) -> Prepared:
        """The bundle at `path`, as in `bundle.open_bundle`. Errors likewise."""
        found = archive.locate(path)
        return self.prepare_zip(archive.pack(archive.read(found)), str(found))

    def prepare_heuristic(self, spec: str) -> Prepared:
        """A heuristic by name.

        Raises:
            UserError: there is none of that name.
        """
        policy = self._heuristic(spec)
        summary = policy.policy.summary if isinstance(policy, BoundPolicy) else ""
        entry = Entry(name=policy.name, summary=summary, pushed=_now(), heuristic=spec)
        return Prepared(Release(policy, spec, summary), entry)

    def keep(self, prepared: Prepared, in_use: Collection[str] = ()) -> None:
        """Put a policy into the store. in_use: versions that must not be forgotten.

        Raises:
            UserError: the folder cannot be written.
        """
        version = prepared.release.version
        if not prepared.entry.heuristic:
            if self._folder is None:
                self._data[version] = prepared.data
            else:
                archive.write(self._path(version), archive.unpack(prepared.data, version))
        with self._lock:
            policies = {key: entry for key, entry in self.index.policies.items() if key != version}
            self._write(policies={**policies, version: prepared.entry})
            self._forget_old({*in_use, version})

    def load(self, version: str) -> Release:
        """A policy of the store, loaded anew.

        Raises:
            UserError: there is none of that version, or its file is damaged or gone.
        """
        entry = self.index.policies.get(version)
        if entry is None:
            raise UserError(f"there is no policy {version!r}; {nearest(version, list(self.index.policies))}")
        if entry.heuristic:
            return self.prepare_heuristic(entry.heuristic).release
        if self._folder is None:
            return self.prepare_zip(self._data[version], version).release
        path = self._path(version)
        release = self.prepare_zip(archive.pack(archive.read(path)), str(path)).release
        if release.version != version:
            raise UserError(f"{path}: holds {release.version}; push the policy again")
        return release

    # Which one decides

    def remember(
        self, current: str, predecessors: list[str], trials: Trials | None = None, *, orderly: bool = False
    ) -> None:
        """Write down which policy decides and which are tried, for the next start. orderly: the gateway ends.

        Raises:
            UserError: the folder cannot be written.
        """
        with self._lock:
            self._write(current=current, predecessors=tuple(predecessors), trials=trials or Trials(), orderly=orderly)

    def configured(self, version: str) -> None:
        """The policy that the gateway is started with is this one now. Errors as `remember`."""
        with self._lock:
            self._write(configured=version)

    def begin(self, configured: Prepared) -> tuple[Release, list[Release]]:
        """The policy that decides first, and its predecessors.

        What decided before the restart goes on, unless the gateway is started with another policy than then. One that
        cannot be loaded any more is replaced by one that always fails: the fallback decides, and counts say why.

        Raises:
            UserError: the folder cannot be written.
        """
        before, version = self.index, configured.release.version
        if before.configured != version:
            self.interrupted = "the gateway was started with another policy than before"
        elif not before.orderly:
            self.interrupted = "the gateway did not end in order, and this policy may be why"
        self.keep(configured)
        earlier = list(before.predecessors)
        if before.current in ("", version):
            first = configured.release
        elif before.configured == version:
            first = self._restored(before.current)
        else:
            first, earlier = configured.release, [*earlier, before.current]
        restored = [self._restored(version) for version in earlier[-PREDECESSORS:]]
        predecessors = [release for release in restored if not isinstance(release.policy, BrokenPolicy)]
        with self._lock:
            self._write(
                configured=version,
                orderly=before.orderly and not self.interrupted,
                current=first.version,
                predecessors=tuple(release.version for release in predecessors),
            )
        return first, predecessors

    def _restored(self, version: str) -> Release:
        try:
            return self.load(version)
        except UserError as error:
            reason = Fallback.SCHEMA if isinstance(error, SchemaError) else Fallback.ERROR
            return Release(BrokenPolicy(version, reason, str(error)), version)

    # Files

    def _path(self, version: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{version}.zip"

    def _forget_old(self, in_use: set[str]) -> None:
        index = self.index
        used = in_use | {index.configured, index.current, *index.predecessors, *list(index.policies)[-KEPT:]}
        used |= {index.trials.shadow, index.trials.canary}
        old = [version for version in index.policies if version not in used]
        if not old:
            return
        self._write(policies={key: entry for key, entry in index.policies.items() if key in used})
        for version in old:
            self._data.pop(version, None)
            if self._folder is not None:
                self._path(version).unlink(missing_ok=True)

    def _write(self, **changes: Any) -> None:
        index = self.index.model_copy(update=changes)
        if self._folder is not None:
            path = self._folder / INDEX
            temporary = path.with_name(f".{INDEX}.{os.getpid()}.tmp")
            try:
                with temporary.open("w", encoding="utf-8") as file:
                    file.write(index.model_dump_json(indent=1) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be written: {_said(error)}") from None
            finally:
                temporary.unlink(missing_ok=True)
        self.index = index


def _parse(text: str, path: Path) -> Index:
    remedy = "put it back, or move it away to start with no pushed policies"
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: not an index of policies of format {FORMAT}; {remedy}")
    return validate(Index, data, str(path))


def _said(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
