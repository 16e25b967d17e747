"""From a fleet with backends to measured cost profiles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np
import yaml

from steersman.runtime.calibration.fit import Error, error, fit
from steersman.runtime.calibration.load import drive_all, stream
from steersman.runtime.calibration.steps import steps
from steersman.runtime.cost import CostProfile
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Backend, Fleet, ReplicaGroup
from steersman.runtime.replica._pool import open_replica

FEWEST = 50  # steps that a fit needs


class Measured(NamedTuple):
    """A measured profile, the file that it belongs into, and how far it is off on the round it has not seen."""

    replica: str
    file: str
    profile: CostProfile
    steps: int  # of the fit
    held_out: Error


def fleet_of_url(
    url: str, *, kv_tokens: int, max_model_len: int, max_num_seqs: int, token_budget: int, model: str
) -> Fleet:
    """A fleet of one server. Raises: UserError, if the address or a limit is wrong."""
    try:
        group = ReplicaGroup(
            name=model.rpartition("/")[2].lower() or "server",
            profile=model.rpartition("/")[2].lower() or "server",
            kv_tokens=kv_tokens,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
            model=model,
            backend=Backend(kind="openai", options={"url": url}),
        )
    except ValueError as problem:
        raise UserError(f"{url}: {problem}") from None
    return Fleet(description=url, replicas=[group])


def calibrate(
    fleet: Fleet, seconds: float, *, source: str, hardware: str | None, told: Callable[[str], None]
) -> list[Measured]:
    """Start (or reach) every replica, drive them together, and fit one profile for each group.

    seconds: of one phase of the fit's round; phases of the held-out round take half of it.

    Raises:
        UserError: a replica cannot be started or reached, or what it streams cannot be measured.
    """
    groups = [(f"{g.name}-0" if g.count > 1 else g.name, g) for g in fleet.replicas]
    seen, held_out = asyncio.run(_drive(groups, seconds, told))
    return [
        _measured(name, group, a, b, source, hardware)
        for (name, group), a, b in zip(groups, seen, held_out, strict=True)
    ]


async def _drive(
    groups: list[tuple[str, ReplicaGroup]], seconds: float, told: Callable[[str], None]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    replicas = [(open_replica(name, group), group) for name, group in groups]
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        try:
            await asyncio.gather(*(r.start(session, told) for r, _ in replicas))
            for replica, group in replicas:
                await stream(session, replica, group.model, "A first request warms it up.", 8)
            rounds = []
            for seed, share in (("fit", 1.0), ("held out", 0.5)):
                phases = await drive_all(session, replicas, share * seconds, seed, told)
                tables = [
                    [steps(streams, group.token_budget) for streams in own]
                    for own, (_, group) in zip(phases, replicas, strict=True)
                ]
                rounds.append([np.concatenate(own) for own in tables])
        finally:
            await asyncio.gather(*(replica.stop() for replica, _ in replicas))
    return rounds[0], rounds[1]


def _measured(
    name: str, group: ReplicaGroup, seen: np.ndarray, held_out: np.ndarray, source: str, hardware: str | None
) -> Measured:
    if min(len(seen), len(held_out)) < FEWEST:
        raise UserError(
            f"replica {name!r}: only {min(len(seen), len(held_out))} iterations could be told apart; raise --seconds"
        )
    coefficients = fit(seen)
    off = error(coefficients, held_out)
    try:
        before: CostProfile | None = group.cost
    except UserError:
        before = None
    profile = CostProfile(
        description=before.description if before else f"{group.model}, measured.",
        version=before.version + 1 if before else 1,
        model=before.model if before else group.model,
        hardware=hardware or (before.hardware if before else "as measured"),
        precision=before.precision if before else "as served",
        source=source,
        error=f"{off}, on {len(held_out)} held-out iterations; {error(coefficients, seen)}, on {len(seen)} of the fit",
        overhead_s=0.0,
        **coefficients,
    )
    file = Path(group.profile).stem if isinstance(group.profile, str) else group.name
    return Measured(name, f"{file}.yaml", profile, len(seen), off)


def write(profile: CostProfile, path: Path) -> None:
    """Write a profile file.

    Raises:
        UserError: the folder cannot be written to.
    """
    text = yaml.safe_dump(profile.model_dump(), sort_keys=False, width=200, allow_unicode=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise UserError(f"{path} cannot be written: {problem.strerror}") from None
