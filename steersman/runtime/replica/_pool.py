"""The live replicas of a fleet: opened by their backends, started together, watched, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable

import aiohttp

from steersman.runtime import plugins
from steersman.runtime.config import Model, validate
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, ReplicaGroup
from steersman.runtime.log import named
from steersman.runtime.replica import KIND, Replica
from steersman.runtime.replica._health import Health, HealthConfig, Status
from steersman.runtime.replica._pulse import Pulse
from steersman.runtime.scheduler import Scheduler

_log = logging.getLogger("steersman.pool")

SLOW_S = 0.9  # that a look without an answer took, rather than one that was refused


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
    """All replicas of a fleet, in its order, the HTTP session to ask after them, and how well each is.

    Raises:
        UserError: a replica has no backend, or its options are wrong.
    """

    def __init__(self, fleet: Fleet, config: HealthConfig | None = None) -> None:
        self.config = config or HealthConfig()
        self.names = fleet.names
        self.replicas = [open_replica(n, g) for n, g in zip(fleet.names, fleet.groups, strict=True)]
        self.health = [Health(self.config, g.max_num_seqs) for g in fleet.groups]
        self._speaks = [True] * len(self.replicas)  # it has metrics that are known
        self.prefix_hit_rate = [math.nan] * len(self.replicas)  # as the engines report it
        self.on_change: Callable[[int, Status], None] = lambda _r, _status: None
        self._status = [Status.UP] * len(self.replicas)
        self._lost_cache = [False] * len(self.replicas)  # not well since it last took requests
        self._session: aiohttp.ClientSession | None = None
        self._watches: list[asyncio.Task[None]] = []
        self._pulse: Pulse | None = None
        self._slow = [False] * len(self.replicas)  # the last look found no answer in time
        self._recheck = [asyncio.Event() for _ in self.replicas]
        self._scheduler: Scheduler | None = None

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

    def attach(self, scheduler: Scheduler) -> None:
        """From now on `scheduler` is told how each replica is."""
        self._scheduler = scheduler
        for index in range(len(self.replicas)):
            self._apply(index)

    def watch(self, scheduler: Scheduler) -> None:
        """Keep `scheduler` told of each replica's metrics and health until `unwatch`."""
        self.attach(scheduler)
        self._pulse = Pulse()
        self._watches = [asyncio.create_task(self._watch(i, scheduler)) for i in range(len(self.replicas))]

    async def _watch(self, index: int, scheduler: Scheduler) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s(index)):
                    await self._recheck[index].wait()
            self._recheck[index].clear()
            try:
                await self._update(index, scheduler)
            except Exception:  # without its watch, a replica that is down would stay so
                self._broken("replica %s could not be watched", index)

    async def _update(self, index: int, scheduler: Scheduler) -> None:
        """Look at a replica, and tell the scheduler how it is."""
        health, loop = self.health[index], asyncio.get_running_loop()
        assert self._pulse is not None
        began_s = loop.time()
        well = await self._look(index, scheduler)
        if not well and loop.time() - began_s >= SLOW_S and not self._slow[index]:
            self._slow[index] = True  # it may only be busy; one that is gone says so at once
            self._recheck[index].set()
            return
        self._slow[index] = False
        while not well and self._pulse.stopped_since(began_s):  # it may have answered: look again
            began_s = loop.time()
            well = await self._look(index, scheduler)
        health.looked(scheduler.now, well)
        self._lost_cache[index] |= not well
        self._apply(index)

    def _pause_s(self, index: int) -> float:
        """Until a replica is looked at again. One that only says whether it is well is not asked as often."""
        speaks = self.health[index].healthy and self._speaks[index]
        return self.config.scrape_s if speaks else self.config.recheck_s

    async def _look(self, index: int, scheduler: Scheduler) -> bool:
        """Read a replica's metrics, and say whether it is well."""
        try:
            return await self._read(index, scheduler)
        except Exception:  # of a backend's own code: whatever it is, the watch goes on
            self._broken("replica %s could not be asked how it is", index)
            return False

    def _broken(self, sentence: str, index: int) -> None:
        """Log the exception that is being handled."""
        name = self.names[index]
        _log.exception(sentence, name, extra=named("watch_failed", {"replica": name}))

    async def _read(self, index: int, scheduler: Scheduler) -> bool:
        replica, health = self.replicas[index], self.health[index]
        figures = None
        if health.healthy:
            figures = await replica.scrape(self.session)
            self._speaks[index] = figures is not None
        if figures is not None:
            scheduler.scraped(index, figures.running, figures.waiting, figures.kv_use)
            self.prefix_hit_rate[index] = figures.prefix_hit_rate
        # An engine without known metrics, or whose breaker is open, is asked for its health instead.
        suspect = figures is None or health.status(scheduler.now) is Status.OPEN
        return not suspect or await replica.healthy(self.session)

    def _apply(self, index: int) -> None:
        """Tell the scheduler how a replica is now."""
        if self._scheduler is None:
            return
        now, health = self._scheduler.now, self.health[index]
        status, before = health.status(now), self._status[index]
        up = status in (Status.UP, Status.RAMPING)
        # One that was only drained, or had its breaker open, still has its cache; not if it was started anew meanwhile.
        self._scheduler.set_up(index, up, kept_cache=not self._lost_cache[index])
        self._lost_cache[index] &= not up
        self._scheduler.set_cap(index, health.cap(now))
        self._status[index] = status
        if status is not before:
            self.on_change(index, status)

    def status(self, index: int) -> Status:
        """How a replica is, as the scheduler was told last."""
        return self._status[index]

    def failed(self, index: int, sent_s: float) -> None:
        """An attempt on a replica failed, sent at `sent_s`. After a few in a row it gets no requests for a while."""
        if self._scheduler is not None:
            self.health[index].failed(self._scheduler.now, sent_s)
            self._apply(index)
            self._recheck[index].set()

    def cool(self, index: int, seconds: float) -> None:
        """A replica asked to be left alone for a while."""
        if self._scheduler is not None:
            self.health[index].cool(self._scheduler.now, seconds)
            self._apply(index)

    def answered(self, index: int, sent_s: float) -> None:
        """A replica answered, in full, a request sent at `sent_s`."""
        if self._scheduler is not None:
            self.health[index].answered(self._scheduler.now, sent_s)

    def drain(self, index: int, draining: bool) -> None:
        """Send no new requests to a replica, or send them again."""
        self.health[index].draining = draining
        self._apply(index)

    async def unwatch(self) -> None:
        """The end of `watch`."""
        watches, self._watches = self._watches, []
        for task in watches:
            task.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        if self._pulse is not None:
            self._pulse.close()
            self._pulse = None

    async def stop(self) -> None:
        """Stop all that is ours. Safe at any time, and more than once."""
        await self.unwatch()
        await asyncio.gather(*(replica.stop() for replica in self.replicas), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None
