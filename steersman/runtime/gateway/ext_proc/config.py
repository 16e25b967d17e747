"""What `ext_proc` in a gateway's file says."""

from __future__ import annotations

from pydantic import Field

from steersman.runtime.config import Model
from steersman.runtime.tls import TlsConfig


class ExtProcConfig(Model):
    """An endpoint picker for Envoy, beside the gateway's own port."""

    host: str = "127.0.0.1"
    port: int = Field(default=9002, ge=0, le=65535)
    tls: TlsConfig | None = Field(default=None, description="of this port; read again when its files change")
    fallbacks: int = Field(
        default=0, ge=0, le=8, description="further endpoints that Envoy may retry on, where its cluster can (docs)"
    )
    watch: float = Field(
        default=1.0, ge=0, le=1, description="share of streams whose events are looked at; needs allow_mode_override"
    )
    resolve_s: float = Field(default=10.0, gt=0, description="between look-ups of replicas that are known by name")
