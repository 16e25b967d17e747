"""API keys: which tenant a client is. Only their SHA-256 is stored: a key has 256 random bits, so that is enough."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path

import yaml
from pydantic import Field

from steersman.runtime.changes import Changes
from steersman.runtime.config import Model, read_yaml, validate
from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest

PREFIX = "sk-steersman-"


class Key(Model):
    """One API key, hashed."""

    name: str = Field(description="what it is for")
    tenant: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class KeyList(Model):
    """A key file."""

    keys: list[Key] = Field(default=[])


class Keys:
    """The keys in a file, read again when it changes."""

    def __init__(self, path: Path, tenants: Collection[str]) -> None:
        """
        Raises:
            UserError: the file cannot be read, or names a tenant that there is not.
        """
        self.path = path
        self._tenants = tenants
        self._changes = Changes(path)
        # By hash; another object once the file was read anew.
        self.table = self._read()

    def tenant(self, authorization: bytes) -> str | None:
        """The tenant of the header `Authorization: Bearer KEY`, or None where the key is not known."""
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        return self.table.get(hashlib.sha256(key.strip()).hexdigest())

    def refresh(self) -> str | None:
        """Read the file again if it has changed. Returns what is wrong with it; then the old keys stay."""
        if not self._changes.any():
            return None
        try:
            self.table = self._read()
        except UserError as error:
            return str(error)
        return None

    def _read(self) -> dict[str, str]:
        listed = validate(KeyList, read_yaml(self.path), str(self.path))
        for key in listed.keys:
            if key.tenant not in self._tenants:
                raise UserError(
                    f"{self.path}: key {key.name!r} is of tenant {key.tenant!r}, which there is not; "
                    f"{nearest(key.tenant, list(self._tenants))}"
                )
        return {key.sha256: key.tenant for key in listed.keys}


def digest(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def add_key(path: Path, name: str, tenant: str) -> str:
    """Make a key, add its hash to the file at `path`, which need not exist, and return it: it is never shown again.

    Raises:
        UserError: the file cannot be read or written, or has a key of that name.
    """
    listed = validate(KeyList, read_yaml(path), str(path)) if path.exists() else KeyList()
    if any(key.name == name for key in listed.keys):
        raise UserError(f"{path}: there is a key {name!r} already; choose another name, or take that one out first")
    secret = PREFIX + secrets.token_urlsafe(32)
    listed.keys.append(Key(name=name, tenant=tenant, sha256=digest(secret)))
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            yaml.safe_dump(listed.model_dump(), file, sort_keys=False)
        os.replace(part, path)  # whole or not at all: a gateway may read it now
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return secret
