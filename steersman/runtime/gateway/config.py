"""The gateway's file: what `steersman serve --config` reads. Parts stand beside the code that they configure."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from steersman.runtime.admin.config import AdminConfig
from steersman.runtime.config import Model
from steersman.runtime.gateway.access import GatewayTenant
from steersman.runtime.gateway.audit import AuditConfig
from steersman.runtime.gateway.ext_proc.config import ExtProcConfig
from steersman.runtime.gateway.http.server import HttpLimits
from steersman.runtime.gateway.limits import FairShares
from steersman.runtime.journal.config import JournalConfig
from steersman.runtime.log import LogConfig
from steersman.runtime.replica._health import HealthConfig
from steersman.runtime.tls import TlsConfig


class GatewayConfig(Model):
    """A gateway file. Every key has a default; options of `steersman serve` go before them."""

    description: str = ""
    fleet: str = Field(default="local", description="a fleet's name or file, with backends")
    policy: str = Field(default="jsed", description="a run folder, a bundle, or a heuristic")
    fallback: str = Field(default="least-requests", description="the heuristic that decides when the policy cannot")
    workload: str = Field(default="default", description="whose tenants these are, where `tenants` names none")
    tenants: dict[str, GatewayTenant] = Field(default={}, description="with their promises and limits")
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    keys: Path | None = Field(default=None, description="API keys (`steersman keys add`); without, anybody may ask")
    tls: TlsConfig | None = None
    ext_proc: ExtProcConfig | None = Field(default=None, description="an endpoint picker for Envoy; default: none")
    http: HttpLimits = HttpLimits()
    health: HealthConfig = HealthConfig()
    fair_shares: FairShares | None = Field(default=None, description="bounds on tenants while the fleet is full")
    audit: AuditConfig | None = Field(default=None, description="where requests with a rule on their data went")
    journal: JournalConfig | None = Field(default=None, description="where decisions and outcomes are recorded")
    log: LogConfig = LogConfig()
    policy_limit_s: float = Field(default=1e-3, gt=0, description="a slower decision is the fallback's")
    admin: AdminConfig | None = Field(default=None, description="without: on its default port, if that is free")
    drain_notice_s: float = Field(
        default=0.0, ge=0, description="once it is to stop: that /health says so first, for load balancers that ask it"
    )
    drain_s: float = Field(default=30.0, ge=0, description="that requests in flight may take once it is to stop")

    @model_validator(mode="after")
    def _names_are_plain(self) -> GatewayConfig:
        for name, tenant in self.tenants.items():
            for part in (name, *tenant.slos):
                if "/" in part or not part:
                    raise ValueError(f"tenants: the name {part!r} may not be empty or hold a slash")
        return self
