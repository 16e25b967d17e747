"""Running the gateway in the foreground: start the replicas, serve, drain, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from steersman.runtime.admin.config import AdminConfig
from steersman.runtime.deployment.scalars import Scalars
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway.access import Access, GatewayTenant
from steersman.runtime.gateway.app import Gateway
from steersman.runtime.gateway.audit import Audit
from steersman.runtime.gateway.config import GatewayConfig
from steersman.runtime.gateway.control import Control, Policies, check_reach, is_loopback
from steersman.runtime.gateway.descriptors import room
from steersman.runtime.gateway.http.server import HttpLimits, Server
from steersman.runtime.gateway.keys import Keys
from steersman.runtime.gateway.metrics import http_metrics
from steersman.runtime.gateway.prompt import BLOCK_TOKENS
from steersman.runtime.gateway.tls import Tls
from steersman.runtime.gateway.window import Gathered, Window
from steersman.runtime.journal import Journal
from steersman.runtime.outcomes import Summary
from steersman.runtime.policy import Policy
from steersman.runtime.replica._health import Status
from steersman.runtime.replica._pool import Pool
from steersman.runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from steersman.runtime.gateway.ext_proc.server import PickerServer

CHORES_S = 1.0
WINDOW_S = 10.0  # of what the board shows
_log = logging.getLogger("steersman.gateway")

Board = Callable[[Summary, dict[str, float]], object]


class Recorders(NamedTuple):
    """What keeps a record of the service."""

    audit: Audit | None = None
    journal: Journal | None = None
    board: Board | None = None


_SAID = {
    Status.UP: "up again, and takes its full share",
    Status.DOWN: "down",
    Status.OPEN: "failing requests, or asked for patience: it gets none for a while",
    Status.RAMPING: "up again, and starts slowly",
    Status.DRAINING: "draining: it gets no new requests",
}


def serve(
    config: GatewayConfig,
    fleet: Fleet,
    tenants: Mapping[str, GatewayTenant],
    policies: Policies,
    fallback: Policy,
    *,
    board: Board | None = None,
    console: Console | None = None,
) -> int:
    """Serve `fleet` until SIGINT or SIGTERM. Returns the exit code, 0.

    The first signal stops new requests and waits up to `drain_s` seconds for those in flight; a second one
    stops at once. Port 0 takes a free one. board: gets a summary of every window of service, and more curves.

    Raises:
        UserError: the port is in use, a file cannot be read, or a replica cannot be started or reached; nothing is
            left running.
    """
    console = console or Console(stderr=True)
    listener = _listen(config.host, config.port, "--port")
    admin_listener = None
    try:
        admin_listener = _listen_for_admin(config.admin, console)
        keys = None if config.keys is None else Keys(config.keys, tenants)
        tls = None if config.tls is None else Tls(config.tls)
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
                _serve(config, pool, scheduler, policies, access, recorders, tls, listener, admin_listener, console)
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


def _listen_for_admin(config: AdminConfig | None, console: Console) -> socket.socket | None:
    """A bound socket for the admin API; nobody who did not ask for one is kept from serving by a port in use."""
    if config is not None:
        check_reach(config)
        return _listen(config.host, config.port, "admin.port")
    try:
        return _listen(AdminConfig().host, AdminConfig().port, "--set admin.port=PORT")
    except UserError as error:
        _say(console, f"no admin API: {error}")
        return None


def _listen(host: str, port: int, option: str) -> socket.socket:
    """A bound socket: taken before anything is started, so that a port in use costs nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"cannot listen on {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # a second server on the port is refused here, not when requests come
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} on {host} is in use; choose another one with {option}") from None
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


async def _serve(
    config: GatewayConfig,
    pool: Pool,
    scheduler: Scheduler,
    policies: Policies,
    access: Access,
    recorders: Recorders,
    tls: Tls | None,
    listener: socket.socket,
    admin_listener: socket.socket | None,
    console: Console,
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
    chores: asyncio.Task[None] | None = None
    gateway: Gateway | None = None
    control: Control | None = None
    try:
        picker = _picker(config)
        await _start(pool, console)
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
        pool.on_change = _told(gateway, pool, console)
        control = Control(config.admin or AdminConfig(), policies, gateway, lambda said: _say(console, said))
        await control.start(admin_listener)
        server = Server(gateway.handle, _bounded(config.http, console))
        clients = server
        gateway.metrics.add(lambda: http_metrics(len(clients.connections), clients.rejected))
        await server.start(sock=listener, ssl=tls.context if tls else None)
        pool.watch(scheduler)
        if picker is not None:
            await picker.start(gateway)
        chores = asyncio.create_task(_chores(gateway, access, tls, recorders, console))
        _settle_memory()
        started = True
        _announce(console, listener, scheduler, tls is not None)
        if (open_to := _open_to(config)) is not None:
            _say(console, open_to)
        if admin_listener is not None:
            _say(console, f"admin API on {_url(admin_listener, False)}: steersman top, steersman policy")
        if config.ext_proc is not None and picker is not None:
            _say(console, f"endpoint picker for Envoy on {config.ext_proc.host}:{picker.port} (gRPC)")
        await stop.wait()
        gateway.leaving = True
        if config.drain_notice_s:
            _say(console, f"/health says so for {config.drain_notice_s:g} s; then no new requests")
            await asyncio.sleep(config.drain_notice_s)
        gateway.draining = True
        server.stop_listening()
        if gateway.inflight:
            most = f"at most {config.drain_s:g} s; Ctrl-C again stops at once"
            _say(console, f"draining {gateway.inflight} requests, {most}")
        try:
            async with asyncio.timeout(config.drain_s):
                await gateway.drained()
                await server.written()
        except TimeoutError:
            late = f"{gateway.inflight} requests did not end" if gateway.inflight else "some clients did not read"
            _say(console, f"{late} in time")
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
                last.callback(_last_lines, recorders.audit, console)
            if gateway is not None:
                last.callback(gateway.relay.close)
            if picker is not None:
                last.push_async_callback(picker.stop)
            if server is not None:
                last.push_async_callback(server.stop)
            if control is not None:
                last.push_async_callback(control.stop)
            if gateway is not None:
                gateway.stopping = True
            if chores is not None:
                chores.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signals:
            _say(console, "stopped")


def _last_lines(audit: Audit, console: Console) -> None:
    audit.flush()
    if audit.waiting:
        _say(console, f"audit: the last {audit.waiting} lines could not be written, and are lost")


def _say(console: Console, sentence: str) -> None:
    """Tell the operator, if that can be done: serving goes on with a full disk, or when who read the pipe has left."""
    with contextlib.suppress(OSError, SystemExit):  # at a broken pipe, rich would end the process
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


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


def _bounded(limits: HttpLimits, console: Console) -> HttpLimits:
    """The limits, with no more connections than there are descriptors for."""
    most = room()
    if most is None or most >= limits.connections:
        return limits
    if "connections" in limits.model_fields_set:
        _say(console, f"http.connections: the limit on open files (ulimit -n) allows {most}")
    return limits.model_copy(update={"connections": most})


def _settle_memory() -> None:
    """What was made until now stays: the garbage collector need not look at it again and again.

    Without, it takes a tenth of the CPU of a request. What requests make is freed by reference counts; cycles are rare.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _told(gateway: Gateway, pool: Pool, console: Console) -> Callable[[int, Status], None]:
    """What happens when a replica's status changes: the gateway's part, and a line for the operator."""

    def changed(replica: int, status: Status) -> None:
        gateway.replica_changed(replica, status)
        _say(console, f"replica {pool.names[replica]} is {_SAID[status]}")

    return changed


async def _chores(gateway: Gateway, access: Access, tls: Tls | None, recorders: Recorders, console: Console) -> None:
    """Once a second: what is idle too long, and files that have changed; now and then, a window for the board."""
    loop = asyncio.get_running_loop()
    assert gateway.scheduler.deployment is not None
    scalars, watched_s = Scalars(gateway.scheduler.deployment), loop.time()
    while True:
        await asyncio.sleep(CHORES_S)
        try:
            gateway.sweep(loop.time())
            if recorders.audit is not None:
                await asyncio.to_thread(recorders.audit.flush)
            # Thousands of keys take seconds to parse; a certificate is not changed while it may be in use.
            for problem in (await asyncio.to_thread(access.refresh), tls.refresh() if tls else None):
                if problem is not None:
                    _say(console, f"{problem}; what was read before stays in use")
            if loop.time() - watched_s >= WINDOW_S:
                watched_s = loop.time()
                if gateway.window is not None and recorders.board is not None:
                    policy = gateway.scheduler.policy
                    await asyncio.to_thread(
                        _show,
                        gateway.window,
                        gateway.window.take(),
                        policy.name if policy is not None else "",
                        scalars.take(),
                        recorders.board,
                    )
        except Exception:  # a board on a full disk, say: time limits, keys and audit must not end with it
            _log.exception("a chore failed, and is done again")


def _show(window: Window, gathered: Gathered, policy: str, more: dict[str, float], board: Board) -> None:
    summary = window.summary(gathered, policy)
    if summary is not None:
        board(summary, more)


async def _start(pool: Pool, console: Console) -> None:
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[replica]}"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        rows = [progress.add_task("…", total=None, replica=name) for name in pool.names]

        def told(replica: int, text: str) -> None:
            done: dict[str, Any] = {"total": 1, "completed": 1} if text == "up" else {}
            progress.update(rows[replica], description=text, **done)
            if not console.is_terminal:
                _say(console, f"{pool.names[replica]}: {text}")

        await pool.start(told)


def _open_to(config: GatewayConfig) -> str | None:
    """What an operator should know of who may ask; None: nothing."""
    if config.keys is not None or is_loopback(config.host):
        return None
    return f"no keys: whoever reaches {config.host} may ask, for any tenant; `steersman keys add` makes keys"


def _url(listener: socket.socket, secure: bool) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _announce(console: Console, listener: socket.socket, scheduler: Scheduler, secure: bool) -> None:
    url = _url(listener, secure)
    model = scheduler.fleet.models[0]
    body = '{"model": "%s", "messages": [{"role": "user", "content": "Hello"}]}' % model  # noqa: UP031
    assert scheduler.policy is not None
    print(f"steersman serves {model} on {url}/v1, policy {scheduler.policy.name}; Ctrl-C stops", flush=True)
    console.print("try:", highlight=False)
    console.print(
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    with contextlib.suppress(OSError):
        sys.stdout.flush()
