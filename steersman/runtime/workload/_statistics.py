"""What an episode is like: rate, lengths, and how much of it prefix caches could save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steersman.runtime.requests import Requests

PERCENTILES = (50, 90, 99)


class Statistics(NamedTuple):
    """Statistics of requests."""

    rate_rps: float
    gap_cv: float  # of the times between arrivals, over episodes
    prompt_tokens: list[int]  # at PERCENTILES
    output_tokens: list[int]
    prefix_share: float  # of prompt tokens that an infinite cache, empty at first, would have


def statistics(episodes: Sequence[Requests], tenant: str | None = None) -> Statistics:
    """Statistics of one tenant's requests (default: all) over episodes."""
    tables, hits = [], 0
    gaps = [np.zeros(0)]
    for requests in episodes:
        rows = np.arange(len(requests))
        if tenant is not None:
            rows = np.flatnonzero(requests.table["tenant"] == list(requests.tenants).index(tenant))
        tables.append(requests.table[rows])
        hits += int(cached_tokens(requests)[rows].sum())
        gaps.append(np.diff(tables[-1]["arrival_s"]))
    table, gap = np.concatenate(tables), np.concatenate(gaps)
    if len(table) == 0:
        return Statistics(0.0, 0.0, [0] * len(PERCENTILES), [0] * len(PERCENTILES), 0.0)
    return Statistics(
        rate_rps=len(table) / sum(requests.window_s for requests in episodes),
        gap_cv=float(gap.std() / gap.mean()) if len(gap) and gap.mean() else 0.0,
        prompt_tokens=[int(v) for v in np.percentile(table["prompt_tokens"], PERCENTILES)],
        output_tokens=[int(v) for v in np.percentile(table["output_tokens"], PERCENTILES)],
        prefix_share=hits / int(table["prompt_tokens"].sum()),
    )


def cached_tokens(requests: Requests) -> np.ndarray:
    """For each request, the prompt tokens that an infinite cache would have, int64 (requests,).

    The cache holds every block of every earlier request, outputs included, as if those had ended.
    """
    table = requests.table
    count = table["block_count"].astype(np.int64)
    owner = np.repeat(np.arange(len(table)), count)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    keys = requests.blocks[np.repeat(table["block_start"], count) + place]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    hit = (owner[first[inverse]] < owner) & (place < np.repeat(table["prompt_blocks"], count))
    return np.bincount(owner[hit], minlength=len(table)) * requests.block_tokens
