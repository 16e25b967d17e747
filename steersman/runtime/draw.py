"""An episode of a workload for a fleet: drawn, and checked to be one that the fleet can serve at all."""

from __future__ import annotations

import numpy as np

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Split, Workload


def draw(
    workload: Workload,
    fleet: Fleet,
    seed: int,
    *,
    load: float = 1.0,
    split: Split = "train",
    duration_s: float | None = None,
) -> Requests:
    """One episode; the same arguments give the same bytes. Arguments as those of `Workload.sample`.

    Raises:
        UserError: as `Workload.sample`, or there are requests that no replica can hold, however idle it is.
    """
    requests = workload.sample(
        seed,
        load=load,
        split=split,
        duration_s=duration_s,
        models=fleet.models,
        regions=[zone.region for zone in fleet.zones],
        zones=fleet.zones,
    )
    _check(requests, fleet)
    return requests


def _check(requests: Requests, fleet: Fleet) -> None:
    """Every request has a replica of its model, in one of its regions, that holds prompt and max_tokens."""
    table, replicas = requests.table, fleet.table()
    tokens = table["prompt_tokens"].astype(np.int64) + table["max_tokens"]
    held = np.minimum(replicas["kv_tokens"], replicas["max_model_len"])
    most = np.zeros(len(table), np.int64)
    for replica, size in zip(replicas, held, strict=True):
        usable = (table["model"] < 0) | (table["model"] == replica["model"])
        usable &= (table["regions"] == 0) | ((table["regions"] >> int(replica["zone"])) & 1 == 1)
        most = np.maximum(most, np.where(usable, size, 0))
    if (tokens > most).any():
        worst = int(np.argmax(tokens - most))
        tenant = list(requests.tenants)[table["tenant"][worst]]
        raise UserError(
            f"tenant {tenant!r} sends requests that fit no replica: {table['prompt_tokens'][worst]} prompt tokens and "
            f"{table['max_tokens'][worst]} for the answer, but the largest that may serve them holds {most[worst]}; "
            "raise kv_tokens and max_model_len in the fleet file, or lower max_tokens in the workload file"
        )
