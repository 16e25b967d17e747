"""What Ray costs and gains in a search: `steersman bench ray`.

Generations of the default search (16 candidates on 6 episodes) are played by the plain loop on one thread and by
workers of a Ray cluster, in turns, and must be worth the same to the last bit.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from rich.console import Console

from steersman.agents.policies import resolve
from steersman.runtime.configs import find_config
from steersman.runtime.fleet import load_fleet
from steersman.runtime.workload import load_workload
from steersman.training.bench.machine import machine, resident_mib
from steersman.training.bench.plan import plan
from steersman.training.cluster.connect import connected, joined
from steersman.training.config import SearchConfig
from steersman.training.drawn import Drawn, Recipe, drawn
from steersman.training.objective import Arena

POOL = 24  # episodes: few, so that workers have drawn them all before the measurement
EMPTY = 200  # parts without jobs, for what a part costs
LOAD = 1.2


def bench(workers: list[int], generations: int, address: str, console: Console) -> dict[str, Any]:
    """Seconds of a generation by the number of workers, as the one JSON object that the command prints.

    plain_s, threads_s: the plain loop on one thread, and on as many as there are workers, or cores if these are fewer:
    what the machine gives at the time. speed_up: of plain_s. efficiency: speed_up over workers. plan: see `plan.py`.
    """
    from steersman.training.cluster.arena import ClusterArena

    workload, fleet = load_workload(find_config("workloads", "default")), load_fleet(find_config("fleets", "default"))
    pool, draw_s = [], time.perf_counter()
    for seed in range(POOL):
        pool.append(drawn(workload, fleet, Recipe(seed, LOAD, "train", None)))
    draw_s = (time.perf_counter() - draw_s) / POOL
    plain, measured = Arena(fleet, 1), []
    population = _population(SearchConfig().population)
    with joined(address, console, max(workers)):
        for count in workers:
            with connected(address, console, count) as cluster, console.status(f"{count} workers …"):
                arena = ClusterArena(fleet, workload, cluster)
                for _ in range(2 * count):  # every worker compiles, and draws the pool
                    arena.values(population[:4], pool)
                threads = Arena(fleet, min(count, os.cpu_count() or 1))
                own, theirs, threaded, cpu_s = [], [], [], _cpu_s(cluster)
                sent, parts = cluster.sent_bytes, cluster.parts
                for number in range(generations):
                    episodes = _episodes(pool, number)
                    ray_s, values = _timed(arena, population, episodes, number)
                    plain_s, expected = _timed(plain, population, episodes, number)
                    assert values.tobytes() == expected.tobytes(), "results depend on where episodes are played"
                    own.append(ray_s)
                    theirs.append(plain_s)
                    threaded.append(_timed(threads, population, episodes, number)[0])
                cpu_s = _cpu_s(cluster) - cpu_s
                threads.close()
                measured.append(
                    {
                        "workers": count,
                        "generation_s": float(np.mean(own)),
                        "plain_s": float(np.mean(theirs)),
                        "threads_s": float(np.mean(threaded)),
                        "worker_cpu_s": cpu_s / generations,
                        "speed_up": float(np.sum(theirs) / np.sum(own)),
                        "efficiency": float(np.sum(theirs) / np.sum(own) / count),
                        "parts": (cluster.parts - parts) / generations,
                        "sent_bytes_per_worker": (cluster.sent_bytes - sent) / generations / count,
                        **_parts(cluster),
                        "worker_mib": max(_memory(cluster)),
                        "driver_mib": resident_mib(),
                    }
                )
    alone = next((row for row in measured if row["workers"] == 1), None)
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in ("steersman", "ray", "numba", "numpy")},
        "generations": generations,
        "episodes_per_generation": len(population) * SearchConfig().episodes,
        "draw_ms": draw_s * 1000,
        "overhead": None if alone is None else alone["generation_s"] / alone["plain_s"] - 1,
        "workers": measured,
        "plan": plan(
            [_cpu_time(plain, policy, one) for policy in population[:4] for one in pool],
            float(np.median([row["part_ms"] for row in measured])) / 1000,
            float(np.median([row["parts_per_s"] for row in measured])),
        ),
    }


def _population(count: int) -> list[Any]:
    rng, policy = np.random.default_rng(0), resolve("push-shed")
    low, high = (np.array([getattr(p, side) for p in policy.params.values()]) for side in ("low", "high"))
    step = 0.05 * (high - low)
    return [
        policy.with_values(np.clip(policy.values + step * rng.normal(size=len(low)), low, high)) for _ in range(count)
    ]


def _episodes(pool: list[Drawn], number: int) -> list[Drawn]:
    return [pool[(number * 7 + i * 4) % POOL] for i in range(SearchConfig().episodes)]


def _timed(arena: Arena, population: list[Any], episodes: list[Drawn], seed: int) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    values = arena.values(population, episodes, seed)
    return time.perf_counter() - started, values


def _cpu_time(arena: Arena, policy: Any, episode: Drawn) -> float:
    """Seconds of CPU: what an episode takes where nobody else wants the core."""
    started = time.thread_time()
    arena.episode(policy, episode, 0)
    return time.thread_time() - started


def _parts(cluster: Any) -> dict[str, float]:
    """What a part costs that has nothing to play: milliseconds one by one, and how many a second the driver manages."""
    import pickle

    from steersman.training.cluster.cluster import Part
    from steersman.training.cluster.worker import Chunk

    empty = Part(pickle.dumps(Chunk(-1, [], [], [], Arena.episode)), ([], []))
    started = time.perf_counter()
    for _ in range(EMPTY):
        cluster.run([empty])
    one_by_one = time.perf_counter() - started
    started = time.perf_counter()
    cluster.run([empty] * (5 * EMPTY))
    return {"part_ms": one_by_one / EMPTY * 1000, "parts_per_s": 5 * EMPTY / (time.perf_counter() - started)}


def _cpu_s(cluster: Any) -> float:
    """CPU time of all workers so far."""
    import ray

    return float(sum(ray.get([worker.cpu_s.remote() for worker in cluster.workers])))


def _memory(cluster: Any) -> list[float]:
    import ray

    found: list[float] = ray.get([worker.resident_mib.remote() for worker in cluster.workers])
    return found
