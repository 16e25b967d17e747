"""An arena whose episodes are played by the workers of a cluster. Results are those of `Arena`, to the last bit."""

from __future__ import annotations

import itertools
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.outcomes import Episode
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Workload
from steersman.training.cluster import worker
from steersman.training.cluster.cluster import Cluster, Part
from steersman.training.cluster.worker import Chunk, Sent
from steersman.training.drawn import Drawn, Recipe
from steersman.training.objective import Arena, Task

STORED = 64  # episodes without a recipe that are kept in the cluster's object store

Job = tuple[CompiledPolicy, Requests, Any]
_settings = itertools.count()


class ClusterArena(Arena):
    """Plays episodes of one workload on one fleet, on the workers of a cluster.

    An episode that was drawn is sent as its recipe, some 100 bytes, and drawn anew by the worker.
    """

    def __init__(self, fleet: Fleet, workload: Workload, cluster: Cluster) -> None:
        super().__init__(fleet, 1)
        self._cluster, self._workload = cluster, workload
        self._key, self._setting = next(_settings), ray.put((workload, fleet))
        self._stored: OrderedDict[int, tuple[Requests, Any]] = OrderedDict()

    def episodes(self, policy: CompiledPolicy, requests: Sequence[Requests], seed: int = 0) -> list[Episode]:
        played = self.each(worker.episode, [(policy, one, seed + i) for i, one in enumerate(requests)])
        return [replace(episode, requests=one) for episode, one in zip(played, requests, strict=True)]

    def each(self, task: Task, jobs: Sequence[Job]) -> list[Any]:
        # By episode, so that a worker draws few of them; Python's sort keeps the order of equals.
        places: dict[int, int] = {}
        for _, requests, _ in jobs:
            places.setdefault(id(requests), len(places))
        order = sorted(range(len(jobs)), key=lambda j: places[id(jobs[j][1])])
        parts, cut = [], list(cuts(len(jobs), self._cluster.count))
        for first, last in itertools.pairwise(cut):
            parts.append(self._part([jobs[j] for j in order[first:last]], task))
        found: list[Any] = [None] * len(jobs)
        for j, value in zip(order, itertools.chain.from_iterable(self._cluster.run(parts)), strict=True):
            found[j] = value
        return found

    def _part(self, jobs: Sequence[Job], task: Task) -> Part:
        policies: dict[int, int] = {}
        episodes: dict[int, int] = {}
        sent: list[Sent] = []
        recipes: list[Recipe | int] = []
        references: list[Any] = []
        rows: list[tuple[int, int, Any]] = []
        for policy, requests, argument in jobs:
            if id(policy) not in policies:
                policies[id(policy)] = len(sent)
                sent.append(sendable(policy))
            if id(requests) not in episodes:
                episodes[id(requests)] = len(recipes)
                recipe = self._recipe(requests)
                recipes.append(len(references) if recipe is None else recipe)
                if recipe is None:
                    references.append(self._store(requests))
            rows.append((policies[id(policy)], episodes[id(requests)], argument))
        chunk = Chunk(self._key, sent, recipes, rows, task)
        return Part(pickle.dumps(chunk, protocol=5), ([self._setting], references))

    def _recipe(self, requests: Requests) -> Recipe | None:
        if isinstance(requests, Drawn) and requests.workload is self._workload:
            return requests.recipe
        return None

    def _store(self, requests: Requests) -> Any:
        """A reference of the episode in the object store, where it stays while it may be played again soon."""
        held = self._stored.get(id(requests))
        if held is None:
            held = self._stored[id(requests)] = requests, ray.put(requests)
            if len(self._stored) > STORED:
                self._stored.popitem(last=False)
        return held[1]


def cuts(jobs: int, workers: int) -> Iterator[int]:
    """Where to cut `jobs` into parts: large ones first, small ones for whoever comes free at the end.

    Guided self-scheduling: Polychronopoulos and Kuck, IEEE Transactions on Computers, 1987; here each part is
    1/(2·workers) of what is left.
    """
    at = 0
    while at < jobs:
        yield at
        at += -(-(jobs - at) // (2 * workers))
    yield jobs


def sendable(policy: CompiledPolicy) -> Sent:
    """The policy by the place of its function.

    Raises:
        UserError: its function is not an attribute of a module, so that no other process finds it.
    """
    function = policy.function
    module, attribute = function.__module__, function.__name__
    if getattr(sys.modules.get(module), attribute, None) is not function or module == "__main__":
        raise UserError(
            f"policy {policy.name!r}: its function is not an attribute of an importable module, so that no worker "
            "finds it; move it to a module of its own"
        )
    return Sent(module, attribute, policy.memory_size, policy.values)
