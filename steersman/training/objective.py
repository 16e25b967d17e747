"""What a policy is worth: the yardstick of search, tuning and selection, on common random numbers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np

from steersman.runtime.fleet import Fleet
from steersman.runtime.outcomes import Episode
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.tenant import tenant_table
from steersman.runtime.workload import Workload
from steersman.training.drawn import Drawn


class Sampler(Protocol):
    """Draws an episode: `sample(seed, load)`."""

    def __call__(self, seed: int, load: float) -> Requests: ...


Score = Callable[[Episode], float]


def worth(episode: Episode, waiting: float = 0.0) -> float:
    """Half the attainment over all requests, half that of the worst tenant; in [0, 1]. Less `waiting` for each second
    that a request waits on average.

    The SLO capacity asks for 95 % overall and 90 % of every tenant: a policy that sacrifices a tenant is not better.
    A request waits for its TTFT, in seconds, but at most for its TTFT target, and for that where no token came.
    """
    attained, tenant = episode.outcomes.attained, episode.requests.table["tenant"]
    if not len(attained):
        return 1.0
    good = np.bincount(tenant, weights=attained)
    count = np.bincount(tenant)
    found = 0.5 * good.sum() / count.sum() + 0.5 * (good[count > 0] / count[count > 0]).min()
    if waiting:
        targets = tenant_table(episode.requests.judged or episode.requests.tenants)["ttft_slo_s"][tenant]
        found -= waiting * float(np.fmin(targets, episode.outcomes.ttft_s).mean())
    return float(found)


class _Runtimes(threading.local):
    """Of one thread, by the number of the fleet's variant."""

    def __init__(self) -> None:
        self.runtimes: dict[int | None, SimulatedRuntime] = {}


class Arena:
    """Plays many episodes on one fleet and its variants, on all cores: the compiled loop holds no lock, so threads do.

    Results do not depend on the number of threads.
    """

    def __init__(self, fleet: Fleet, threads: int | None = None) -> None:
        self.fleet = fleet
        self.threads = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="arena")
        self._local = _Runtimes()

    def each(self, task: Task, jobs: Sequence[tuple[CompiledPolicy, Requests, Any]]) -> list[Any]:
        """What `task` makes of each (policy, episode, argument), in order."""
        return list(self._pool.map(lambda job: task(self, *job), jobs))

    def play(self, jobs: Sequence[tuple[CompiledPolicy, Requests, int]], score: Score = worth) -> list[float]:
        """The score of each (policy, episode, seed)."""
        return self.each(partial(_scored, score), jobs)

    def episodes(self, policy: CompiledPolicy, requests: Sequence[Requests], seed: int = 0) -> list[Episode]:
        """All `requests` under one policy."""
        return self.each(Arena.episode, [(policy, one, seed + i) for i, one in enumerate(requests)])

    def episode(self, policy: CompiledPolicy, requests: Requests, seed: int) -> Episode:
        """One episode, played in the calling thread."""
        runtime = self.runtime(requests)
        runtime.run(policy, seed)
        return runtime.episode

    def runtime(self, requests: Requests) -> SimulatedRuntime:
        """The calling thread's runtime of the fleet that the episode was drawn for, at its beginning."""
        fleet, variant = self.fleet, None
        if isinstance(requests, Drawn) and requests.recipe is not None and requests.fleet is not None:
            fleet, variant = requests.fleet, requests.recipe.variant
        if variant not in self._local.runtimes:
            self._local.runtimes[variant] = SimulatedRuntime(fleet)
        made = self._local.runtimes[variant]
        made.reset(requests)
        return made

    def values(
        self, policies: Sequence[CompiledPolicy], requests: Sequence[Requests], seed: int = 0, score: Score = worth
    ) -> np.ndarray:
        """The mean score of each policy over the same episodes, (policies,)."""
        jobs = [(policy, episode, seed + i) for policy in policies for i, episode in enumerate(requests)]
        return np.array(self.play(jobs, score)).reshape(len(policies), len(requests)).mean(axis=1)

    def close(self) -> None:
        self._pool.shutdown()


# A task of `Arena.each`: (arena, policy, episode, argument) → what it comes to. A function of a module, so that other
# processes find it.
Task = Callable[[Arena, CompiledPolicy, Requests, Any], Any]


def _scored(score: Score, arena: Arena, policy: CompiledPolicy, requests: Requests, seed: int) -> float:
    return score(arena.episode(policy, requests, seed))


class ArenaMaker(Protocol):
    """Makes an arena: where episodes of a workload are played."""

    def __call__(self, fleet: Fleet, workload: Workload) -> Arena: ...


def local_arena(fleet: Fleet, workload: Workload) -> Arena:
    """An arena of this process's threads."""
    return Arena(fleet)
