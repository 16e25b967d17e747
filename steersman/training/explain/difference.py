"""Where two policies part, and what it gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steersman.runtime.outcomes import Episode
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator.rollout import Rollouts
from steersman.training.explain.situations import Kind, Situation, kind_of
from steersman.training.objective import Arena
from steersman.training.paired import RESAMPLES

ARRIVALS = 1024  # that a roll-out still sees: more than come while a request is held


class Interval(NamedTuple):
    """A mean and its 95 % interval (percentile bootstrap)."""

    mean: float
    low: float
    high: float


class Attainment(NamedTuple):
    """Shares of requests that met both SLOs, of the same episodes under two policies."""

    policy: float
    against: float
    difference: Interval


class Gain(NamedTuple):
    """What decisions of one kind gained over what the other policy would have done."""

    rolled: int  # decisions that were rolled out
    attained: Interval  # more requests within their SLOs, for each such decision
    own: float  # of these, the decided request itself; the rest is what it does to others


def parting(situation: Situation) -> str | None:
    """How the two policies differ on a situation; None: they agree."""
    if situation.action == situation.other:
        return None
    ours, theirs = situation.kind, kind_of(situation.other, len(situation.mask))
    if ours is Kind.SENT:
        return "other replica" if theirs is Kind.SENT else "served"
    return "held" if ours is Kind.HELD else "shed"


def partings(situations: Sequence[Situation]) -> dict[str, list[Situation]]:
    """Of every request the first decision that differs, by how, the most frequent kind first."""
    kinds: dict[str, list[Situation]] = {}
    met = set()
    for s in situations:
        kind = parting(s)
        if kind is not None and (s.episode, s.request) not in met:
            met.add((s.episode, s.request))
            kinds.setdefault(kind, []).append(s)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def attainments(ours: Sequence[Episode], theirs: Sequence[Episode]) -> dict[str, Attainment]:
    """By tenant and of `all requests`, paired over episodes: the same requests in the same order."""
    names = list(ours[0].requests.tenants)
    figures = {}
    for index, name in enumerate([*names, "all requests"]):
        own = [e.requests.table["tenant"] == index if index < len(names) else slice(None) for e in ours]
        good, other = (
            np.array([e.outcomes.attained[o].sum() for e, o in zip(played, own, strict=True)], float)
            for played in (ours, theirs)
        )
        count = np.array([len(e.outcomes.attained[o]) for e, o in zip(ours, own, strict=True)], float)
        if count.sum():
            difference = _ratio_interval(good - other, count)
            figures[name] = Attainment(good.sum() / count.sum(), other.sum() / count.sum(), difference)
    return figures


def gains(
    policy: CompiledPolicy,
    arena: Arena,
    episodes: Sequence[Requests],
    situations: Sequence[Situation],
    parted: dict[str, list[Situation]],
    each: int,
) -> dict[str, Gain]:
    """Roll out up to `each` decisions of every kind, spread over them: both actions, frozen later routes.

    Where one of the two holds, that is the baseline whose later routes are kept.
    """
    taken = [np.array([s.action for s in situations if s.episode == index]) for index in range(len(episodes))]
    chosen = {kind: [own[i] for i in _spread(len(own), each)] for kind, own in parted.items()}
    jobs = [
        (policy, episodes[s.episode], Branch(taken[s.episode][: s.number], s.memory, s.action, s.other))
        for own in chosen.values()
        for s in own
    ]
    pairs = iter(arena.each(rolled_out, jobs))
    figures = {}
    for kind, own in chosen.items():
        both = np.array([next(pairs) for _ in own]).reshape(-1, 2)
        if len(both):
            interval = _ratio_interval(both[:, 0], np.ones(len(both)))
            figures[kind] = Gain(len(both), interval, float(both[:, 1].mean()))
    return figures


class Branch(NamedTuple):
    """A decision on which two policies differ."""

    before: np.ndarray  # int64 (D,): the actions of the episode's earlier decisions
    memory: np.ndarray  # float64 (M,): the policy's before it decided
    action: int
    other: int  # of the other policy


def rolled_out(arena: Arena, policy: CompiledPolicy, requests: Requests, branch: Branch) -> tuple[float, float]:
    """Requests that attain more, and whether the decided one does, under the policy's action than under the other's.

    A task of `Arena.each`.
    """
    runtime = arena.runtime(requests)
    runtime.replay(branch.before)
    runtime.advance()
    memory = np.tile(branch.memory, (runtime.fleet.gateways, 1))
    baseline = branch.other if branch.other == runtime.hold else branch.action
    rolled = Rollouts(runtime, policy, ARRIVALS).frozen(baseline, memory, [branch.action, branch.other])
    by_action = {
        int(action): outcome["attained"] for action, outcome in zip(rolled.actions, rolled.outcomes, strict=True)
    }
    ours, theirs = by_action[branch.action].astype(int), by_action[branch.other].astype(int)
    return float((ours - theirs).sum()), float(ours[rolled.decided] - theirs[rolled.decided])


def _spread(count: int, at_most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).astype(int)) if count else np.zeros(0, int)


def _ratio_interval(values: np.ndarray, weights: np.ndarray) -> Interval:
    """Σ values / Σ weights, and its interval over resampled entries."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    ratios = values[drawn].sum(axis=1) / np.maximum(1e-9, weights[drawn].sum(axis=1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(values.sum() / weights.sum()), float(low), float(high))
