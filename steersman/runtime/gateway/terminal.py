"""What the gateway says to its operator in the terminal."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from steersman.runtime.gateway.app import Gateway
from steersman.runtime.gateway.config import GatewayConfig
from steersman.runtime.gateway.control import is_loopback
from steersman.runtime.replica._health import Status
from steersman.runtime.replica._pool import Pool
from steersman.runtime.scheduler import Scheduler

_SAID = {
    Status.UP: "up again, and takes its full share",
    Status.DOWN: "down",
    Status.OPEN: "failing requests, or asked for patience: it gets none for a while",
    Status.RAMPING: "up again, and starts slowly",
    Status.DRAINING: "draining: it gets no new requests",
}


def say(console: Console, sentence: str) -> None:
    """Tell the operator, if that can be done: serving goes on with a full disk, or when who read the pipe has left."""
    with contextlib.suppress(OSError, SystemExit):  # at a broken pipe, rich would end the process
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


async def start(pool: Pool, console: Console) -> None:
    """Start the replicas, and show how far each is."""
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
                say(console, f"{pool.names[replica]}: {text}")

        await pool.start(told)


def on_change(gateway: Gateway, pool: Pool, console: Console) -> Callable[[int, Status], None]:
    """What happens when a replica's status changes: the gateway's part, and a line for the operator."""

    def changed(replica: int, status: Status) -> None:
        gateway.replica_changed(replica, status)
        say(console, f"replica {pool.names[replica]} is {_SAID[status]}")

    return changed


def open_to(config: GatewayConfig) -> str | None:
    """What an operator should know of who may ask; None: nothing."""
    if config.keys is not None or is_loopback(config.host):
        return None
    return f"no keys: whoever reaches {config.host} may ask, for any tenant; `steersman keys add` makes keys"


def url_of(listener: socket.socket, secure: bool) -> str:
    """Where a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def announce(console: Console, listener: socket.socket, scheduler: Scheduler, secure: bool) -> None:
    """It serves: one line for programs on standard output, and something to try."""
    url = url_of(listener, secure)
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
