"""The gateway: an OpenAI-compatible server in which a policy decides every request."""

from __future__ import annotations

from steersman.runtime.gateway.access import GatewayTenant
from steersman.runtime.gateway.config import GatewayConfig
from steersman.runtime.gateway.control import Policies
from steersman.runtime.gateway.run import serve

__all__ = ["GatewayConfig", "GatewayTenant", "Policies", "serve"]
