"""How far simulated episodes are from real ones, and whether both put policies in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from steersman.runtime.outcomes import Episode, State

RESAMPLES = 1000
LATENCIES = ("ttft", "tpot", "e2e")
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(values.mean()),
    "p50": lambda values: float(np.percentile(values, 50)),
    "p90": lambda values: float(np.percentile(values, 90)),
    "p99": lambda values: float(np.percentile(values, 99)),
}


class Played(NamedTuple):
    """One episode, thrice."""

    load: float
    policy: str
    real: Episode
    replayed: Episode  # in the simulator, with the routes of the real one
    simulated: Episode  # in the simulator, the policy deciding for itself


class Measure(NamedTuple):
    """One figure, real and simulated; `error` = simulated/real − 1 with its 95 % interval."""

    real: float
    simulated: float
    error: float
    low: float
    high: float


class Rank(NamedTuple):
    """The order of the policies by one figure at one load."""

    load: float
    by: str
    real: dict[str, float]  # by policy
    simulated: dict[str, float]
    tau: float
    disagree: list[tuple[str, str]]  # pairs of policies in the other order


def measures(played: Sequence[Played], max_num_seqs: np.ndarray, seed: int = 0) -> dict[str, Measure]:
    """The figures of some episodes, as replayed against real; latencies of the requests that ended in both.

    Intervals: percentile bootstrap over requests for latencies, over episodes for the rest; a request (episode) is
    drawn for both sides at once.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Measure] = {}
    both = [(p.real.outcomes.state == State.DONE) & (p.replayed.outcomes.state == State.DONE) for p in played]
    for name in LATENCIES:
        real, simulated = (
            np.concatenate(
                [getattr(getattr(p, side).outcomes, f"{name}_s")[b] for p, b in zip(played, both, strict=True)]
            )
            for side in ("real", "replayed")
        )
        if name == "tpot":  # an answer of one token has none
            some = (real > 0) & (simulated > 0)
            real, simulated = real[some], simulated[some]
        if len(real):
            for statistic, function in STATISTICS.items():
                found[f"{name}_{statistic}"] = _measure(real, simulated, function, rng)
    of_episodes: dict[str, Callable[[Episode], float]] = {
        "throughput": throughput,
        "occupancy": lambda episode: occupancy(episode, max_num_seqs),
        "prefix_hit": prefix_hit,
    }
    for name, of_episode in of_episodes.items():
        real = np.array([of_episode(p.real) for p in played])
        simulated = np.array([of_episode(p.replayed) for p in played])
        found[name] = _measure(real, simulated, STATISTICS["mean"], rng)
    return found


def _measure(
    real: np.ndarray, simulated: np.ndarray, function: Callable[[np.ndarray], float], rng: np.random.Generator
) -> Measure:
    a, b = function(real), function(simulated)
    drawn = rng.integers(0, len(real), (RESAMPLES, len(real)))
    errors = [_off(function(real[d]), function(simulated[d])) for d in drawn]
    low, high = np.percentile(errors, [2.5, 97.5])
    return Measure(a, b, _off(a, b), float(low), float(high))


def _off(real: float, simulated: float) -> float:
    return simulated / real - 1 if real > 0 else 0.0


def throughput(episode: Episode) -> float:
    """Output tokens per second of the requests that ended within the arrival window."""
    table, outcomes = episode.requests.table, episode.outcomes
    ended = table["arrival_s"] + outcomes.e2e_s <= episode.duration_s
    return float(table["output_tokens"][ended].sum() / episode.duration_s)


def occupancy(episode: Episode, max_num_seqs: np.ndarray) -> float:
    """Requests on a replica, at most its batch limit, over the limit: the mean over the arrival window and replicas."""
    table, outcomes = episode.requests.table, episode.outcomes
    total = 0.0
    for replica, limit in enumerate(max_num_seqs):
        own = (outcomes.replica == replica) & np.isfinite(outcomes.e2e_s)
        begin = table["arrival_s"][own]
        times = np.concatenate([begin, begin + outcomes.e2e_s[own]])
        change = np.repeat([1, -1], own.sum())
        order = np.argsort(times, kind="stable")
        edges = np.minimum(np.append(times[order], np.inf), episode.duration_s)
        held = np.minimum(np.cumsum(change[order]), limit)
        total += float((held * np.diff(edges)).sum() / limit)
    return total / episode.duration_s / len(max_num_seqs)


def prefix_hit(episode: Episode) -> float:
    """Prompt tokens that were cached, as a share of those of the requests that ended well; 0 if engines do not tell."""
    done = episode.outcomes.state == State.DONE
    prompts = int(episode.requests.table["prompt_tokens"][done].sum())
    return float(episode.outcomes.cached_tokens[done].sum() / max(1, prompts))


def mean_ttft(episode: Episode) -> float:
    done = episode.outcomes.state == State.DONE
    return float(episode.outcomes.ttft_s[done].mean()) if done.any() else float("inf")


def goodput(episode: Episode) -> float:
    return float(episode.outcomes.attained.sum() / episode.duration_s)


def ranks(played: Sequence[Played]) -> list[Rank]:
    """At each load, the policies by mean TTFT and by goodput; means over a policy's episodes."""
    found = []
    for load in dict.fromkeys(p.load for p in played):
        here = [p for p in played if p.load == load]
        for by, function in (("ttft_mean", mean_ttft), ("goodput", goodput)):
            real, simulated = (
                {
                    policy: float(np.mean([function(getattr(p, side)) for p in here if p.policy == policy]))
                    for policy in dict.fromkeys(p.policy for p in here)
                }
                for side in ("real", "simulated")
            )
            found.append(Rank(load, by, real, simulated, *kendall(real, simulated)))
    return found


def kendall(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, list[tuple[str, str]]]:
    """Kendall's tau-b of two figures of the same policies, and the pairs that they order differently.

    NaN for fewer than two policies, or where one side ties them all.
    """
    score, untied_a, untied_b = 0, 0, 0
    disagree = []
    for x, y in combinations(a, 2):
        sign_a, sign_b = (int(v[x] > v[y]) - int(v[x] < v[y]) for v in (a, b))
        score += sign_a * sign_b
        untied_a, untied_b = untied_a + abs(sign_a), untied_b + abs(sign_b)
        if sign_a * sign_b < 0:
            disagree.append((x, y))
    scale = (untied_a * untied_b) ** 0.5
    return (score / scale if scale else float("nan")), disagree


def as_report(played: Sequence[Played], max_num_seqs: np.ndarray) -> dict[str, Any]:
    """{"loads": [{"load", "requests", "metrics": {name: fields of `Measure`}}], "ranks": […], "kendall_tau"}.

    `kendall_tau` is the mean of the ranks'; null where there are none.
    """
    found = ranks(played)
    taus = [r.tau for r in found if np.isfinite(r.tau)]
    loads = []
    for load in dict.fromkeys(p.load for p in played):
        here = [p for p in played if p.load == load]
        table = measures(here, max_num_seqs)
        loads.append(
            {
                "load": load,
                "requests": sum(len(p.real.requests) for p in here),
                "failed": sum(int((p.real.outcomes.state == State.FAILED).sum()) for p in here),
                "metrics": {name: one._asdict() for name, one in table.items()},
            }
        )
    return {
        "loads": loads,
        "ranks": [_rank_json(r) for r in found],
        "kendall_tau": float(np.mean(taus)) if taus else None,
    }


def _rank_json(rank: Rank) -> dict[str, Any]:
    """Its fields; null for numbers that JSON does not know: the mean TTFT of nobody, the order of one policy."""
    sides = {
        side: {policy: value if np.isfinite(value) else None for policy, value in getattr(rank, side).items()}
        for side in ("real", "simulated")
    }
    return {**rank._asdict(), **sides, "tau": rank.tau if np.isfinite(rank.tau) else None}
