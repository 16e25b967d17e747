"""The live replicas of a fleet: opened by their backends, started together, watched, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import aiohttp

from steersman.runtime import plugins
from steersman.runtime.config import Model, validate
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, ReplicaGroup
from steersman.runtime.replica import KIND, Replica
from steersman.runtime.scheduler import Scheduler

SCRAPE_S = 0.5
RECHECK_S = 1.0
FAILURES_TO_DOWN = 3


def open_replica(name: str, group: ReplicaGroup) -> Replica:
    """The live replica that a group's `backend` describes, not started.

    Raises:
        UserError: there is no backend, or its options are wrong.
    """
    if group.backend is None:
        raise UserError(f"replica {name!r}: the fleet file gives no backend for it; add backend.kind and its options")
    model: type[Model] = plugins.find(KIND, group.backend.kind)
    where = f"replica {name!r}: backend.options"
    return validate(model, group.backend.options, where).open(name, group)  # type: ignore[attr-defined]


class Pool:
    """All replicas of a fleet, in its order, and the HTTP session to them.

    Raises:
        UserError: a replica has no backend, or its options are wrong.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.names = fleet.names
        self.replicas = [open_replica(n, g) for n, g in zip(fleet.names, fleet.groups, strict=True)]
        self.failures = [0] * len(self.replicas)  # connections that failed in a row
        self._session: aiohttp.ClientSession | None = None
        self._watches: list[asyncio.Task[None]] = []
        self._recheck = [asyncio.Event() for _ in self.replicas]

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "start() the pool first"
        return self._session

    async def start(self, progress: Callable[[int, str], None] = lambda _r, _text: None) -> None:
        """Start every replica at the same time; `progress(replica, text)` tells how far each is.

        Raises:
            UserError: one cannot be started; the others are stopped.
        """
        self._session = aiohttp.ClientSession(
            # Servers of the field close idle connections after 5 s: give them up before.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

        def told(index: int) -> Callable[[str], None]:
            return lambda text: progress(index, text)

        tasks = [asyncio.create_task(replica.start(self._session, told(i))) for i, replica in enumerate(self.replicas)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.stop()
            raise

    def watch(self, scheduler: Scheduler, changed: Callable[[int, bool], None] = lambda _r, _up: None) -> None:
        """Keep `scheduler` told of each replica's metrics and health until `unwatch`."""
        self._watches = [asyncio.create_task(self._watch(i, scheduler, changed)) for i in range(len(self.replicas))]

    async def _watch(self, index: int, scheduler: Scheduler, changed: Callable[[int, bool], None]) -> None:
        replica, up = self.replicas[index], True
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SCRAPE_S if up else RECHECK_S):
                    await self._recheck[index].wait()
            self._recheck[index].clear()
            figures = await replica.scrape(self.session) if up else None
            if figures is not None:
                scheduler.scraped(index, *figures)
            # An engine without known metrics is asked for its health instead.
            suspect = figures is None or self.failures[index] >= FAILURES_TO_DOWN
            before, up = up, not suspect or await replica.healthy(self.session)
            if up and suspect:
                self.failures[index] = 0
            scheduler.set_up(index, up)
            if up != before:
                changed(index, up)

    def failed(self, index: int, scheduler: Scheduler) -> None:
        """A connection failed. After a few in a row the replica gets no requests until it is healthy."""
        self.failures[index] += 1
        if self.failures[index] == FAILURES_TO_DOWN:
            scheduler.set_up(index, False)
            self._recheck[index].set()

    def answered(self, index: int) -> None:
        """A replica answered a request."""
        self.failures[index] = 0

    async def unwatch(self) -> None:
        """The end of `watch`."""
        watches, self._watches = self._watches, []
        for task in watches:
            task.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    async def stop(self) -> None:
        """Stop all that is ours. Safe at any time, and more than once."""
        await self.unwatch()
        await asyncio.gather(*(replica.stop() for replica in self.replicas), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None
