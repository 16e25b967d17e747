"""What a scenario came to: the numbers of every report, from the table of counts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from steersman.training.benchmark.capacity import (
    Interval,
    capacities,
    crossings,
    interval,
    margins,
    member_weights,
    resampled,
)
from steersman.training.benchmark.contenders import Contender
from steersman.training.benchmark.counts import METRICS, Cell, Latency, Load, curve, jain, shares
from steersman.training.benchmark.scenario import Scenario
from steersman.training.paired import ratio


class Measured(NamedTuple):
    """One policy in one scenario. From `attainment` on at the headline load; of several members, their means."""

    name: str
    kind: str
    form: str
    evaluations: int
    capacity_rps: Interval
    members_rps: list[float]  # the capacity of each training seed
    goodput_rps: dict[float, Interval]  # by load, times the best heuristic's capacity
    attainment: float  # over all requests
    tenants: dict[str, float]  # attainment of each that sent requests
    latency: dict[str, Latency]  # by metric; means over the training seeds
    shed: float  # share of the requests
    fairness: float  # Jain's index
    of_ceiling: float  # tokens per second over the fleet's ceiling
    cost_per_1000_good: float | None  # None: nothing was good

    @property
    def worst(self) -> tuple[str, float]:
        """The tenant of the lowest attainment, and that."""
        name = min(self.tenants, key=lambda tenant: self.tenants[tenant])
        return name, self.tenants[name]


class Pair(NamedTuple):
    """One policy against another, on the same episodes."""

    policy: str
    against: str
    capacity: Interval  # ratio
    goodput: dict[float, Interval]  # ratio, by load
    worst: Interval  # difference of the worst tenants' attainment at the headline load


class Figures(NamedTuple):
    """One scenario."""

    scenario: Scenario
    policies: list[Measured]  # highest capacity first
    pairs: list[Pair]
    best_default: str  # the heuristic as shipped of the highest capacity here
    best_tuned: str  # the tuned one; where there is none, the best as shipped
    reference_rps: float  # what the load 1 of goodput and headline is
    lowest_rps: float  # the lowest offered rate played: a capacity of 0 is one below it
    highest_rps: dict[
        str, float
    ]  # and the highest at which each policy played: a capacity that is equal to it is one above
    curves: dict[str, list[tuple[float, float, float]]]  # policy: offered, goodput req/s, worst tenant's attainment
    arrivals: list[tuple[float, float]]  # offered, and what arrived in the episodes drawn, req/s

    def measured(self, name: str) -> Measured:
        return next(policy for policy in self.policies if policy.name == name)


class Sample(NamedTuple):
    """What a scenario's figures are computed from."""

    scenario: Scenario
    tenants: list[str]
    offered_rps: float  # at load 1
    price_per_hour: float
    ceiling_tokens_per_s: float
    loads: list[Load]  # where capacity was looked for
    goodput: dict[float, Load]  # by load, times the best heuristic's capacity


def seed_of(scenario: Scenario) -> int:
    """Of the bootstrap."""
    return zlib.crc32(scenario.name.encode())


def best_capacity(loads: Sequence[Load], contenders: Sequence[Contender]) -> float:
    """The highest capacity of a heuristic, shipped or tuned, times the workload's rate; 0 where none has any."""
    return max(point_capacity(loads, c) for c in contenders if c.form in ("shipped", "tuned"))


def point_capacity(loads: Sequence[Load], contender: Contender) -> float:
    """Its capacity without an interval, times the workload's rate."""
    ones = np.ones((1, len(loads[0].arrived)))
    curves = [curve(loads, member.name) for member in contender.members]
    return float(np.mean([crossings(c.loads, margins(c, ones))[0] for c in curves]))


def figures(sample: Sample, contenders: Sequence[Contender]) -> Figures:
    """All of a scenario's figures."""
    seed = seed_of(sample.scenario)
    weights = resampled(len(sample.loads[0].arrived), seed)
    found = {c.name: _capacity(sample, c, weights, seed) for c in contenders}
    measured = [_measured(sample, c, found[c.name], weights, seed) for c in contenders]
    best_default = max((c for c in contenders if c.form == "shipped"), key=lambda c: found[c.name][0]).name
    tuned = [c for c in contenders if c.form == "tuned"]
    best_tuned = max(tuned, key=lambda c: found[c.name][0]).name if tuned else best_default
    named = {c.name: c for c in contenders}
    rivals = dict.fromkeys((best_tuned, best_default))
    first = [c.name for c in contenders if c.form == "given"][:1]
    pairs = [
        _pair(sample, one, named[rival], found, weights, seed)
        for one in contenders
        for rival in [*rivals, *(first if one.form == "given" else [])]
        if one.name != rival and (one.form in ("trained", "given") or one.name == best_tuned)
    ]
    reference = next(load.load / factor for factor, load in sample.goodput.items())
    return Figures(
        sample.scenario,
        sorted(measured, key=lambda m: -m.capacity_rps.value),
        pairs,
        best_default,
        best_tuned,
        reference * sample.offered_rps,
        sample.loads[0].load * sample.offered_rps,
        {c.name: _highest(sample, c) * sample.offered_rps for c in contenders},
        {c.name: _points(sample, c) for c in contenders},
        [(load.load * sample.offered_rps, _arrived_rps(load)) for load in _rising(sample)],
    )


def _capacity(sample: Sample, contender: Contender, weights: np.ndarray, seed: int) -> np.ndarray:
    curves = [curve(sample.loads, member.name) for member in contender.members]
    return capacities(curves, weights, seed) * sample.offered_rps


def _measured(sample: Sample, contender: Contender, capacity: np.ndarray, weights: np.ndarray, seed: int) -> Measured:
    load = sample.goodput[sample.scenario.headline]
    cells = [load.cells[member.name] for member in contender.members]
    attained = np.mean([cell.attained.sum(0) for cell in cells], axis=0)
    arrived, seconds = load.arrived.sum(0), load.duration_s * len(load.arrived)
    good = float(attained.sum())
    return Measured(
        contender.name,
        contender.kind,
        contender.form,
        contender.evaluations,
        interval(capacity),
        [
            point_capacity(sample.loads, contender._replace(members=(m,))) * sample.offered_rps
            for m in contender.members
        ],
        {factor: interval(_goodput(at, contender, weights, seed)) for factor, at in sample.goodput.items()},
        good / max(1.0, float(arrived.sum())),
        _by_name(sample.tenants, attained, arrived),
        {metric: _latency(cells, metric) for metric in METRICS},
        float(np.mean([cell.shed.sum() for cell in cells])) / max(1.0, float(arrived.sum())),
        float(np.mean([jain(cell.served.sum(0), load.demanded.sum(0)) for cell in cells])),
        float(np.mean([cell.computed.sum() for cell in cells])) / seconds / sample.ceiling_tokens_per_s,
        sample.price_per_hour * seconds / 3600 / good * 1000 if good else None,
    )


def _pair(
    sample: Sample,
    one: Contender,
    rival: Contender,
    found: Mapping[str, np.ndarray],
    weights: np.ndarray,
    seed: int,
) -> Pair:
    headline = sample.goodput[sample.scenario.headline]
    return Pair(
        one.name,
        rival.name,
        interval(ratio(found[one.name], found[rival.name])),
        {
            factor: interval(ratio(_goodput(load, one, weights, seed), _goodput(load, rival, weights, seed)))
            for factor, load in sample.goodput.items()
        },
        interval(_worst(headline, one, weights, seed) - _worst(headline, rival, weights, seed)),
    )


def _goodput(load: Load, contender: Contender, weights: np.ndarray, seed: int) -> np.ndarray:
    """Good requests per second for each row of weights, (R,)."""
    each = np.array([weights @ load.cells[m.name].attained.sum(1) for m in contender.members])
    mixed = (each * member_weights(len(each), len(weights), seed)).sum(0)
    return np.asarray(mixed / (load.duration_s * weights.shape[1]))


def _worst(load: Load, contender: Contender, weights: np.ndarray, seed: int) -> np.ndarray:
    """The worst tenant's attainment for each row of weights, (R,)."""
    arrived = weights @ load.arrived
    each = np.array([shares(weights @ load.cells[m.name].attained, arrived).min(1) for m in contender.members])
    return np.asarray((each * member_weights(len(each), len(weights), seed)).sum(0))


def _by_name(tenants: Sequence[str], attained: np.ndarray, arrived: np.ndarray) -> dict[str, float]:
    return {
        name: float(good / count) for name, good, count in zip(tenants, attained, arrived, strict=True) if count > 0
    }


def _latency(cells: Sequence[Cell], metric: str) -> Latency:
    return Latency(*(float(figure) for figure in np.mean([cell.latency[metric] for cell in cells], axis=0)))


def _highest(sample: Sample, contender: Contender) -> float:
    return max(load.load for load in sample.loads if contender.members[0].name in load.cells)


def _rising(sample: Sample) -> list[Load]:
    """Every load played, rising."""
    return sorted([*sample.loads, *sample.goodput.values()], key=lambda load: load.load)


def _arrived_rps(load: Load) -> float:
    return float(load.arrived.sum() / (load.duration_s * len(load.arrived)))


def _points(sample: Sample, contender: Contender) -> list[tuple[float, float, float]]:
    """(offered, goodput, worst tenant's attainment) at every load played, means over members, rising."""
    ones = np.ones((1, len(sample.loads[0].arrived)))
    points = []
    for load in _rising(sample):
        if contender.members[0].name in load.cells:
            good, worst = _goodput(load, contender, ones, 0)[0], _worst(load, contender, ones, 0)[0]
            points.append((load.load * sample.offered_rps, float(good), float(worst)))
    return points
