"""Journals for tests: a real scheduler, a clock by hand, and requests that end as they are told to."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from simulated import FASTEST, TENANTS, fleet

from steersman.runtime.fleet import Fleet
from steersman.runtime.journal import Ending, Journal, JournalConfig
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Decision, Kind, LiveRequest, Ticket

BLOCK = 64
FLEET = fleet({}, {"profile": "llama-3.1-8b-l40s-bf16"})


class Clock:
    """Time by hand."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Asked:
    """A request of a test."""

    at_s: float
    request: LiveRequest
    output: int = 20
    ending: Ending = Ending.DONE
    down: tuple[int, ...] = ()  # replicas that are down when it comes


@dataclass
class Seen:
    """What a test saw of each decision, in order."""

    rows: list[bytes] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    scheduler: Any = None


def prompt(tenant: int = 0, tokens: int = 640, group: int = 0, shared: int = 4, **tags: Any) -> LiveRequest:
    """A prompt whose first `shared` blocks are those of its group; other keys are its own."""
    count = tokens // BLOCK
    own = np.random.default_rng(abs(hash((tenant, tokens, group, shared)))).integers(1 << 62, size=count)
    keys = np.where(np.arange(count) < shared, (np.arange(count) + 1000 * (group + 1)) * 7_919_777, own)
    return LiveRequest(tenant, tokens, 100, keys.astype(np.int64), **{"block_tokens": BLOCK, **tags})


def mixed(count: int = 60, gap_s: float = 0.2, seed: int = 0) -> list[Asked]:
    """Requests of both tenants, most of which end well."""
    rng = np.random.default_rng(seed)
    endings = [Ending.DONE] * 6 + [Ending.CANCELLED, Ending.FAILED]
    return [
        Asked(
            i * gap_s,
            prompt(int(rng.integers(2)), int(rng.integers(200, 1500)), int(rng.integers(3))),
            int(rng.integers(5, 60)),
            endings[int(rng.integers(len(endings)))] if i % 4 else Ending.DONE,
        )
        for i in range(count)
    ]


def play(
    journal: Journal,
    asked: list[Asked],
    policy: CompiledPolicy = FASTEST,
    on: Fleet = FLEET,
    candidates: int | None = None,
) -> Seen:
    """Have `asked` decided, served and journalled. Replicas answer as predicted."""
    clock = Clock()
    s = Scheduler(
        on, TENANTS, policy.bind(), FASTEST.bind(), clock=clock, policy_limit_s=math.inf, candidates=candidates
    )
    seen, order = Seen(scheduler=s), 0
    events: list[tuple[float, int, Any, Asked | None]] = []
    for one in asked:
        heapq.heappush(events, (one.at_s, order, None, one))
        order += 1
    while events:
        at_s, _, what, one = heapq.heappop(events)
        clock.now = max(clock.now, at_s)
        if one is None:
            what()
            continue
        if what is None:
            ticket = s.arrive(one.request)
        else:
            ticket = what
            s.resumed(ticket)
        for r in range(len(s.replicas)):
            s.set_up(r, r not in one.down)
        decision = s.decide(ticket)
        journal.decided(s, ticket, decision)
        seen.rows.append(s.rows.tobytes())
        seen.masks.append(s.mask.tobytes())
        seen.decisions.append(decision)
        order += 1
        if decision.kind is Kind.HOLD:
            heapq.heappush(events, (clock.now + s.held(ticket), order, ticket, one))
        elif decision.kind is Kind.DISPATCH:
            s.dispatched(ticket, decision.replica)
            first_s = clock.now + ticket.predicted_ttft_s
            heapq.heappush(events, (first_s, order, lambda t=ticket: s.first_token(t), None))
            order += 1
            end = lambda t=ticket, o=one: _end(journal, s, t, o)  # noqa: E731
            heapq.heappush(events, (first_s + 0.02 * one.output, order, end, None))
        else:
            s.shed(ticket)
            journal.over(ticket, decision.kind)
    return seen


def _end(journal: Journal, s: Scheduler, ticket: Ticket, one: Asked) -> None:
    if one.ending is Ending.UNENDED:
        return
    tokens = one.output if one.ending is Ending.DONE else one.output // 2
    s.streamed(ticket, tokens - 1)
    ok, left = one.ending is Ending.DONE, one.ending is Ending.CANCELLED
    journal.over(ticket, one.ending, s.ended(ticket, ok, tokens, left=left))


def record(folder: Path, asked: list[Asked], on: Fleet = FLEET, **options: Any) -> Seen:
    """A folder with a journal of `asked`."""
    played = {key: options.pop(key) for key in ("policy", "candidates") if key in options}
    journal = Journal(JournalConfig(folder=folder, **options), on, TENANTS)
    seen = play(journal, asked, on=on, **played)
    journal.close()
    assert (journal.dropped, journal.failures) == (0, 0), journal.last_error
    assert journal.written == len(seen.decisions)
    return seen
