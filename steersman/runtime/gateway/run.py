"""Running the gateway in the foreground: start the replicas, serve, drain, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from steersman.runtime.admin.config import AdminConfig
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway.access import Access, GatewayTenant
from steersman.runtime.gateway.access_log import AccessLog
from steersman.runtime.gateway.app import Gateway, Phase
from steersman.runtime.gateway.audit import Audit
from steersman.runtime.gateway.chores import Board, Recorders, chores
from steersman.runtime.gateway.config import GatewayConfig
from steersman.runtime.gateway.control import Control, Policies, check_reach
from steersman.runtime.gateway.descriptors import room
from steersman.runtime.gateway.http.server import HttpLimits, Server
from steersman.runtime.gateway.keys import Keys
from steersman.runtime.gateway.listening import listen
from steersman.runtime.gateway.metrics import http_metrics
from steersman.runtime.gateway.prompt import BLOCK_TOKENS
from steersman.runtime.gateway.terminal import announce, on_change, open_to, policies_changed, start, url_of
from steersman.runtime.gateway.window import Window
from steersman.runtime.journal import Journal
from steersman.runtime.log import logging_to, tell
from steersman.runtime.policy import Policy
from steersman.runtime.replica._pool import Pool
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.tls import Tls

if TYPE_CHECKING:
    from steersman.runtime.gateway.ext_proc.server import PickerServer


class Secured(NamedTuple):
    """TLS of the gateway's two ports, where they have it."""

    front: Tls | None
    admin: Tls | None


def serve(
    config: GatewayConfig,
    fleet: Fleet,
    tenants: Mapping[str, GatewayTenant],
    policies: Policies,
    fallback: Policy,
    *,
    board: Board | None = None,
) -> int:
    """Serve `fleet` until SIGINT or SIGTERM. Returns the exit code, 0.

    The first signal stops new requests and waits up to `drain_s` seconds for those in flight; a second one
    stops at once. Port 0 takes a free one. board: gets a summary of every window of service, and more curves.

    Raises:
        UserError: the port is in use, a file cannot be read, or a replica cannot be started or reached; nothing is
            left running.
    """
    with logging_to(sys.stderr, config.log):
        listener = listen(config.host, config.port, "--port")
        admin_listener = None
        try:
            admin_listener = _listen_for_admin(config.admin)
            keys = None if config.keys is None else Keys(config.keys, tenants)
            tls = None if config.tls is None else Tls(config.tls)
            admin = config.admin or AdminConfig()
            secured = Secured(tls, None if admin.tls is None else Tls(admin.tls, "admin.tls"))
            access = _access(fleet, tenants, keys)
            audit = None if config.audit is None else Audit(config.audit, fleet)
            pool = Pool(fleet, config.health)
            first, predecessors = policies.store.begin(policies.first)
            scheduler = Scheduler(
                fleet,
                access.rows,
                first,
                fallback,
                prefix_block_tokens=BLOCK_TOKENS,
                policy_limit_s=config.policy_limit_s,
            )
            assert scheduler.deployment is not None
            scheduler.deployment.predecessors = predecessors
            journal = None if config.journal is None else Journal(config.journal, fleet, access.rows)
            recorders = Recorders(audit, journal, board)
            loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
            if sys.platform != "win32":
                import uvloop

                loop_factory = uvloop.new_event_loop
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(
                    _serve(config, pool, scheduler, policies, access, recorders, secured, listener, admin_listener)
                )
        finally:
            listener.close()
            if admin_listener is not None:
                admin_listener.close()
    return 0


def _access(fleet: Fleet, tenants: Mapping[str, GatewayTenant], keys: Keys | None) -> Access:
    try:
        return Access(fleet, tenants, keys)
    except ValueError as error:
        raise UserError(f"tenants: {error}") from None


def _listen_for_admin(config: AdminConfig | None) -> socket.socket | None:
    """A bound socket for the admin API; nobody who did not ask for one is kept from serving by a port in use."""
    if config is not None:
        check_reach(config)
        return listen(config.host, config.port, "admin.port")
    try:
        return listen(AdminConfig().host, AdminConfig().port, "--set admin.port=PORT")
    except UserError as error:
        tell("no_admin", f"no admin API: {error}", logging.WARNING)
        return None


async def _serve(
    config: GatewayConfig,
    pool: Pool,
    scheduler: Scheduler,
    policies: Policies,
    access: Access,
    recorders: Recorders,
    secured: Secured,
    listener: socket.socket,
    admin_listener: socket.socket | None,
) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    stop, signals = asyncio.Event(), 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals == 1 and started:
            stop.set()
        else:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    started = False
    server: Server | None = None
    picker: PickerServer | None = None
    every_second: asyncio.Task[None] | None = None
    gateway: Gateway | None = None
    control: Control | None = None
    try:
        picker = _picker(config)
        await start(pool, config.log.format == "text")
        gateway = Gateway(
            scheduler,
            pool,
            access,
            fair=config.fair_shares,
            audit=recorders.audit,
            journal=recorders.journal,
            window=None if recorders.board is None else Window(scheduler, access.rows),
            open_metrics=access.keys is None,
        )
        pool.on_change = on_change(gateway, pool)
        control = Control(config.admin or AdminConfig(), policies, gateway, policies_changed, secured.admin)
        await control.start(admin_listener)
        server = Server(gateway.handle, _bounded(config.http))
        if config.log.access:
            gateway.access_log = AccessLog(gateway.metrics.tenants, pool.names, scheduler)
            server.on_over = gateway.access_log.over
        clients = server
        gateway.metrics.add(lambda: http_metrics(len(clients.connections), clients.rejected))
        await server.start(sock=listener, ssl=secured.front.context if secured.front else None)
        pool.watch(scheduler)
        if picker is not None:
            await picker.start(gateway)
        every_second = asyncio.create_task(
            chores(gateway, access, [tls for tls in secured if tls is not None], recorders)
        )
        _settle_memory()
        started = True
        announce(config.log, listener, scheduler, secured.front is not None)
        for warning in open_to(config):
            tell("open_to_others", warning, logging.WARNING)
        if admin_listener is not None:
            url = url_of(admin_listener, secured.admin is not None)
            tell("admin", f"admin API on {url}: steersman top, steersman policy", url=url)
        if config.ext_proc is not None and picker is not None:
            address = f"{config.ext_proc.host}:{picker.port}"
            tell("picker", f"endpoint picker for Envoy on {address} (gRPC)", address=address)
        await stop.wait()
        gateway.phase = Phase.LEAVING
        if config.drain_notice_s:
            tell("leaving", f"/health says so for {config.drain_notice_s:g} s; then no new requests")
            await asyncio.sleep(config.drain_notice_s)
        gateway.phase = Phase.DRAINING
        server.stop_listening()
        if gateway.inflight:
            most = f"at most {config.drain_s:g} s; Ctrl-C again stops at once"
            tell("draining", f"draining {gateway.inflight} requests, {most}", requests=gateway.inflight)
        try:
            async with asyncio.timeout(config.drain_s):
                await gateway.drained()
                await server.written()
        except TimeoutError:
            late = f"{gateway.inflight} requests did not end" if gateway.inflight else "some clients did not read"
            tell("not_drained", f"{late} in time", logging.WARNING, requests=gateway.inflight)
    except asyncio.CancelledError:
        if not signals:
            raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            # What follows is bounded and must not be cut short by an impatient third Ctrl-C.
            signal.signal(number, signal.SIG_IGN)
        async with contextlib.AsyncExitStack() as last:  # in reverse; one that fails keeps none of the others
            last.push_async_callback(pool.stop)
            if recorders.journal is not None:
                last.push_async_callback(asyncio.to_thread, recorders.journal.close)
            if recorders.audit is not None:
                last.callback(_last_lines, recorders.audit)
            if gateway is not None:
                last.callback(gateway.relay.close)
            if picker is not None:
                last.push_async_callback(picker.stop)
            if server is not None:
                last.push_async_callback(server.stop)
            if control is not None:
                last.push_async_callback(control.stop)
            if gateway is not None:
                gateway.phase = Phase.STOPPING
            if every_second is not None:
                every_second.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signals:
            tell("stopped", "stopped")


def _picker(config: GatewayConfig) -> PickerServer | None:
    """The port for Envoy, taken but not answering. What it needs is loaded only where it is asked for."""
    if config.ext_proc is None:
        return None
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is said in a sentence of ours
    try:
        from steersman.runtime.gateway.ext_proc.server import PickerServer
    except ImportError as error:
        raise UserError(f"ext_proc needs {error.name or 'grpcio'}: pip install 'steersman[envoy]'") from None
    return PickerServer(config.ext_proc, config.http.body_bytes)


def _bounded(limits: HttpLimits) -> HttpLimits:
    """The limits, with no more connections than there are descriptors for."""
    most = room()
    if most is None or most >= limits.connections:
        return limits
    if "connections" in limits.model_fields_set:
        said = f"http.connections: the limit on open files (ulimit -n) allows {most}"
        tell("fewer_connections", said, logging.WARNING, connections=most)
    return limits.model_copy(update={"connections": most})


def _settle_memory() -> None:
    """What was made until now stays: the garbage collector need not look at it again and again.

    Without, it takes a tenth of the CPU of a request. What requests make is freed by reference counts; cycles are rare.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _last_lines(audit: Audit) -> None:
    audit.flush()
    if audit.waiting:
        said = f"audit: the last {audit.waiting} lines could not be written, and are lost"
        tell("audit_lost", said, logging.ERROR, lines=audit.waiting)
