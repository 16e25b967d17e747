"""From the times at which tokens came back to the iterations of the engine, and what each of them computed.

While a stream decodes, two of its tokens are one iteration apart. What an iteration prefilled is not seen, but where
a prefill ended is: its last chunk is in the iteration that gives the first token. The engine is taken to be greedy:
chunks fill the budget of each iteration that begins after the request was sent.

Where two tokens of a stream were read together, or others got one between two of its, somebody on the way was late. How
long such iterations took is not known, and they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steersman.runtime.calibration.load import Stream

SAME = 0.2  # tokens closer than this share of the usual gap come from one iteration

# What happened between two instants at which tokens came.
STEP = np.dtype(
    [
        ("seconds", "f8"),
        ("iterations", "i4"),  # 1 while anything decodes; else those of the prefill alone
        ("decoding", "i4"),  # sequences that decode in it
        ("context_tokens", "f8"),  # of them in all
        ("chunks", "i4"),  # prefill chunks
        ("prefill_tokens", "f8"),
        ("prefill_tokens2", "f8"),  # Σ n·(p + n/2) over its chunks of n tokens behind p computed ones
        ("idle", "i4"),  # 1: it began with a request that found the engine idle
    ],
    align=True,
)


def steps(streams: Sequence[Stream], token_budget: int) -> np.ndarray:
    """STEP (S,) of one engine's streams, in order of time."""
    if not streams:
        return np.zeros(0, STEP)
    index = _instants(streams)
    bounds = np.full(max(map(max, index)) + 1, np.inf)
    for stream, own in zip(streams, index, strict=True):
        np.minimum.at(bounds, own, stream.token_s)
    table = np.zeros(len(bounds), STEP)  # row k ends at bounds[k]
    for stream, own in zip(streams, index, strict=True):
        first, last = own[0], own[-1]
        table["decoding"][first + 1 : last + 1] += 1
        table["context_tokens"][first + 1 : last + 1] += stream.prompt_tokens + np.arange(1, last - first + 1)
    table["iterations"] = table["decoding"] > 0
    begins = np.concatenate([[-np.inf], bounds[:-1]])
    room = np.where(table["decoding"] > 0, token_budget - table["decoding"], 0).astype(float)
    waits = np.full(len(bounds), np.inf)  # when the first request of a step without decodes was sent
    for i in sorted(range(len(streams)), key=lambda i: (index[i][0], streams[i].sent_s)):
        ends = index[i][0]
        _place(streams[i], ends, begins, room, waits, table)
        if table["decoding"][ends] == 0:  # what is left of the budget of its last iteration
            room[ends] = -table["prefill_tokens"][ends] % token_budget
    alone = table["decoding"] == 0
    table["iterations"][alone] = np.ceil(table["prefill_tokens"][alone] / token_budget)
    table["idle"] = alone & (waits > begins)
    for stream, own in zip(streams, index, strict=True):  # another prompt may have been computed in part: not known
        ambiguous = alone & (bounds > stream.sent_s) & (np.arange(len(bounds)) < own[0])
        table["iterations"][ambiguous] = 0
        late = (np.diff(stream.token_s) == 0) | (np.diff(own) > 1)
        for before, now, together in zip(own[:-1][late], own[1:][late], np.diff(own)[late] == 1, strict=True):
            table["iterations"][before + 1 - together : now + 1] = 0
    table["seconds"] = bounds - np.where(alone, np.maximum(begins, np.where(np.isfinite(waits), waits, begins)), begins)
    return table[np.isfinite(table["seconds"]) & (table["seconds"] > 0) & (table["iterations"] > 0)]


def _instants(streams: Sequence[Stream]) -> list[np.ndarray]:
    """For each stream, the index of the instant at which each of its tokens came."""
    gaps = np.concatenate([np.diff(s.token_s) for s in streams])
    apart = SAME * float(np.median(gaps)) if len(gaps) else 0.0
    events = sorted((time, i) for i, stream in enumerate(streams) for time in stream.token_s)
    index: list[list[int]] = [[] for _ in streams]
    instant, since = -1, -np.inf
    for time, i in events:
        if time - since > apart or (index[i] and index[i][-1] == instant):
            instant, since = instant + 1, time
        index[i].append(instant)
    return [np.array(own) for own in index]


def _place(
    stream: Stream, ends: int, begins: np.ndarray, room: np.ndarray, waits: np.ndarray, table: np.ndarray
) -> None:
    """Write the chunks of one prompt, whose first token came at instant `ends`, into the steps before it.

    They are full from the earliest step on from which the last one still falls into step `ends`.
    """
    left = float(max(1, stream.prompt_tokens - stream.cached_tokens))
    start, found = ends, 0.0
    while start > 0 and begins[start - 1] >= stream.sent_s and found + room[start - 1] < left:
        start -= 1
        found += room[start]
    computed = float(stream.cached_tokens)
    for k in range(start, ends + 1):
        chunk = left if k == ends else room[k]
        if chunk <= 0:
            continue
        room[k] -= chunk
        left -= chunk
        row = table[k]
        row["chunks"] += 1
        row["prefill_tokens"] += chunk
        row["prefill_tokens2"] += chunk * (computed + chunk / 2)
        computed += chunk
        if row["decoding"] == 0:
            waits[k] = min(waits[k], stream.sent_s)
