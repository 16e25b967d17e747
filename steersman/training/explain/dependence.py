"""Which features matter, and how: blindness to each, and partial dependence of the lead on the most important."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steersman.runtime.observation import CANDIDATE_FEATURES, COLUMN, FEATURES
from steersman.runtime.policy import CompiledPolicy
from steersman.training.explain.contributions import INDICATORS, rows_with, typical_row
from steersman.training.explain.situations import Kind, Situation, choice_of, runner_up, scores_of

POINTS = 12  # of a curve


class Dependence(NamedTuple):
    """How the lead of the chosen replica over the next best candidate depends on a feature, all else equal.

    Arrays (P,) over `values`: quartiles of the lead over situations, and the share of them in which the replica is
    still chosen.
    """

    feature: str
    values: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray
    kept: np.ndarray


def importance(policy: CompiledPolicy, situations: Sequence[Situation]) -> dict[str, float]:
    """The share of decisions that would change if the policy saw only the average of a feature; the largest first."""
    typical = typical_row(situations)
    shares = {}
    for f, feature in enumerate(FEATURES):
        if f in INDICATORS:
            continue
        changed = 0
        for s in situations:
            rows = s.rows.copy()
            rows[rows_with(rows, f), f] = typical[f]
            changed += choice_of(policy, s, rows) != s.action
        shares[feature.name] = changed / max(1, len(situations))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def dependence(policy: CompiledPolicy, situations: Sequence[Situation], feature: str) -> Dependence | None:
    """The lead where the feature of the chosen replica (of the request: everywhere) is each of its quantiles.

    None if it never varies, or no request was sent to a replica that had a rival.
    """
    f = COLUMN[feature]
    sent = [s for s in situations if s.kind is Kind.SENT and s.runner_up >= 0]
    seen = [s.rows[rows_with(s.rows, f), f] for s in situations]
    values = np.unique(np.quantile(np.concatenate(seen), np.linspace(0.01, 0.99, POINTS))) if seen else np.zeros(0)
    if not sent or len(values) < 2:
        return None
    leads, kept = np.empty((len(values), len(sent))), np.empty((len(values), len(sent)), np.bool_)
    for p, value in enumerate(values):
        for i, s in enumerate(sent):
            rows = s.rows.copy()
            rows[s.action if f < CANDIDATE_FEATURES else rows_with(rows, f), f] = value
            scores = scores_of(policy, s, rows)
            second = runner_up(scores, s.mask, s.action)
            leads[p, i] = scores[s.action] - scores[second] if second >= 0 else np.inf
            kept[p, i] = leads[p, i] >= 0
    low, median, high = np.quantile(leads, [0.25, 0.5, 0.75], axis=1, method="lower")
    return Dependence(feature, values, low, median, high, kept.mean(axis=1))
