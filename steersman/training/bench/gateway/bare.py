"""A proxy that understands nothing, as a floor: what a client sends goes to a backend, and what that sends, back.

python -m steersman.training.bench.gateway.bare PORT BACKEND...

Every connection has one of a backend to itself, in turn. On uvloop, as the gateway; nothing is parsed, decided or
counted.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import uvloop


class Side(asyncio.Protocol):
    """One side of a connection; what comes goes to the other one."""

    def __init__(self, backends: Iterator[int] | None = None) -> None:
        """backends: ports, on the side of a client."""
        self._backends = backends
        self._transport: Any = None
        self._other: Side | None = None
        self._early: list[bytes] = []  # that came before there was another side

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self._backends is not None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(next(self._backends)))

    async def _connect(self, port: int) -> None:
        try:
            _, other = await asyncio.get_running_loop().create_connection(Side, "127.0.0.1", port)
        except OSError:
            self._transport.close()
            return
        self._other, other._other = other, self
        other._transport.writelines(self._early)

    def data_received(self, data: bytes) -> None:
        if self._other is None:
            self._early.append(data)
        else:
            self._other._transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._other is not None:
            self._other._transport.close()


async def serve(port: int, backends: list[int]) -> None:
    """Serve until the process is ended."""
    turn = cycle(backends)
    server = await asyncio.get_running_loop().create_server(lambda: Side(turn), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), [int(backend) for backend in sys.argv[2:]]))
