"""The decisions of an episode, with what another policy would have decided on each."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, CompiledPolicy, pick
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime

NEXT_TO_NOTHING = 1e-6  # of the typical lead: less is a tie
IS_REPLICA = COLUMN["is_replica"]


class Kind(StrEnum):
    """What was done with a request."""

    SENT = "sent"
    HELD = "held"
    SHED = "shed"


class Situation(NamedTuple):
    """A decision on C candidates: replicas, padding, hold and shed."""

    episode: int
    number: int  # of the decision in its episode
    time_s: float
    request: int  # which of the episode's
    tenant: int
    rows: np.ndarray  # float32 (C, WIDTH)
    mask: np.ndarray  # bool (C,)
    memory: np.ndarray  # float64 (M,): the policy's before it decided
    scores: np.ndarray  # float64 (C,)
    action: int
    other: int  # what the other policy would have done

    @property
    def kind(self) -> Kind:
        return kind_of(self.action, len(self.mask))

    @property
    def runner_up(self) -> int:
        """The best allowed candidate but for the chosen one, or −1: there is none that the policy would ever take."""
        return runner_up(self.scores, self.mask, self.action)

    @property
    def lead(self) -> float:
        """By how much the chosen candidate leads; infinite without a runner-up."""
        second = self.runner_up
        return float(self.scores[self.action] - self.scores[second]) if second >= 0 else np.inf


def kind_of(action: int, candidates: int) -> Kind:
    """What an action is where there are so many candidates."""
    return {candidates - 2: Kind.HELD, candidates - 1: Kind.SHED}.get(action, Kind.SENT)


def runner_up(scores: np.ndarray, mask: np.ndarray, action: int) -> int:
    """See `Situation.runner_up`."""
    open_ = np.where(mask & (scores > 0.5 * NEVER), scores, -np.inf)
    open_[action] = -np.inf
    best = int(open_.argmax())
    return best if np.isfinite(open_[best]) else -1


def scores_of(policy: CompiledPolicy, situation: Situation, rows: np.ndarray) -> np.ndarray:
    """What `policy` would have scored (C,) if it had seen `rows` in that situation; chance falls as it fell."""
    scores = np.empty(len(rows))
    policy.function(rows, situation.mask, policy.values, situation.memory.copy(), scores)
    return scores


def choice_of(policy: CompiledPolicy, situation: Situation, rows: np.ndarray) -> int:
    """What it would have chosen."""
    return int(pick(scores_of(policy, situation, rows), situation.mask))


def play(
    policy: CompiledPolicy, other: CompiledPolicy, runtime: SimulatedRuntime, episodes: Sequence[Requests], seed: int
) -> list[Situation]:
    """Every decision of `policy` over `episodes`; `other` looks on."""
    seen = []
    for index, requests in enumerate(episodes):
        bound, looking_on = policy.bind(seed + index), other.bind(seed + index)
        runtime.reset(requests)
        due, number = runtime.advance(), 0
        while due:
            memory, mask = bound.memory.copy(), runtime.mask
            scores = bound.score(runtime.rows, mask)
            action = int(pick(scores, mask))
            would = int(pick(looking_on.score(runtime.rows, mask), mask))
            request = int(runtime.view("cluster")["pending"][0])
            tenant = int(requests.table["tenant"][request])
            arrays = (runtime.rows.copy(), mask.copy(), memory, scores)
            seen.append(Situation(index, number, runtime.now, request, tenant, *arrays, action, would))
            due, number = runtime.step(action), number + 1
    return seen


class Shares(NamedTuple):
    """What became of requests, as shares of them; who was held was then sent or shed."""

    requests: int
    sent: float
    shed: float
    held: float  # at least once
    held_s: float  # mean seconds from the first decision to the last, of those held


def shares_of(situations: Sequence[Situation]) -> Shares:
    """What was decided on the requests of these situations, in the end and on the way."""
    first: dict[tuple[int, int], Situation] = {}
    last: dict[tuple[int, int], Situation] = {}
    for s in situations:
        first.setdefault((s.episode, s.request), s)
        last[s.episode, s.request] = s
    held = [key for key, s in first.items() if s.kind is Kind.HELD]
    count = max(1, len(first))
    waits = [last[key].time_s - first[key].time_s for key in held]
    sent, shed = (sum(s.kind is kind for s in last.values()) / count for kind in (Kind.SENT, Kind.SHED))
    return Shares(len(first), sent, shed, len(held) / count, float(np.mean(waits)) if waits else 0.0)


def close(situations: Sequence[Situation]) -> list[Situation]:
    """Decisions between replicas with little lead, the least first: the least tenth, but no ties."""
    sent = [s for s in situations if s.kind is Kind.SENT and s.runner_up >= 0 and s.rows[s.runner_up, IS_REPLICA] > 0]
    if not sent:
        return []
    leads = np.array([s.lead for s in sent])
    least, most = NEXT_TO_NOTHING * float(np.median(leads)), float(np.quantile(leads, 0.1))
    return [sent[i] for i in np.argsort(leads, kind="stable") if least < leads[i] <= most]


def of_kind(situations: Sequence[Situation], kind: Kind, count: int) -> list[Situation]:
    """First decisions of a kind on a request, spread over tenants and time."""
    first: dict[tuple[int, int], Situation] = {}
    for s in situations:
        if s.kind is kind and s.runner_up >= 0:
            first.setdefault((s.episode, s.request), s)
    by_tenant: dict[int, list[Situation]] = {}
    for s in first.values():
        by_tenant.setdefault(s.tenant, []).append(s)
    each = max(1, count // max(1, len(by_tenant)))
    places = ((own, np.linspace(0, len(own) - 1, min(each, len(own))).astype(int)) for own in by_tenant.values())
    picked = [own[i] for own, indices in places for i in indices]
    return sorted(picked[:count], key=lambda s: (s.episode, s.number))
