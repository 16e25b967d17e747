"""What a policy does and why: plays it, asks it, and compares it with a heuristic."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from steersman.agents.policies import heuristics
from steersman.runtime.errors import UserError
from steersman.runtime.manifest import finite
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import Split, Workload
from steersman.training.drawn import Recipe, drawn
from steersman.training.explain.contributions import contributions, is_scorer, typical_row
from steersman.training.explain.dependence import Dependence, dependence, importance
from steersman.training.explain.difference import Attainment, Gain, attainments, gains, partings
from steersman.training.explain.sentences import effect_text, sentence
from steersman.training.explain.situations import Kind, Shares, Situation, close, of_kind, play, shares_of
from steersman.training.job import SELECTION
from steersman.training.objective import Arena

CURVES = 6  # features whose partial dependence is shown
ASKED = 400  # situations for importance and dependence
SHOWN = 5  # candidates of an example
CLOSE = 200  # decisions among which the contested ones are sought
WATCHED = 2  # episodes whose decisions are looked at one by one


class Candidate(NamedTuple):
    """A candidate of an example: its score, and what sets it apart from the chosen one."""

    name: str
    score: float
    chosen: bool
    behind: str  # the largest contributions to the chosen one's lead over it


class Example(NamedTuple):
    """A decision, told."""

    kind: str  # contested, held or shed
    time_s: float
    tenant: str
    prompt_tokens: int
    sentence: str
    candidates: list[Candidate]


class Explanation(NamedTuple):
    """What `steersman explain` found."""

    policy: str
    against: str
    decisions: int
    shares: Shares
    exact: bool  # contributions are terms of the score, not ablations
    examples: list[Example]
    importance: dict[str, float]
    dependence: list[Dependence]
    differing: dict[str, float]  # share of requests, by kind of the first decision that differs
    gains: dict[str, Gain]
    attainment: dict[str, Attainment]
    episodes: int  # behind the attainment


def explain(
    policy: CompiledPolicy,
    against: CompiledPolicy | None,
    workload: Workload,
    arena: Arena,
    *,
    load: float,
    split: Split,
    seed: int,
    episodes: int,
    examples: int,
    rolled: int,
    say: Callable[[str], None] = lambda _: None,
) -> Explanation:
    """Everything about `policy` on this workload and fleet.

    against: what to compare it with; by default the heuristic that is worth most on other, training episodes.
    episodes: for the attainment; the decisions of the first two are looked at. examples: of each kind.
    rolled: differing decisions of each kind that are played again.

    Raises:
        UserError: an episode has no requests, or `draw` refuses it.
    """
    fleet = arena.fleet
    if against is None:
        say("choosing the best heuristic …")
        known = [h for h in heuristics().values() if h.name != policy.name]
        pool = [drawn(workload, fleet, Recipe(SELECTION + i, load, "train", None)) for i in range(4)]
        against = known[int(arena.values(known, pool, SELECTION).argmax())]
    say(f"playing {policy.name} and {against.name} …")
    requests = [drawn(workload, fleet, Recipe(seed + i, load, split, None)) for i in range(episodes)]
    if not all(len(r) for r in requests[:WATCHED]):
        raise UserError(f"load {load:g} brings an episode without requests; raise it")
    attained = attainments(arena.episodes(policy, requests, seed), arena.episodes(against, requests, seed))
    runtime, watched = SimulatedRuntime(fleet), requests[:WATCHED]
    situations = play(policy, against, runtime, watched, seed)
    typical = typical_row(situations)
    names = [*fleet.names, *[""] * (runtime.candidates - 2 - len(fleet.names)), "hold", "shed"]
    tenants = list(workload.tenants)

    def told(kind: str, found: Sequence[Situation]) -> list[Example]:
        return [_example(policy, s, kind, names, tenants, typical) for s in found]

    say("asking why …")
    shown = told("contested", _contested(policy, situations, typical, examples))
    shown += [e for kind in (Kind.HELD, Kind.SHED) for e in told(kind, of_kind(situations, kind, examples))]
    asked = [situations[i] for i in np.linspace(0, len(situations) - 1, min(ASKED, len(situations))).astype(int)]
    ranked = importance(policy, asked)
    curves = (dependence(policy, asked, feature) for feature, share in ranked.items() if share > 0)
    say(f"playing again where {against.name} differs …")
    parted = partings(situations)
    shares = shares_of(situations)
    return Explanation(
        policy=policy.name,
        against=against.name,
        decisions=len(situations),
        shares=shares,
        exact=is_scorer(policy),
        examples=shown,
        importance=ranked,
        dependence=list(itertools.islice((c for c in curves if c is not None), CURVES)),
        differing={kind: len(own) / shares.requests for kind, own in parted.items()},
        gains=gains(policy, arena, watched, situations, parted, rolled),
        attainment=attained,
        episodes=episodes,
    )


def _contested(
    policy: CompiledPolicy, situations: Sequence[Situation], typical: np.ndarray, count: int
) -> list[Situation]:
    """Of the close decisions those with the most to be said for both sides, each of another pair or tenant."""
    weights = []
    for s in close(situations)[:CLOSE]:
        effects = np.array([c.effect for c in contributions(policy, s, s.action, s.runner_up, typical)])
        weights.append((min(effects[effects > 0].sum(), -effects[effects < 0].sum()), s))
    chosen: dict[tuple[int, int, int], Situation] = {}
    for _, s in sorted(weights, key=lambda pair: -pair[0]):
        if len(chosen) < count:
            chosen.setdefault((s.tenant, s.action, s.runner_up), s)
    return list(chosen.values())


def _example(
    policy: CompiledPolicy,
    s: Situation,
    kind: str,
    names: Sequence[str],
    tenants: Sequence[str],
    typical: np.ndarray,
) -> Example:
    second, last = s.runner_up, len(s.mask) - 2
    reasons = contributions(policy, s, s.action, second, typical)
    verb = {Kind.SENT: f"sends to {names[s.action]}", Kind.HELD: "holds", Kind.SHED: "sheds"}[s.kind]
    rather = {last: "hold", last + 1: "shed"}.get(
        second, f"to {names[second]}" if s.kind is Kind.SENT else f"send to {names[second]}"
    )
    told = sentence(f"{verb} rather than {rather}", reasons, s.action < last and second < last)
    ranked = [c for c in np.argsort(-s.scores, kind="stable") if s.mask[c]][:SHOWN]
    candidates = []
    for c in (int(c) for c in ranked):
        compared = c not in (s.action, *range(last, last + 2)) and s.action < last
        largest = contributions(policy, s, s.action, c, typical)[:2] if compared else []
        behind = ", ".join(f"{r.feature} {effect_text(-r.effect)}" for r in largest)
        candidates.append(Candidate(names[c], float(s.scores[c]), c == s.action, behind))
    prompt = int(s.rows[-1, COLUMN["prompt_tokens"]])
    return Example(kind, s.time_s, tenants[s.tenant], prompt, told, candidates)


def as_json(found: Explanation) -> dict[str, Any]:
    """The explanation as plain data; what is not finite is null."""
    return dict(finite(_plain(found)))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
