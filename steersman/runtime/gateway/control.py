"""What an operator holds of a running gateway: its policies, the admin API, and the bundle that it was started with."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from steersman.runtime.admin.api import AdminState, admin_app
from steersman.runtime.admin.config import KEY_ENV, AdminConfig
from steersman.runtime.deployment.deployer import Deployer
from steersman.runtime.deployment.selftest import SelfTest
from steersman.runtime.deployment.store import PolicyStore, Prepared
from steersman.runtime.deployment.watch import BundleWatch
from steersman.runtime.errors import UserError
from steersman.runtime.gateway.app import Gateway
from steersman.runtime.tls import Tls


class Policies(NamedTuple):
    """The policies that a gateway starts with."""

    store: PolicyStore
    first: Prepared
    path: Path | None = None  # of the bundle, to be read again when it changes


class Control:
    """Operates a gateway while it runs. Make it in the event loop."""

    def __init__(
        self,
        config: AdminConfig,
        policies: Policies,
        gateway: Gateway,
        told: Callable[[str, str], object],
        tls: Tls | None = None,
    ) -> None:
        """told: gets each change of the policies, its kind and a sentence. tls: of the admin port."""
        scheduler, deployment = gateway.scheduler, gateway.scheduler.deployment
        assert deployment is not None
        deployment.told = told
        deployment.later = asyncio.get_running_loop().call_soon
        self._deployer = deployer = Deployer(deployment, policies.store, SelfTest(scheduler), config.canary)
        state = AdminState(
            deployer, scheduler, gateway.pool, gateway.metrics.text, gateway.pages.health, config.key_digest()
        )
        self._runner = web.AppRunner(admin_app(state), access_log=None, shutdown_timeout=1.0)
        self._tls = tls
        self._watch = None if policies.path is None else BundleWatch(policies.path, deployer.reload)
        self._watching: asyncio.Task[None] | None = None

    async def start(self, listener: socket.socket | None) -> None:
        """Go on with what was tried, serve the admin API on `listener`, if there is one, and look after the bundle."""
        await self._deployer.restore()
        await self._runner.setup()
        if listener is not None:
            await web.SockSite(
                self._runner, listener, ssl_context=None if self._tls is None else self._tls.context
            ).start()
        if self._watch is not None:
            self._watching = asyncio.create_task(self._watch.run())

    async def stop(self) -> None:
        """The end of `start`."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)  # what follows stops replicas
        await self._runner.cleanup()
        await self._deployer.end()


def check_reach(config: AdminConfig) -> None:
    """Refuse an admin API that others could use without a key.

    Raises:
        UserError: it has no key, and would listen beyond loopback.
    """
    if not is_loopback(config.host) and not config.key_digest():
        raise UserError(
            f"admin.host {config.host!r}: beyond loopback the admin API needs a key; "
            f"set admin.key_sha256, or {KEY_ENV} in the environment"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
