"""The benchmark as plain data: what --json prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from steersman.training.benchmark.budget import Budget
from steersman.training.benchmark.capacity import Interval
from steersman.training.benchmark.figures import Figures, Measured, Pair


def as_json(all_found: Sequence[Figures], budget: Budget, command: str) -> dict[str, Any]:
    """All figures as plain data; numbers that JSON does not know (an infinite ratio) are null."""
    return {
        "scenarios": [
            {
                "name": found.scenario.name,
                "description": found.scenario.description,
                "headline": found.scenario.headline,
                "reference_rps": found.reference_rps,
                "best_heuristic_as_shipped": found.best_default,
                "strongest_tuned_heuristic": found.best_tuned,
                "policies": [_policy(found, p) for p in found.policies],
                "paired": [_pair(pair) for pair in found.pairs],
            }
            for found in all_found
        ],
        "budget": budget.model_dump(mode="json") | {"evaluations": budget.evaluations},
        "command": command,
    }


def _policy(found: Figures, policy: Measured) -> dict[str, Any]:
    tenant, worst = policy.worst
    return {
        "name": policy.name,
        "kind": policy.kind,
        "form": policy.form,
        "evaluations": policy.evaluations,
        "capacity_rps": policy.capacity_rps.value,
        "capacity_ci": [policy.capacity_rps.low, policy.capacity_rps.high],
        "members_rps": policy.members_rps,
        "goodput": {f"{factor:g}": value.value for factor, value in policy.goodput_rps.items()},
        "goodput_ci": {f"{factor:g}": [value.low, value.high] for factor, value in policy.goodput_rps.items()},
        "attainment": policy.tenants,
        "attainment_overall": policy.attainment,
        "worst_tenant": {"name": tenant, "attainment": worst},
        "shed": policy.shed,
        **{
            f"{metric.removesuffix('_s')}_{name}_s": value
            for metric, values in policy.latency.items()
            for name, value in values._asdict().items()
        },
        "fairness": policy.fairness,
        "tokens_over_ceiling": policy.of_ceiling,
        "cost_per_1000_good": policy.cost_per_1000_good,
        "curve": [
            {"offered_rps": offered, "goodput_rps": good, "worst_tenant": worst}
            for offered, good, worst in found.curves[policy.name]
        ],
    }


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "policy": pair.policy,
        "against": pair.against,
        "capacity_ratio": _finite(pair.capacity.value),
        "ci": _ends(pair.capacity),
        "goodput_ratio": {f"{factor:g}": _finite(value.value) for factor, value in pair.goodput.items()},
        "goodput_ci": {f"{factor:g}": _ends(value) for factor, value in pair.goodput.items()},
        "worst_tenant_difference": pair.worst.value,
        "worst_tenant_ci": _ends(pair.worst),
    }


def _ends(interval: Interval) -> list[float | None]:
    return [_finite(interval.low), _finite(interval.high)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
