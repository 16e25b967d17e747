"""What a deployment counts, for Prometheus: read when it is scraped, at no cost to decisions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from steersman.runtime.deployment.deployment import Deployment
from steersman.runtime.deployment.stats import ArmStats, DeploymentStats, ShadowStats, TimesStats, stats
from steersman.runtime.deployment.times import BOUNDS_S

_ARM = ("version", "arm")


def metrics(deployment: Deployment) -> Iterator[Metric]:
    """All of it; `Metrics.add` of the gateway takes it."""
    seen = stats(deployment)
    yield _deployed(seen)
    yield from _arms(seen.arms)
    yield from _shadow(seen.shadow)
    share = GaugeMetricFamily("steersman_canary_share", "Share of the requests that a canary decides")
    share.add_metric((), seen.canary.share if seen.canary else 0.0)
    yield share
    changes = CounterMetricFamily("steersman_policy_changes", "Changes of the policies, by kind", labels=["kind"])
    for kind, count in seen.changes.items():
        changes.add_metric((kind,), count)
    yield changes


def _deployed(seen: DeploymentStats) -> Metric:
    deployed = GaugeMetricFamily("steersman_policy_deployed", "1 for each policy in use", labels=["version", "place"])
    places = [("current", seen.current), ("fallback", seen.fallback)]
    places += [("canary", seen.canary.version)] if seen.canary else []
    places += [("shadow", seen.shadow.version)] if seen.shadow else []
    for place, version in places:
        deployed.add_metric((version, place), 1)
    return deployed


def _arms(arms: Sequence[ArmStats]) -> Iterator[Metric]:
    for name, text, attribute in (
        ("decisions", "Decisions asked of a policy", "decisions"),
        ("ended", "Requests that are over, by the policy that decided them", "ended"),
        ("attained", "Of these, met both SLOs", "attained"),
        ("failed", "Of these, no replica answered whole", "errors"),
    ):
        family = CounterMetricFamily(f"steersman_policy_{name}", text, labels=_ARM)
        for arm in arms:
            family.add_metric((arm.version, arm.role), getattr(arm, attribute))
        yield family
    fallbacks = CounterMetricFamily(
        "steersman_policy_fallbacks", "Decisions of the fallback in place of a policy", labels=(*_ARM, "reason")
    )
    times = HistogramMetricFamily("steersman_policy_decision_seconds", "Time that a policy took", labels=_ARM)
    for arm in arms:
        for reason, count in arm.fallbacks.items():
            fallbacks.add_metric((arm.version, arm.role, reason), count)
        times.add_metric((arm.version, arm.role), _buckets(arm.decision_s), arm.decision_s.sum_s)
    yield from (fallbacks, times)


def _shadow(shadow: ShadowStats | None) -> Iterator[Metric]:
    version = ("version",)
    enabled = GaugeMetricFamily("steersman_shadow_enabled", "0: a shadow that was switched off", labels=version)
    gain = GaugeMetricFamily(
        "steersman_shadow_predicted_gain",
        "Requests more that would meet both SLOs, by prediction, had the shadow decided",
        labels=version,
    )
    counters = {
        "decisions": CounterMetricFamily("steersman_shadow_decisions", "Decisions scored", labels=version),
        "disagreements": CounterMetricFamily("steersman_shadow_disagreements", "Of these, others", labels=version),
        "compared": CounterMetricFamily("steersman_shadow_compared", "Of these, with a known gain", labels=version),
        "skipped": CounterMetricFamily("steersman_shadow_skipped", "Decisions not scored: too many", labels=version),
    }
    failures = CounterMetricFamily("steersman_shadow_failures", "Failures", labels=("version", "reason"))
    times = HistogramMetricFamily("steersman_shadow_decision_seconds", "Time that a shadow took", labels=version)
    if shadow is not None:
        key = (shadow.version,)
        enabled.add_metric(key, 0 if shadow.off else 1)
        gain.add_metric(key, shadow.predicted_gain)
        for name, family in counters.items():
            family.add_metric(key, getattr(shadow, name))
        for reason, count in shadow.failures.items():
            failures.add_metric((shadow.version, reason), count)
        times.add_metric(key, _buckets(shadow.decision_s), shadow.decision_s.sum_s)
    yield from (enabled, gain, *counters.values(), failures, times)


def _buckets(times: TimesStats) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    total, made = 0, []
    for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), times.buckets, strict=True):
        total += count
        made.append((bound, float(total)))
    return made
