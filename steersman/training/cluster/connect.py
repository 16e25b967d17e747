"""Connecting to Ray: a cluster of this machine's cores, or a running one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from steersman.runtime.errors import UserError
from steersman.training.objective import ArenaMaker, local_arena

LOCAL = "local"
ANSWER_S = 5.0  # for an address to answer
START_S = 60.0  # for all workers to start; those that come later join in
OBJECTS_BYTES = 256 << 20  # object store of a cluster of this machine: recipes and scores need next to nothing


@contextmanager
def arenas(address: str | None, console: Console, workers: int | None = None) -> Iterator[ArenaMaker]:
    """How to make arenas: on this process's threads where `address` is None, else on the cluster there.

    address: `local` (a cluster of this machine, or the one that $RAY_ADDRESS names), `auto`, host:port or ray://….

    Raises:
        UserError: Ray is not installed, or nothing answers.
    """
    if address is None:
        yield local_arena
        return
    with connected(address, console, workers) as cluster:
        from steersman.training.cluster.arena import ClusterArena

        yield lambda fleet, workload: ClusterArena(fleet, workload, cluster)


@contextmanager
def connected(address: str, console: Console, workers: int | None = None) -> Iterator[Any]:
    """A `Cluster` of `workers`, by default one for each core. Arguments and errors as `arenas`."""
    with joined(address, console, workers) as ray:
        from steersman.training.cluster.cluster import Cluster

        count = workers or int(ray.cluster_resources().get("CPU", 1))
        with waiting(console, f"starting {count} workers"):
            cluster = Cluster(count)
            try:
                while not cluster.await_workers(START_S):
                    console.print("no worker has started yet: the cluster has no core to give", highlight=False)
            except BaseException:
                cluster.close()
                raise
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        console.print(f"Ray: {cluster.ready} workers on {nodes} node{'s' * (nodes > 1)}", highlight=False)
        try:
            yield cluster
        finally:
            if ray.is_initialized():
                cluster.close()


@contextmanager
def joined(address: str, console: Console, cores: int | None = None) -> Iterator[Any]:
    """The module `ray`, connected. Arguments and errors as `arenas`. Ray is left as it was found."""
    ray = _ray()
    mine = not ray.is_initialized()
    if mine:
        _start(ray, address, console, cores)
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def waiting(console: Console, told: str) -> Iterator[None]:
    """Show that something takes its time: a spinner, or a line where there is no terminal."""
    if not console.is_terminal:
        console.print(f"{told} …", highlight=False)
        yield
        return
    with console.status(f"{told} …"):
        yield


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns that this will change
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError(
            "--ray needs Ray, which is not installed; install it with: pip install 'steersman[ray]'"
        ) from None
    return ray


def _start(ray: Any, address: str, console: Console, workers: int | None) -> None:
    if address == LOCAL:
        address = os.environ.get("RAY_ADDRESS", LOCAL)
    if ":" in address:
        _check(address)
    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False, "object_store_memory": OBJECTS_BYTES}
    told = "starting Ray on this machine (some 15 s)" if address == LOCAL else f"connecting to Ray at {address}"
    with waiting(console, told):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--ray {address}: no cluster could be joined: {said[0].rstrip('.')}") from None


def _check(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--ray {address}: nothing answers there ({said}); start a cluster with `ray start --head`, and give the "
            "address that it prints"
        ) from None
