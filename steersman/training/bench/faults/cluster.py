"""A gateway and its replicas, each a process that may be frozen or killed, and what can be seen of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import yaml

from steersman.training.bench.gateway.child import free_port, server, stop
from steersman.training.bench.gateway.processes import resident_mib
from steersman.training.bench.gateway.targets import fleet_of

REPLICAS = 3
SLOTS = 16  # of a replica: few, so that a slow start shows
RAMP_S = 3.0
READ_TIMEOUT_S = 3.0  # a mock is never silent for longer, unless it is told to
DRAIN_S = 5.0
_POLL_S = 0.05


class Backend:
    """A mock replica."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it, where it was before if it was."""
        command = [sys.executable, "-m", "steersman.training.bench.faults.backend", str(self.port)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._process = process
        assert process.stdout is not None
        self.port = int(await asyncio.to_thread(process.stdout.readline))

    def show(self, fault: str) -> None:
        """From now on, show a fault of `backend.FAULTS`; empty: none."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(fault.encode() + b"\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def running(self) -> float:
        """Requests that it works on now."""
        for line in (await fetch(self.port, "/metrics")).decode().splitlines():
            if line.startswith("vllm:num_requests_running"):
                return float(line.rpartition(" ")[2])
        return 0.0

    def stop(self) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        stop(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class Gateway:
    """`steersman serve`, and what it says of its replicas over time."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, admin_port: int) -> None:
        self.process = process
        self.port = port
        self._admin_port = admin_port
        self.seen: list[tuple[float, dict[str, bool]]] = []  # when, which replicas may take requests
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            with suppress(OSError, ValueError, TimeoutError, EOFError):
                health = orjson.loads(await fetch(self._admin_port, "/health"))
                self.seen.append((time.monotonic(), health["replicas"]))
            await asyncio.sleep(_POLL_S)

    async def until(self, name: str, up: bool, most_s: float) -> float | None:
        """Seconds from now until a replica may take requests, or may not; None: not within `most_s`."""
        began_s, at = time.monotonic(), len(self.seen)
        while time.monotonic() < began_s + most_s:
            for when_s, replicas in self.seen[at:]:
                at += 1
                if replicas[name] is up:
                    return when_s - began_s
            await asyncio.sleep(_POLL_S / 2)
        return None

    async def metric(self, name: str) -> dict[str, float]:
        """A metric's values by their labels as text."""
        found = {}
        for line in (await fetch(self.port, "/metrics")).decode().splitlines():
            key, _, value = line.rpartition(" ")
            if key.partition("{")[0] == f"steersman_{name}":
                found[key.partition("{")[2].rstrip("}")] = float(value)
        return found

    async def total(self, name: str) -> float:
        return sum((await self.metric(name)).values())

    @property
    def memory_mib(self) -> float:
        return resident_mib([self.process.pid])

    @property
    def descriptors(self) -> int:
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/fd"))
        except OSError:  # it has ended
            return 0

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)


class Cluster:
    """Replicas, and a gateway before them."""

    def __init__(self, backends: list[Backend], gateway: Gateway) -> None:
        self.backends = backends
        self.gateway = gateway


@asynccontextmanager
async def cluster(policy: str, folder: Path) -> AsyncIterator[Cluster]:
    """A cluster that answers. `folder` is for its files.

    Raises:
        UserError: the gateway did not start.
    """
    backends = [Backend(f"mock-{i}") for i in range(REPLICAS)]
    gateway: Gateway | None = None
    try:
        for backend in backends:
            await backend.start()
        port, admin_port = free_port(), free_port()
        command = _command(policy, port, admin_port, backends, folder)
        running = server("steersman", command, port, folder / "gateway.log")
        gateway = Gateway(await asyncio.to_thread(running.__enter__), port, admin_port)
        try:
            yield Cluster(backends, gateway)
        finally:
            await gateway.close()
            gateway.process.send_signal(signal.SIGCONT)
            await asyncio.to_thread(running.__exit__, None, None, None)
    finally:
        for backend in backends:
            await asyncio.to_thread(backend.stop)


def _command(policy: str, port: int, admin_port: int, backends: list[Backend], folder: Path) -> list[str]:
    fleet = fleet_of([backend.port for backend in backends])
    for replica in fleet["replicas"]:
        replica["max_num_seqs"] = SLOTS
    config: dict[str, Any] = {
        "fleet": str(folder / "fleet.yaml"),
        "policy": policy,
        "port": port,
        "admin": {"port": admin_port},
        "drain_s": DRAIN_S,
        "health": {"ramp_s": RAMP_S, "read_timeout_s": READ_TIMEOUT_S},
    }
    (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    (folder / "gateway.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "steersman.cli", "serve", "--config", str(folder / "gateway.yaml")]


async def fetch(port: int, path: str) -> bytes:
    """The body of a page.

    Raises:
        OSError, EOFError, TimeoutError: there is none.
    """
    async with asyncio.timeout(2.0):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            if not head:
                raise EOFError
            return body
        finally:
            writer.close()
