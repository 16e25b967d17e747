"""Long-lived workers, one a core. Work is handed out as they come free, and again when one is lost.

A worker has no state that matters, so that a lost one costs the time of what it was doing and nothing else: its part is
played by another, and a new worker is asked of the cluster in its place, on whatever node is left.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

from steersman.runtime.errors import UserError
from steersman.training.cluster.worker import Worker, version

AHEAD = 2  # parts that a worker has at once, so that it never waits for the driver
DEATHS = 5  # of workers while they had one part, after which it is to blame
STARTS = 20  # workers that may die in succession before they are ready
PAUSE_S = 1.0  # before a worker is asked for in place of one that did not start

LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError)


class Part(NamedTuple):
    """A call of `Worker.play`."""

    sent: bytes
    references: tuple[list[Any], list[Any]]


class Cluster:
    """`count` workers of a cluster that this process is connected to."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.lost = 0  # workers that died
        self.sent_bytes = 0
        self.parts = 0
        # No restarts by Ray: a worker that restarts where its node was would wait there for its part.
        self._actor: Any = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(Worker)
        self._ready: list[Any] = []
        self._starting: dict[Any, Any] = {}  # reference of `ready` → worker
        self._failed = 0  # starts in succession
        for _ in range(count):
            self._start()

    @property
    def ready(self) -> int:
        """Workers that can play."""
        return len(self._ready)

    @property
    def workers(self) -> list[Any]:
        """Their actor handles."""
        return list(self._ready)

    def await_workers(self, timeout_s: float) -> int:
        """Let workers start for at most so long; how many are ready.

        Raises:
            UserError: they run another version, or die as they start.
        """
        until = time.monotonic() + timeout_s
        while self._starting and (left := until - time.monotonic()) > 0:
            for reference in ray.wait(list(self._starting), num_returns=1, timeout=left)[0]:
                self._started(reference)
        return self.ready

    def run(self, parts: Sequence[Part]) -> list[Any]:
        """What each part came to, in order. A lost worker's parts are played again.

        Raises:
            UserError: of a part, or the part kills every worker that it is given to.
        """
        results: list[Any] = [None] * len(parts)
        waiting, deaths = deque(range(len(parts))), Counter[int]()
        flying: dict[Any, tuple[Any, int]] = {}
        self.parts += len(parts)
        left = len(parts)
        while left:
            self._hand_out(parts, waiting, flying)
            for reference in ray.wait([*flying, *self._starting], num_returns=1)[0]:
                if reference in self._starting:
                    self._started(reference)
                    continue
                worker, index = flying.pop(reference)
                try:
                    results[index] = ray.get(reference)
                    left -= 1
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, UserError) else error from None
                except LOST:
                    waiting.appendleft(index)
                    deaths[index] += 1
                    self._replace(worker)
                    if deaths[index] >= DEATHS:
                        raise UserError(
                            f"{DEATHS} workers died one after another while they played the same episodes; look for "
                            "their end in the logs of Ray (out of memory?)"
                        ) from None
        return results

    def close(self) -> None:
        """End the workers."""
        for worker in [*self._ready, *self._starting.values()]:
            ray.kill(worker)
        self._ready, self._starting = [], {}

    def _hand_out(self, parts: Sequence[Part], waiting: deque[int], flying: dict[Any, tuple[Any, int]]) -> None:
        busy = Counter(id(worker) for worker, _ in flying.values())
        for depth in range(1, AHEAD + 1):  # everyone has one before anyone has two
            for worker in self._ready:
                if not waiting:
                    return
                if busy[id(worker)] < depth:
                    busy[id(worker)] += 1
                    index = waiting.popleft()
                    sent, references = parts[index]
                    self.sent_bytes += len(sent)
                    flying[worker.play.remote(sent, *references)] = worker, index

    def _start(self) -> None:
        worker: Any = self._actor.remote()
        self._starting[worker.ready.remote()] = worker

    def _started(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            theirs, _ = ray.get(reference)
        except LOST:
            self._failed += 1
            if self._failed >= STARTS:
                raise UserError(
                    f"{STARTS} workers died as they started; see the logs of Ray in /tmp/ray/session_latest/logs"
                ) from None
            time.sleep(PAUSE_S)
            self._start()
            return
        except RayTaskError as error:
            raise UserError(
                f"workers of the cluster cannot load steersman ({error.cause!r}); install the same version on every "
                "node, or send it along with the job (docs/cluster.md)"
            ) from None
        if theirs != version():
            raise UserError(
                "workers of the cluster run another version of steersman or numba; install the same on every node"
            )
        self._failed = 0
        self._ready.append(worker)

    def _replace(self, worker: Any) -> None:
        """A new worker in the place of a lost one. Its other parts fail by themselves, and find it gone."""
        if worker in self._ready:
            self._ready.remove(worker)
            self.lost += 1
            ray.kill(worker)
            self._start()
