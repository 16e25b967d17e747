"""Where two policies part, and what it gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steersman.runtime.outcomes import Episode
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.simulator.rollout import Rollouts
from steersman.training.explain.situations import Kind, Situation, kind_of
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
    runtime: SimulatedRuntime,
    episodes: Sequence[Requests],
    situations: Sequence[Situation],
    parted: dict[str, list[Situation]],
    each: int,
) -> dict[str, Gain]:
    """Roll out up to `each` decisions of every kind, spread over them: both actions, frozen later routes.

    Where one of the two holds, that is the baseline whose later routes are kept.
    """
    chosen = {kind: [own[i] for i in _spread(len(own), each)] for kind, own in parted.items()}
    wanted = {(s.episode, s.number): kind for kind, own in chosen.items() for s in own}
    results: dict[str, list[tuple[float, float]]] = {kind: [] for kind in parted}
    for index, requests in enumerate(episodes):
        played = [s for s in situations if s.episode == index]
        if not any((index, s.number) in wanted for s in played):
            continue
        runtime.reset(requests)
        runtime.advance()
        rollouts = Rollouts(runtime, policy, ARRIVALS)
        for s in played:
            kind = wanted.get((index, s.number))
            if kind is not None:
                results[kind].append(_gain(rollouts, runtime, s))
            runtime.step(s.action)
    figures = {}
    for kind, pairs in results.items():
        both = np.array(pairs).reshape(-1, 2)
        if len(both):
            interval = _ratio_interval(both[:, 0], np.ones(len(both)))
            figures[kind] = Gain(len(both), interval, float(both[:, 1].mean()))
    return figures


def _gain(rollouts: Rollouts, runtime: SimulatedRuntime, s: Situation) -> tuple[float, float]:
    """Requests that attain more, and whether the decided one does, under the policy's action than under the other's."""
    memory = np.tile(s.memory, (runtime.fleet.gateways, 1))
    baseline = s.other if s.other == runtime.hold else s.action
    rolled = rollouts.frozen(baseline, memory, [s.action, s.other])
    by_action = {
        int(action): outcome["attained"] for action, outcome in zip(rolled.actions, rolled.outcomes, strict=True)
    }
    ours, theirs = by_action[s.action].astype(int), by_action[s.other].astype(int)
    return float((ours - theirs).sum()), float(ours[rolled.decided] - theirs[rolled.decided])


def _spread(count: int, at_most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).astype(int)) if count else np.zeros(0, int)


def _ratio_interval(values: np.ndarray, weights: np.ndarray) -> Interval:
    """Σ values / Σ weights, and its interval over resampled entries."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    ratios = values[drawn].sum(axis=1) / np.maximum(1e-9, weights[drawn].sum(axis=1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(values.sum() / weights.sum()), float(low), float(high))
