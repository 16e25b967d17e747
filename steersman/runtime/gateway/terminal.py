"""What the gateway says to its operator in the terminal."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from steersman.runtime.gateway.app import Gateway
from steersman.runtime.gateway.config import GatewayConfig
from steersman.runtime.gateway.control import is_loopback
from steersman.runtime.log import LogConfig, line, tell
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
_BAD = (Status.DOWN, Status.OPEN)
# Of what policies go through.
_WARNINGS = ("canary_rolled_back", "shadow_switched_off", "refused", "not_remembered", "not_restored")


async def start(pool: Pool, shown: bool) -> None:
    """Start the replicas, and tell how far each is; shown: where people look."""
    console = Console(stderr=True)
    shown &= console.is_terminal
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[replica]}"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        disable=not shown,
    ) as progress:
        rows = [progress.add_task("…", total=None, replica=name) for name in pool.names]

        def told(replica: int, text: str) -> None:
            done: dict[str, Any] = {"total": 1, "completed": 1} if text == "up" else {}
            progress.update(rows[replica], description=text, **done)
            if not shown:
                tell("replica_starting", f"{pool.names[replica]}: {text}", replica=pool.names[replica], state=text)

        await pool.start(told)


def on_change(gateway: Gateway, pool: Pool) -> Callable[[int, Status], None]:
    """What happens when a replica's status changes: the gateway's part, and a line for the operator."""

    def changed(replica: int, status: Status) -> None:
        gateway.replica_changed(replica, status)
        name, level = pool.names[replica], logging.WARNING if status in _BAD else logging.INFO
        tell("replica_status", f"replica {name} is {_SAID[status]}", level, replica=name, status=status.value)

    return changed


def policies_changed(change: str, sentence: str) -> None:
    """Tell what happened to the policies."""
    tell(f"policy_{change}", sentence, logging.WARNING if change in _WARNINGS else logging.INFO)


def open_to(config: GatewayConfig) -> Iterator[str]:
    """What an operator should know of who may ask, and of who may listen."""
    if config.keys is None and not is_loopback(config.host):
        yield f"no keys: whoever reaches {config.host} may ask, for any tenant; `steersman keys add` makes keys"
    admin = config.admin
    if admin is not None and admin.tls is None and not is_loopback(admin.host):
        yield f"the admin key goes to {admin.host} in the clear; admin.tls encrypts it"


def url_of(listener: socket.socket, secure: bool) -> str:
    """Where a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def announce(log: LogConfig, listener: socket.socket, scheduler: Scheduler, secure: bool) -> None:
    """It serves: one line for programs on standard output, and something to try for people."""
    url, model = url_of(listener, secure), scheduler.fleet.models[0]
    assert scheduler.policy is not None
    policy = scheduler.policy.name
    sentence = f"steersman serves {model} on {url}/v1, policy {policy}; Ctrl-C stops"
    print(line(log, "serving", sentence, url=url, model=model, policy=policy), flush=True)
    if log.format == "text":
        body = '{"model": "%s", "messages": [{"role": "user", "content": "Hello"}]}' % model  # noqa: UP031
        tell("try", f"try:\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
