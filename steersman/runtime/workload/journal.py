"""Recorded live traffic: the requests that a gateway's journal holds, as they came.

Arrivals, prompts, limits, prefixes, priorities, models, zones, leaving clients and deadlines are the recorded ones. A
request that did not end well has no true output length: one is drawn from those of its tenant's requests that did,
longer than what was seen of it. All tenants of a journal are played from the same window of time, for they were
together.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from steersman.runtime.errors import UserError
from steersman.runtime.journal.columns import distinct
from steersman.runtime.journal.reader import Recording, read_journal
from steersman.runtime.journal.segment import CODES, Ending
from steersman.runtime.plugins import nearest
from steersman.runtime.workload._source import Files, Source, Split, Stream, Tags
from steersman.runtime.workload._trace import window

BLOCK_TOKENS = 64  # where the recorded keys stand for other numbers of tokens at different times
TRAIN_SHARE = 0.7


class Traffic(NamedTuple):
    """The n requests of a recording that can be played."""

    recording: Recording
    kept: np.ndarray  # bool: which of the recording's requests these are
    time_s: np.ndarray  # (n,) float64
    table: np.ndarray  # (n,) segment.REQUEST
    output_tokens: np.ndarray  # (n,) int64, true or drawn
    cancel_s: np.ndarray  # (n,) float64; 0: stayed
    key_start: np.ndarray  # (n,) int64, into `places`
    places: np.ndarray  # uint32: recorded prefix keys, numbered from 0 by first appearance
    left_out: dict[str, int]  # why, and how many
    drawn: dict[str, int]  # requests whose output length was drawn, by their ending

    def span_s(self, split: Split, train_share: float = TRAIN_SHARE) -> tuple[float, float]:
        """Where a part of the recorded time begins and ends."""
        period = self.recording.period_s
        return (0.0, train_share * period) if split == "train" else (train_share * period, period)


def read_traffic(folder: Path) -> Traffic:
    """What a journal recorded, ready to be played.

    Raises:
        UserError: it cannot be read, spans less than a second, or no request in it ended well.
    """
    return _traffic(Path(folder).resolve(), Path(folder))


@functools.lru_cache(maxsize=4)
def _traffic(_: Path, folder: Path) -> Traffic:
    recording = read_journal(folder)
    table = recording.table
    if len(table) < 2 or recording.time_s[-1] < 1:
        raise UserError(f"{folder}: {len(table)} requests within a second; a journal must span at least one second")
    ending = table["ending"]
    refused = ending == CODES[Ending.REFUSED]
    out = {
        "that no replica could take": refused & ~recording.down,
        "that a replica rejected": ending == CODES[Ending.REJECTED],
        "that were not over when a gateway stopped": ending == CODES[Ending.UNENDED],
    }
    kept = ~np.logical_or.reduce(list(out.values()))
    table, ending = table[kept], ending[kept]
    done = ending == CODES[Ending.DONE]
    replicas = recording.fleet.table()
    largest = int(np.minimum(replicas["kv_tokens"], replicas["max_model_len"]).max())
    if not done.any():
        raise UserError(f"{folder}: no request of the journal ended well, so no output length is known")
    names = {code: ending.value for ending, code in CODES.items()}
    codes, counts = np.unique(ending[~done], return_counts=True)
    left = (ending == CODES[Ending.CANCELLED]) | (ending == CODES[Ending.LATE])
    return Traffic(
        recording=recording,
        kept=kept,
        time_s=recording.time_s[kept],
        table=table,
        # A prompt's length may be an estimate, too high by some tokens: it fitted, so it must fit again.
        output_tokens=np.clip(_output_tokens(table, done), 1, np.maximum(1, largest - table["prompt_tokens"])),
        cancel_s=np.where(left, np.maximum(table["e2e_s"].astype(float), 1e-3), 0.0),
        key_start=recording.key_start[:-1][kept],
        places=distinct(recording.keys)[1],
        left_out={why: int(rows.sum()) for why, rows in out.items() if rows.any()},
        drawn={names[int(code)]: int(count) for code, count in zip(codes, counts, strict=True)},
    )


def _output_tokens(table: np.ndarray, done: np.ndarray) -> np.ndarray:
    """True output lengths, int64 (n,), and drawn ones where a request is not `done`, always the same.

    A drawn length is that of a request of the same tenant that is done and was longer than what was seen of this one.
    """
    tokens = np.maximum(table["output_tokens"].astype(np.int64), 1)
    rng = np.random.default_rng(0)
    for tenant in np.unique(table["tenant"][~done]):
        own = table["tenant"] == tenant
        known = np.sort(tokens[own & done] if (own & done).any() else tokens[done])
        rows = np.flatnonzero(own & ~done)
        seen = table["output_tokens"][rows].astype(np.int64)
        first = np.searchsorted(known, seen, side="right")
        place = first + (rng.random(len(rows)) * (len(known) - first)).astype(np.int64)
        drawn = np.where(first < len(known), known[np.minimum(place, len(known) - 1)], seen + 1)
        tokens[rows] = np.maximum(np.minimum(drawn, table["max_tokens"][rows]), np.maximum(seen, 1))
    return tokens


def described(traffic: Traffic) -> list[str]:
    """What the user should know of the traffic, a sentence each."""
    recording = traffic.recording
    n = len(traffic.table)
    gaps = len(recording.runs) - 1
    told = [
        f"{recording.folder}: {n:,} requests of {len(recording.tenants)} tenants in {recording.period_s:,.0f} s, "
        f"from {recording.started:%Y-%m-%d %H:%M} UTC on" + (f", {gaps} pauses of the gateway cut out" if gaps else "")
    ]
    if traffic.drawn:
        what = ", ".join(f"{count:,} {ending}" for ending, count in traffic.drawn.items())
        share = sum(traffic.drawn.values()) / n
        told.append(
            f"{share:.1%} of them did not end well ({what}): their true output lengths are unknown, and are drawn from "
            "those of their tenant that did"
        )
    if traffic.left_out:
        told.append("left out: " + ", ".join(f"{count:,} {why}" for why, count in traffic.left_out.items()))
    if recording.lost_decisions:
        told.append(f"{recording.lost_decisions:,} decisions are missing: the gateway could not write them")
    if recording.problems:
        told.append(f"{len(recording.problems)} files are skipped; the first: {recording.problems[0]}")
    return told


def workload_of(folder: Path) -> dict[str, Any]:
    """A workload file's mapping: the recorded tenants, each with its recorded requests."""
    traffic = read_traffic(folder)
    recording = traffic.recording
    tokens = np.unique(traffic.table["block_tokens"][traffic.table["keys"] > 0])
    least = max(16, recording.fleet.block_tokens)
    exact = len(tokens) == 1 and tokens[0] % least == 0
    return {
        "description": f"Recorded from {recording.started:%Y-%m-%d %H:%M} UTC on.",
        "duration_s": min(120.0, max(1.0, TRAIN_SHARE * recording.period_s)),
        "block_tokens": int(tokens[0]) if exact else max(BLOCK_TOKENS, least),
        "tenants": {
            name: {
                **tenant.model_dump(mode="json"),
                "source": {"kind": "journal", "folder": str(folder), "tenant": name},
            }
            for name, tenant in recording.tenants.items()
        },
    }


class Journal(Source):
    """One tenant's requests in a gateway's journal.

    Training takes the first `train_share` of the recorded time, held-out episodes the rest. Episodes are windows at a
    random place, the same one for all tenants, that go round in their part if they are longer. A window exactly as
    long as its part is the part, from its beginning.
    """

    folder: str = Field(description="of the journal; relative to the folder of traces, if it is not there")
    tenant: str = Field(description="a tenant's name in the journal")
    train_share: float = Field(default=TRAIN_SHARE, gt=0, lt=1, description="share of the recorded time for training")

    def seeds(self, seed: int, tenant: str) -> list[int]:
        return [seed]  # one window for all tenants

    def _own(self, files: Files) -> tuple[Traffic, np.ndarray]:
        path = Path(self.folder)
        traffic = read_traffic(path if path.is_dir() else files.find(self.folder))
        names = list(traffic.recording.tenants)
        if self.tenant not in names:
            raise UserError(f"the journal {path} has no tenant {self.tenant!r}; {nearest(self.tenant, names)}")
        return traffic, np.flatnonzero(traffic.table["tenant"] == names.index(self.tenant))

    def offered_rps(self, files: Files) -> float:
        traffic, own = self._own(files)
        return len(own) / traffic.recording.period_s

    def stream(
        self,
        rng: np.random.Generator,
        *,
        duration_s: float,
        load: float,
        split: Split,
        block_tokens: int,
        files: Files,
    ) -> Stream:
        traffic, own = self._own(files)
        low, high = traffic.span_s(split, self.train_share)
        length, part = duration_s * load, high - low
        if abs(length - part) <= 1e-9 * part:
            length = part  # exactly: it starts where the part does
        rows, lap, since_s = window(rng, traffic.time_s[own], low, high, length)
        arrival_s = np.minimum(since_s / load, np.nextafter(duration_s, 0))
        recording, chosen = traffic.recording, own[rows]
        table, output = traffic.table[chosen], traffic.output_tokens[chosen]
        count, blocks = _blocks(traffic, own, rows, lap, block_tokens)
        tags = Tags(
            table["priority"].astype(np.int64),
            table["model"].astype(np.int64),
            table["regions"],
            traffic.cancel_s[chosen],
            recording.models,
            recording.zones,
        )
        prompt = np.maximum(table["prompt_tokens"].astype(np.int64), 1)
        limit = np.maximum(table["max_tokens"].astype(np.int64), output)
        return Stream(arrival_s, prompt, output, limit, count, count, blocks, tags)


def _blocks(
    traffic: Traffic, own: np.ndarray, rows: np.ndarray, lap: np.ndarray, block_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The full prompt blocks of `own[rows]`: counts (n,), and identities joined.

    A gateway may know the length of its blocks only roughly, and ever better: one length, the tenant's median, is taken
    for all, so that who shared keys shares blocks. A block is known by the key that covers its end; what no key covers
    is a prompt's own. A lap is a text of its own.
    """
    table = traffic.table[own]
    hashed = table["keys"] > 0
    key_tokens = float(np.median(table["block_tokens"][hashed])) if hashed.any() else float(block_tokens)
    prompt = np.maximum(table["prompt_tokens"].astype(np.int64), 1)
    counts = prompt // block_tokens
    known = np.minimum(counts, (table["keys"] * key_tokens / block_tokens + 1e-9).astype(np.int64))
    per_key = int(np.ceil(key_tokens / block_tokens)) + 1  # blocks that may end in one key
    first_own = (int(traffic.places.max()) + 1 if len(traffic.places) else 0) * per_key
    start = np.cumsum(counts) - counts
    total = first_own + int(counts.sum())

    count = counts[rows]
    owner = np.repeat(rows, count)
    j = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    key = np.ceil((j + 1) * block_tokens / key_tokens - 1e-9).astype(np.int64) - 1
    covered = j < known[owner]
    place = traffic.key_start[own][owner] + np.where(covered, key, 0)
    known_as = traffic.places if len(traffic.places) else np.zeros(1, np.uint32)
    shared = known_as[np.where(covered, place, 0)].astype(np.int64)
    blocks = np.where(covered, shared * per_key + j % per_key, first_own + start[owner] + j)
    return count, blocks + np.repeat(lap, count) * total


SOURCE = Journal
