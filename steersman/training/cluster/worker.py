"""What runs on each core of the cluster: episodes drawn by seed, played, and what they came to."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections import OrderedDict
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from steersman.runtime.compiled import cache_folder
from steersman.runtime.outcomes import Episode
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import REQUEST, Requests
from steersman.training.drawn import Recipe, drawn
from steersman.training.objective import Arena, Task

CACHE_BYTES = 256 << 20  # of drawn episodes: two hundred of the default workload, a pool of `steersman train`
SETTINGS = 4  # workloads and fleets that are kept ready


class Sent(NamedTuple):
    """A policy as its numbers and the place of its function, which every worker has compiled or compiles."""

    module: str
    attribute: str
    memory_size: int
    values: np.ndarray

    def policy(self) -> CompiledPolicy:
        function = getattr(import_module(self.module), self.attribute)
        return CompiledPolicy(self.attribute, "", function, memory_size=self.memory_size, values=self.values)


class Chunk(NamedTuple):
    """A part of the work: jobs of indices into `policies` and `episodes`, and an argument of the task."""

    setting: int  # names (workload, fleet) of this driver
    policies: list[Sent]
    episodes: list[Recipe | int]  # drawn by the worker, or an index into the references that are sent along
    jobs: list[tuple[int, int, Any]]
    task: Task


class Worker:
    """An actor. Its state is only a cache: another worker gives the same answers."""

    def __init__(self) -> None:
        self._settings: OrderedDict[int, tuple[Any, Arena]] = OrderedDict()
        self._episodes: OrderedDict[tuple[int, Recipe], Requests] = OrderedDict()
        self._bytes = 0

    def ready(self) -> tuple[str, int]:
        """The version of its compiled code, and its process."""
        return version(), os.getpid()

    def play(self, sent: bytes, setting: list[Any], episodes: list[Any]) -> list[Any]:
        """What the jobs of a pickled `Chunk` came to.

        setting: the reference of (workload, fleet). episodes: references of those that were not drawn by a recipe.
        """
        chunk: Chunk = pickle.loads(sent)
        if not chunk.jobs:
            return []
        workload, arena = self._setting(chunk.setting, setting[0])
        policies = [one.policy() for one in chunk.policies]
        requests = [
            fetched(episodes[one]) if isinstance(one, int) else self._draw(chunk.setting, one, workload, arena)
            for one in chunk.episodes
        ]
        return [chunk.task(arena, policies[p], requests[e], argument) for p, e, argument in chunk.jobs]

    def cpu_s(self) -> float:
        """CPU time of its process so far."""
        return time.process_time()

    def resident_mib(self) -> float:
        """Memory of its process."""
        from steersman.training.bench.machine import resident_mib

        return resident_mib()

    def _setting(self, key: int, reference: Any) -> tuple[Any, Arena]:
        if key not in self._settings:
            workload, fleet = fetched(reference)
            self._settings[key] = workload, Arena(fleet, 1)
            if len(self._settings) > SETTINGS:
                self._settings.popitem(last=False)
        self._settings.move_to_end(key)
        return self._settings[key]

    def _draw(self, setting: int, recipe: Recipe, workload: Any, arena: Arena) -> Requests:
        key = setting, recipe
        if key not in self._episodes:
            made = self._episodes[key] = drawn(workload, arena.fleet, recipe)
            self._bytes += size(made)
            while self._bytes > CACHE_BYTES and len(self._episodes) > 1:
                self._bytes -= size(self._episodes.popitem(last=False)[1])
        self._episodes.move_to_end(key)
        return self._episodes[key]


def fetched(reference: Any) -> Any:
    """The object of a reference. A worker whose node has lost its object store ends, as the node does."""
    import ray

    try:
        return ray.get(reference)
    except OSError:
        traceback.print_exc()
        os._exit(1)


NO_REQUESTS = Requests(np.zeros(0, REQUEST), np.zeros(0, np.int64), 1, {})


def episode(arena: Arena, policy: CompiledPolicy, requests: Requests, seed: int) -> Episode:
    """A task: the episode without its requests, which the driver has."""
    return replace(arena.episode(policy, requests, seed), requests=NO_REQUESTS)


def size(requests: Requests) -> int:
    """Bytes of an episode."""
    return requests.table.nbytes + requests.blocks.nbytes + requests.before.nbytes


def version() -> str:
    """Of the sources of all compiled code, and of numba."""
    return os.path.basename(cache_folder())
