"""Live replicas. A backend is a module here whose `BACKEND` is a model of options that can `open` a replica.

class MyBackend(Model):
    url: str
    def open(self, name: str, group: ReplicaGroup) -> Replica: ...
BACKEND = MyBackend
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import aiohttp

from steersman.runtime.fleet import ReplicaGroup
from steersman.runtime.plugins import Kind

KIND = Kind("backend", "steersman.runtime.replica", "BACKEND", "steersman.backends")

Progress = Callable[[str], None]


class Scraped(NamedTuple):
    """What an engine says about itself."""

    running: float  # sequences in the batch
    waiting: float  # requests queued inside the engine
    kv_use: float  # share of the KV cache in use
    prefix_hit_rate: float = math.nan  # share of prompt tokens found in its prefix cache so far; NaN: it does not say


class Replica(Protocol):
    """One engine behind an OpenAI-compatible HTTP server."""

    @property
    def base_url(self) -> str:
        """Where `/v1/...` stands, without a slash at the end; valid once started."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of every request to it."""
        ...

    @property
    def served_model(self) -> str | None:
        """The model's name on this server, where it is not the client's to give."""
        ...

    async def start(self, session: aiohttp.ClientSession, progress: Progress) -> None:
        """Make it answer. Starting it again restarts it.

        Raises:
            UserError: it cannot be started or reached.
        """
        ...

    async def healthy(self, session: aiohttp.ClientSession) -> bool: ...

    async def scrape(self, session: aiohttp.ClientSession) -> Scraped | None:
        """Its metrics now, or None where it has none that are known."""
        ...

    async def stop(self) -> None:
        """Leave nothing behind. Safe at any time, and more than once."""
        ...


class Backend(Protocol):
    """The options of a kind of replica."""

    def open(self, name: str, group: ReplicaGroup) -> Replica: ...
