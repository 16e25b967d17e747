"""Training on Ray: the same results from any number of workers, and when workers and nodes are lost."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadly import cuts_off, kills
from rich.console import Console

from steersman import cli
from steersman.agents.policies import resolve
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import Workload
from steersman.training.drawn import Recipe, drawn
from steersman.training.explain.difference import gains, partings
from steersman.training.explain.situations import play
from steersman.training.objective import Arena
from steersman.training.tuned import tune

ray = pytest.importorskip("ray")

from steersman.training.cluster.arena import ClusterArena, cuts, sendable  # noqa: E402
from steersman.training.cluster.cluster import Cluster  # noqa: E402
from steersman.training.cluster.connect import connected  # noqa: E402

GROUP = {"profile": "llama-3.1-8b-h100-bf16", "kv_tokens": 20000, "max_num_seqs": 16, "token_budget": 256}
FLEET = Fleet.model_validate(
    {
        "description": "Two unlike replicas.",
        "replicas": [
            GROUP | {"name": "fast"},
            GROUP | {"name": "slow", "profile": "llama-3.1-8b-l40s-bf16"},
        ],
    }
)
WORKLOAD = Workload.model_validate(
    {
        "description": "One tenant.",
        "duration_s": 8,
        "tenants": {
            "chat": {
                "slo": {"ttft_s": 0.3, "tpot_s": 0.03},
                "source": {
                    "kind": "synthetic",
                    "rate_rps": 12,
                    "prompt_tokens": {"lognormal": {"median": 300, "sigma": 0.6, "max": 2000}},
                    "output_tokens": {"lognormal": {"median": 30, "sigma": 0.4, "max": 100}},
                    "max_tokens": 100,
                },
            }
        },
    }
)
# The last one is on a variant of both.
EPISODES = [drawn(WORKLOAD, FLEET, Recipe(seed, 1.2, "train", None, [None, None, None, 5][seed])) for seed in range(4)]


@pytest.fixture(scope="module")
def cluster(ray_cluster: Any) -> Iterator[Cluster]:
    with connected("local", Console(quiet=True)) as made:
        yield made


@pytest.fixture
def arena(cluster: Cluster) -> ClusterArena:
    return ClusterArena(FLEET, WORKLOAD, cluster)


def policies(count: int) -> list[CompiledPolicy]:
    rng, policy = np.random.default_rng(1), resolve("push-shed")
    return [policy.with_values(policy.values * rng.uniform(0.5, 1.5, len(policy.values))) for _ in range(count)]


def tuned(arena: Arena, checkpoint: Path) -> np.ndarray:
    found = tune(
        resolve("push-shed"),
        population=6,
        seed=3,
        generations=4,
        pool=EPISODES,
        episodes=2,
        arena=arena,
        checkpoint=checkpoint,
        progress=lambda *_: None,
    )
    return found.policy.values


def test_values_are_those_of_threads_to_the_bit(arena: ClusterArena) -> None:
    own = policies(5)
    assert arena.values(own, EPISODES, 7).tobytes() == Arena(FLEET, 1).values(own, EPISODES, 7).tobytes()


def test_whole_episodes_are_those_of_threads(arena: ClusterArena) -> None:
    ours = arena.episodes(resolve("jsed"), EPISODES)
    theirs = Arena(FLEET, 1).episodes(resolve("jsed"), EPISODES)
    for a, b in zip(ours, theirs, strict=True):
        assert a.requests is b.requests
        assert a.outcomes.ttft_s.tobytes() == b.outcomes.ttft_s.tobytes()
        assert a.usage.tobytes() == b.usage.tobytes()


def test_episodes_that_were_not_drawn_are_sent(arena: ClusterArena) -> None:
    made = [Requests(e.table, e.blocks, e.block_tokens, e.tenants, e.duration_s, e.before) for e in EPISODES]
    assert arena.values([resolve("jsed")], made) == Arena(FLEET, 1).values([resolve("jsed")], made)


def test_roll_outs_of_decisions_are_those_of_threads(arena: ClusterArena) -> None:
    policy, other, plain = resolve("push-shed"), resolve("round-robin"), Arena(FLEET, 1)
    situations = play(policy, other, SimulatedRuntime(FLEET), EPISODES, 0)
    parted = partings(situations)
    ours, theirs = (gains(policy, where, EPISODES, situations, parted, 9) for where in (arena, plain))
    assert ours
    assert ours == theirs


def test_a_search_gives_the_same_bytes_as_without_ray(arena: ClusterArena, tmp_path: Path) -> None:
    ours, theirs = tuned(arena, tmp_path / "a.npy"), tuned(Arena(FLEET, 1), tmp_path / "b.npy")
    assert ours.tobytes() == theirs.tobytes()
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers: int, arena: ClusterArena) -> None:
    own = policies(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena._cluster, "count", workers)
        values = arena.values(own, EPISODES, 7)
    assert values.tobytes() == Arena(FLEET, 1).values(own, EPISODES, 7).tobytes()


def test_a_killed_worker_changes_nothing(arena: ClusterArena, cluster: Cluster, tmp_path: Path) -> None:
    own, lost = policies(5), cluster.lost
    pids = ray.get([worker.ready.remote() for worker in cluster.workers])
    hand_out = Cluster._hand_out

    def killing(self: Cluster, *arguments: Any) -> None:
        hand_out(self, *arguments)
        if pids:
            os.kill(pids.pop()[1], signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "_hand_out", killing)
        values = arena.values(own, EPISODES, 7)
    assert values.tobytes() == Arena(FLEET, 1).values(own, EPISODES, 7).tobytes()
    assert cluster.lost == lost + 2
    assert cluster.await_workers(30) == 2


def test_a_worker_that_gets_no_objects_counts_as_lost(arena: ClusterArena, cluster: Cluster) -> None:
    lost = cluster.lost
    arena.play([(resolve("jsed"), EPISODES[0], 0)], cuts_off)
    values = ClusterArena(FLEET, WORKLOAD, cluster).values(policies(5), EPISODES, 7)  # sends fleet and workload anew
    assert values.tobytes() == Arena(FLEET, 1).values(policies(5), EPISODES, 7).tobytes()
    assert cluster.lost == lost + 1
    assert cluster.await_workers(30) == 2


def test_a_killed_node_changes_nothing(ray_cluster: Any, cluster: Cluster) -> None:
    """The two workers of `cluster` have the first node, and those of this test two more."""
    more = [ray_cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    ray_cluster.wait_for_nodes()
    own = policies(5)
    hand_out, nodes = Cluster._hand_out, more[:1]
    with connected("local", Console(quiet=True), workers=2) as cluster:
        assert cluster.ready == 2

        def killing(self: Cluster, *arguments: Any) -> None:
            hand_out(self, *arguments)
            if nodes:
                ray_cluster.remove_node(nodes.pop(), allow_graceful=False)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cluster, "_hand_out", killing)
            values = ClusterArena(FLEET, WORKLOAD, cluster).values(own, EPISODES, 7)
        assert cluster.lost == 1
    ray_cluster.remove_node(more[1])
    assert values.tobytes() == Arena(FLEET, 1).values(own, EPISODES, 7).tobytes()


def test_episodes_that_kill_every_worker_end_in_a_sentence(
    arena: ClusterArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steersman.training.cluster.cluster.DEATHS", 2)
    with pytest.raises(UserError, match="workers died one after another"):
        arena.play([(resolve("jsed"), EPISODES[0], 0)], kills)


@pytest.mark.parametrize(("jobs", "workers"), [(1, 4), (96, 2), (96, 64), (7, 1)])
def test_parts_cover_the_work_and_shrink(jobs: int, workers: int) -> None:
    sizes = np.diff(list(cuts(jobs, workers)))
    assert sizes.sum() == jobs
    assert (sizes > 0).all()
    assert (np.diff(sizes) <= 0).all()


def test_a_changed_episode_has_no_recipe() -> None:
    assert EPISODES[0].recipe is not None
    assert replace(EPISODES[0], block_tokens=8).recipe is None


def test_a_policy_that_no_worker_finds_is_refused() -> None:
    policy = resolve("jsed")
    with pytest.raises(UserError, match="importable module"):
        sendable(replace(policy, function=lambda *_: None))


def steersman(*arguments: str | Path) -> int:
    """The command's exit code, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["steersman", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return int(stopped.value.code or 0)


def test_an_address_where_nothing_answers_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        assert steersman("train", "--ray", f"127.0.0.1:{port}", "--runs", tmp_path) == 2
    assert f"127.0.0.1:{port}: nothing answers there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_ray_it_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert steersman("train", "--runs", tmp_path, "--ray") == 2
    assert "pip install 'steersman[ray]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["train", "--ray"], ["train", "--ray", "local"]),
        (["benchmark", "--ray", "steady"], ["benchmark", "--ray", "local", "steady"]),
        (["train", "--ray", "auto", "azure"], ["train", "--ray", "auto", "azure"]),
        (["train", "--ray", "10.0.0.1:6379"], ["train", "--ray", "10.0.0.1:6379"]),
    ],
)
def test_ray_needs_no_address(given: list[str], made: list[str]) -> None:
    assert cli.with_address(given) == made
