"""Comparing policies on the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from steersman.runtime.outcomes import Episode, Summary, summarise
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.training.objective import Arena, worth


class Comparison(NamedTuple):
    """Policies on common episodes."""

    summaries: list[Summary]
    episodes: dict[str, list[Episode]]
    worths: dict[str, list[float]]  # by episode, for paired statistics


def compare(
    policies: Sequence[CompiledPolicy], requests: Sequence[Requests], arena: Arena, seed: int = 0
) -> Comparison:
    """Every policy plays every episode; policies with equal names must not be given."""
    table = arena.fleet.table()
    summaries, episodes, worths = [], {}, {}
    for policy in policies:
        played = arena.episodes(policy, requests, seed)
        episodes[policy.name] = played
        worths[policy.name] = [worth(e) for e in played]
        summaries.append(
            summarise(policy.name, played, arena.fleet.names, table["max_num_seqs"], arena.fleet.price_per_hour)
        )
    return Comparison(summaries, episodes, worths)
