"""How the benchmark's numbers read, in every report."""

from __future__ import annotations

from steersman.training.benchmark.capacity import Interval
from steersman.training.benchmark.figures import Figures, Measured, Pair


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(interval: Interval) -> str:
    return f"{number(interval.value)} [{number(interval.low)}, {number(interval.high)}]"


def capacity(found: Figures, policy: Measured) -> str:
    """Requests per second with their interval; what lies outside the rates played is said to."""
    value = policy.capacity_rps.value
    if value == 0:
        high = policy.capacity_rps.high
        return f"< {number(found.lowest_rps)}" + (f" [–, {number(high)}]" if high else "")
    mark = "≥ " if value >= found.highest_rps[policy.name] else ""
    return mark + spread(policy.capacity_rps)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def change(interval: Interval) -> str:
    """A ratio as a change in percent."""
    parts = [f"{100 * (value - 1):+.1f}" for value in interval]
    return f"{parts[0]} % [{parts[1]}, {parts[2]}]"


def clear(interval: Interval, even: float = 1.0) -> int:
    """1: above `even` beyond doubt; −1: below; 0: neither."""
    return 1 if interval.low > even else -1 if interval.high < even else 0


def verdict(found: Figures, pair: Pair) -> str:
    """A paired comparison in one sentence."""
    of = pair.capacity
    if of.value == float("inf"):
        sentence = f"{pair.policy} has a capacity, {pair.against} has none"
    elif clear(of):
        low, high = sorted(100 * abs(end - 1) for end in of[1:])
        more = "more" if of.low > 1 else "less"
        amount = f"{100 * abs(of.value - 1):.1f} % [{low:.1f}, {high:.1f}]"
        sentence = f"{pair.policy} carries {amount} {more} than {pair.against}"
    else:
        sentence = f"{pair.policy} and {pair.against} differ in capacity by {change(of)}, which may be chance"
    if found.scenario.headline > 1:
        factor = found.scenario.headline
        sentence += f"; goodput at {factor:g} times the capacity {change(pair.goodput[factor])}"
    if clear(pair.worst, 0.0) < 0:
        sentence += f"; its worst tenant is {100 * -pair.worst.value:.1f} points worse off"
    return sentence + "."


def training_seeds(found: Figures) -> str:
    """What each training seed came to; empty where nothing was learned."""
    learned = next((policy for policy in found.policies if policy.form == "trained"), None)
    if learned is None:
        return ""
    return f"Capacity of each training seed: {', '.join(number(rps) for rps in learned.members_rps)} req/s."


def parity(found: Figures) -> str:
    """How many policies there is nothing to choose between at a light headline load."""
    alike = sum(policy.worst[1] >= 0.99 for policy in found.policies)
    return (
        f"At {found.scenario.headline:g} times the best heuristic's capacity, {alike} of {len(found.policies)} "
        "policies serve 99 % of every tenant's requests within the SLOs."
    )
