"""Why one candidate scores more than another: what each feature contributes to the difference.

For the learned scorer the answer is exact, for its score is a sum: score = Σ W[f, g]·x_f·g_g + MLP. For any other
policy a feature is taken away and the change of the difference is its contribution: between two replicas, both get the
mean over the candidates; between a replica and hold or shed, which have no features, all replicas (or the request) get
the mean over all situations. Such contributions need not add up to the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steersman.runtime import scoring
from steersman.runtime.network import normalise, split, unpack
from steersman.runtime.observation import CANDIDATE_FEATURES, COLUMN, FEATURES, WIDTH
from steersman.runtime.policy import CompiledPolicy
from steersman.training.explain.situations import IS_REPLICA, Situation, scores_of

LEANING, LAYERS = "leaning", "layers"  # what is not due to a single feature: a constant, and the MLP
INDICATORS = (IS_REPLICA, COLUMN["is_hold"])


class Contribution(NamedTuple):
    """What a feature contributes to the lead of one candidate over another, in units of the score."""

    feature: str  # a column's name, LEANING or LAYERS
    effect: float
    value: float  # of the feature on the leading candidate; NaN where there is none
    against: float  # on the other


def contributions(
    policy: CompiledPolicy, situation: Situation, leader: int, against: int, typical: np.ndarray
) -> list[Contribution]:
    """Contributions to score[leader] − score[against], the largest first; none that is zero.

    typical: float32 (WIDTH,), the mean of every column over all situations, see `typical_row`.
    """
    found = _of_scorer(policy, situation, leader, against) if is_scorer(policy) else []
    if not is_scorer(policy):
        found = _by_ablation(policy, situation, leader, against, typical)
    return sorted((c for c in found if c.effect != 0.0), key=lambda c: -abs(c.effect))


def rows_with(rows: np.ndarray, feature: int) -> np.ndarray:
    """Which rows have a feature, bool (C,): replicas, the hold row, or for those of the request all but padding."""
    hold, real = rows[:, COLUMN["is_hold"]] > 0, rows[:, IS_REPLICA] > 0
    if feature == COLUMN["patience"]:
        return hold
    if feature >= CANDIDATE_FEATURES:
        real[-2:] = True
    return real


def is_scorer(policy: CompiledPolicy) -> bool:
    """Whether it is the learned scorer, whose score is a sum."""
    return policy.function is scoring.score


def typical_row(situations: Sequence[Situation]) -> np.ndarray:
    """The mean of every column, float32 (WIDTH,): of a candidate's over replicas, of patience over holds."""
    rows = np.concatenate([s.rows for s in situations])
    typical = rows[rows[:, IS_REPLICA] > 0].mean(axis=0)
    holds = rows[rows[:, COLUMN["is_hold"]] > 0]
    if len(holds):
        typical[[COLUMN["is_hold"], COLUMN["patience"]]] = 1.0, holds[:, COLUMN["patience"]].mean()
    return np.asarray(typical, np.float32)


def _of_scorer(policy: CompiledPolicy, situation: Situation, leader: int, against: int) -> list[Contribution]:
    architecture, weights = unpack(policy.values)
    bilinear, *layers = split(architecture, weights)
    y = normalise(situation.rows)
    gates = np.concatenate([[1.0], y[-1, architecture.gate_columns]])
    terms = bilinear * gates * (y[leader] - y[against])[:CANDIDATE_FEATURES, None]  # (F, G)
    effects = np.zeros(WIDTH)
    effects[:CANDIDATE_FEATURES] = terms.sum(axis=1)
    # What depends on the request alone is in the indicators' weights: it is the request's doing, not theirs.
    effects[list(INDICATORS)] = 0.0
    indicators = terms[list(INDICATORS)].sum(axis=0)
    effects[architecture.gate_columns] += indicators[1:]
    found = [_contribution(situation, f, effects[f], leader, against) for f in range(WIDTH)]
    found.append(Contribution(LEANING, float(indicators[0]), np.nan, np.nan))
    if layers:
        hidden = y[[leader, against]]
        for weight, bias in zip(layers[0:-1:2], layers[1:-1:2], strict=True):
            hidden = np.tanh(hidden @ weight + bias)
        first, second = hidden @ layers[-1]
        found.append(Contribution(LAYERS, float(first - second), np.nan, np.nan))
    return found


def _by_ablation(
    policy: CompiledPolicy, situation: Situation, leader: int, against: int, typical: np.ndarray
) -> list[Contribution]:
    rows, real = situation.rows, situation.rows[:, IS_REPLICA] > 0
    both = bool(real[leader] and real[against])
    mean = rows[real & situation.mask].mean(axis=0) if both else typical
    lead = _lead(policy, situation, rows, leader, against)
    found = []
    for f in range(CANDIDATE_FEATURES if both else WIDTH):
        if f in INDICATORS:
            continue
        changed = rows.copy()
        changed[[leader, against] if both else rows_with(rows, f), f] = mean[f]
        effect = lead - _lead(policy, situation, changed, leader, against)
        found.append(_contribution(situation, f, effect, leader, against))
    return found


def _lead(policy: CompiledPolicy, situation: Situation, rows: np.ndarray, leader: int, against: int) -> float:
    scores = scores_of(policy, situation, rows)
    return float(scores[leader] - scores[against])


def _contribution(situation: Situation, feature: int, effect: float, leader: int, against: int) -> Contribution:
    values = (float(situation.rows[c, feature]) for c in (leader, against))
    return Contribution(FEATURES[feature].name, float(effect), *values)
