"""Replicas as Envoy knows them: an address and a port."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

from steersman.runtime.errors import UserError
from steersman.runtime.replica._pool import Pool


class _Place(NamedTuple):
    host: str
    port: int


class Endpoints:
    """`host:port` of each replica, with the host's address: Envoy resolves no names that a header gives."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._places: dict[str, _Place] = {}  # by a replica's URL, which an embedded engine changes when it restarts
        self._addresses: dict[_Place, str] = {}

    async def refresh(self) -> None:
        """Look up all names anew. One that is not known any more keeps its address.

        Raises:
            UserError: a replica's URL has a path, or its name was never known.
        """
        for name, replica in zip(self._pool.names, self._pool.replicas, strict=True):
            place = self._place(name, replica.base_url)
            try:
                self._addresses[place] = await _address(place)
            except OSError as error:
                if place not in self._addresses:
                    raise UserError(
                        f"replica {name!r}: the address of {place.host} is not known ({error.strerror or error}); "
                        "correct backend.options.url in the fleet file"
                    ) from None

    def of(self, replica: int) -> str | None:
        """Where a replica is, or None while its name is not resolved."""
        place = self._place(self._pool.names[replica], self._pool.replicas[replica].base_url)
        found = self._addresses.get(place)
        if found is None and _is_address(place.host):
            found = self._addresses[place] = _joined(place.host, place.port)
        return found

    def at(self, endpoint: str) -> list[int]:
        """The replicas at an endpoint."""
        return [replica for replica in range(len(self._pool.replicas)) if self.of(replica) == endpoint]

    def _place(self, name: str, url: str) -> _Place:
        place = self._places.get(url)
        if place is None:
            parts = urlsplit(url)
            if parts.path.rstrip("/"):
                raise UserError(
                    f"replica {name!r}: with ext_proc its URL must have no path, but {url} has {parts.path}; "
                    "let Envoy's route rewrite it"
                )
            port = parts.port or (443 if parts.scheme == "https" else 80)
            place = self._places[url] = _Place(parts.hostname or "", port)
        return place


async def _address(place: _Place) -> str:
    if _is_address(place.host):
        return _joined(place.host, place.port)
    found = await asyncio.get_running_loop().getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    found.sort(key=lambda info: info[0] != socket.AF_INET)
    return _joined(str(found[0][4][0]), place.port)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
