"""Running the gateway in the foreground: start the replicas, serve, drain, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway.app import Gateway
from steersman.runtime.gateway.prompt import BLOCK_TOKENS
from steersman.runtime.policy import Policy
from steersman.runtime.replica._pool import Pool
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.tenant import Tenant

DRAIN_S = 30.0


def serve(
    fleet: Fleet,
    policy: Policy,
    fallback: Policy,
    tenants: Mapping[str, Tenant],
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    drain_s: float = DRAIN_S,
    console: Console | None = None,
) -> int:
    """Serve `fleet` until SIGINT or SIGTERM. Returns the exit code, 0.

    The first signal stops new requests and waits up to `drain_s` seconds for those in flight; a second one
    stops at once. `port` 0 takes a free one.

    Raises:
        UserError: the port is in use, or a replica cannot be started or reached; nothing is left running.
    """
    console = console or Console(stderr=True)
    listener = _listen(host, port)
    try:
        pool = Pool(fleet)
        scheduler = Scheduler(fleet, tenants, policy, fallback, prefix_block_tokens=BLOCK_TOKENS)
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
        if sys.platform != "win32":
            import uvloop

            loop_factory = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_serve(pool, scheduler, listener, drain_s, console))
    finally:
        listener.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
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
            raise UserError(f"port {port} on {host} is in use; choose another one with --port") from None
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


async def _serve(pool: Pool, scheduler: Scheduler, listener: socket.socket, drain_s: float, console: Console) -> None:
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
    runner: web.AppRunner | None = None
    try:
        await _start(pool, console)
        gateway = Gateway(scheduler, pool)
        runner = web.AppRunner(gateway.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.SockSite(runner, listener)
        await site.start()
        pool.watch(scheduler, lambda r, up: _tell_change(console, pool.names[r], up))
        started = True
        _announce(console, listener, scheduler)
        await stop.wait()
        await site.stop()
        if gateway.inflight:
            console.print(
                f"draining {gateway.inflight} requests, at most {drain_s:g} s; Ctrl-C again stops at once",
                highlight=False,
            )
        try:
            async with asyncio.timeout(drain_s):
                await gateway.drained()
        except TimeoutError:
            console.print(f"{gateway.inflight} requests did not end in time", highlight=False)
    except asyncio.CancelledError:
        if not signals:
            raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            # What follows is bounded and must not be cut short by an impatient third Ctrl-C.
            signal.signal(number, signal.SIG_IGN)
        if runner is not None:
            await runner.cleanup()
        await pool.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signals:
            console.print("stopped", highlight=False)


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
                console.print(f"{pool.names[replica]}: {text}", highlight=False)

        await pool.start(told)


def _tell_change(console: Console, name: str, up: bool) -> None:
    console.print(f"replica {name} is {'up again' if up else 'down'}", highlight=False)


def _announce(console: Console, listener: socket.socket, scheduler: Scheduler) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
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
