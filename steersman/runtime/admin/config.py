"""The part of the gateway's file that is about its admin side."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.deployment import CanaryBounds
from steersman.runtime.tls import TlsConfig

KEY_ENV = "STEERSMAN_ADMIN_KEY"


class AdminConfig(Model):
    """Where the admin API listens, who may use it, and where pushed policies stay."""

    host: str = Field(default="127.0.0.1", description="beyond loopback only with a key")
    port: int = Field(default=8081, ge=0, le=65535)
    key_sha256: str = Field(
        default="", pattern="^([0-9a-f]{64})?$", description=f"of the admin key; by default of ${KEY_ENV}"
    )
    policies: Path | None = Field(default=None, description="folder for pushed policies; without, a restart forgets")
    tls: TlsConfig | None = Field(default=None, description="of this port; read again when its files change")
    canary: CanaryBounds = CanaryBounds()

    def key_digest(self) -> str:
        """The SHA-256 of the admin key, hexadecimal; empty: there is none."""
        key = os.environ.get(KEY_ENV, "").strip()  # of a secret's file, with the end of its line
        return self.key_sha256 or (hashlib.sha256(key.encode()).hexdigest() if key else "")
