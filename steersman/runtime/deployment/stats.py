"""What a deployment counts, as plain values: for metrics, the admin API and `steersman top`."""

from __future__ import annotations

from dataclasses import dataclass

from steersman.runtime.deployment.arm import Arm
from steersman.runtime.deployment.deployment import Deployment, Event
from steersman.runtime.deployment.shadow import Shadow
from steersman.runtime.deployment.times import Times


@dataclass(frozen=True)
class TimesStats:
    """Times of decisions."""

    count: int
    sum_s: float
    p50_s: float
    p99_s: float
    buckets: tuple[int, ...]  # counts below each of `times.BOUNDS_S`, and above the last; not cumulative


@dataclass(frozen=True)
class ArmStats:
    """A policy that decides, or did; all arms of one version and role together."""

    version: str
    role: str
    decisions: int
    ended: int
    attained: int
    errors: int
    fallbacks: dict[str, int]
    decision_s: TimesStats
    last_failure: str


@dataclass(frozen=True)
class CanaryStats:
    """A canary and the current policy beside it, both since the canary was started."""

    version: str
    share: float
    arm: ArmStats
    baseline: ArmStats


@dataclass(frozen=True)
class ShadowStats:
    """A shadow."""

    version: str
    decisions: int
    disagreements: int
    compared: int  # decisions that the predicted gain is counted of
    predicted_gain: float  # requests more that would meet both SLOs, by prediction, if it had decided
    failures: dict[str, int]
    skipped: int
    decision_s: TimesStats
    off: str  # why it was switched off; "" while it is on
    last_failure: str


@dataclass(frozen=True)
class DeploymentStats:
    """All of it."""

    current: str
    fallback: str
    predecessors: tuple[str, ...]
    canary: CanaryStats | None
    shadow: ShadowStats | None
    decisions: int
    fallbacks: dict[str, int]  # decisions of the fallback, by reason
    changes: dict[str, int]  # by kind: activated, rolled_back, canary_rolled_back …
    arms: tuple[ArmStats, ...]  # of the last policies that decided
    events: tuple[Event, ...]  # the last ones, oldest first


def stats(deployment: Deployment) -> DeploymentStats:
    """What `deployment` has counted so far."""
    canary, shadow = deployment.canary, deployment.shadow
    by_key: dict[tuple[str, str], list[Arm]] = {}
    for arm in deployment.arms:
        key = (arm.version, arm.role)
        by_key.setdefault(key, []).extend([arm] if arm.earlier is None else [arm.earlier, arm])
    return DeploymentStats(
        current=deployment.current.version,
        fallback=deployment.fallback.version,
        predecessors=tuple(release.version for release in deployment.predecessors),
        canary=None
        if canary is None
        else CanaryStats(canary.release.version, canary.share, _together([canary.arm]), _together([canary.baseline])),
        shadow=None if shadow is None else _shadow(shadow),
        decisions=deployment.decisions,
        fallbacks={reason.value: count for reason, count in deployment.fallbacks.items()},
        changes=dict(deployment.changes),
        arms=tuple(_together(arms) for arms in by_key.values()),
        events=tuple(deployment.events),
    )


def _together(arms: list[Arm]) -> ArmStats:
    fallbacks: dict[str, int] = {}
    for arm in arms:
        for reason, count in arm.fallbacks.items():
            fallbacks[reason.value] = fallbacks.get(reason.value, 0) + count
    return ArmStats(
        version=arms[0].version,
        role=arms[0].role,
        decisions=sum(arm.decisions for arm in arms),
        ended=sum(arm.ended for arm in arms),
        attained=sum(arm.attained for arm in arms),
        errors=sum(arm.errors for arm in arms),
        fallbacks=fallbacks,
        decision_s=_times([arm.times for arm in arms]),
        last_failure=arms[-1].last_failure,
    )


def _times(parts: list[Times]) -> TimesStats:
    whole = Times()
    for part in parts:
        whole.merge(part)
    return TimesStats(whole.count, whole.sum_s, whole.percentile(0.5), whole.percentile(0.99), tuple(whole.counts))


def _shadow(shadow: Shadow) -> ShadowStats:
    return ShadowStats(
        version=shadow.release.version,
        decisions=shadow.decisions,
        disagreements=shadow.disagreements,
        compared=shadow.compared,
        predicted_gain=shadow.gain,
        failures={reason.value: count for reason, count in shadow.failures.items()},
        skipped=shadow.skipped,
        decision_s=_times([shadow.times]),
        off=shadow.off,
        last_failure=shadow.last_failure,
    )
