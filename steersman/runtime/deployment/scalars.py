"""What a deployment counts, as curves: values of the time since they were last taken, by TensorBoard's tags."""

from __future__ import annotations

from steersman.runtime.deployment.deployment import Deployment
from steersman.runtime.deployment.stats import ArmStats, DeploymentStats, ShadowStats, TimesStats, stats

_NO_TIMES = TimesStats(0, 0.0, 0.0, 0.0, ())
_NO_ARM = ArmStats("", "", 0, 0, 0, 0, {}, _NO_TIMES, "")
_NO_SHADOW = ShadowStats("", 0, 0, 0, 0.0, {}, 0, _NO_TIMES, "", "")


class Scalars:
    """Takes the curves of a deployment, window by window. Shares lie in [0, 1], times are seconds."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._before = stats(deployment)

    def take(self) -> dict[str, float]:
        """The values since the last call, none where nothing happened; percentiles since the policy was deployed."""
        now, before = stats(self._deployment), self._before
        self._before = now
        made: dict[str, float] = {}
        _share(made, "policy/fallbacks", _failures(now), _failures(before), now.decisions - before.decisions)
        if now.shadow is not None:
            same = before.shadow is not None and before.shadow.version == now.shadow.version
            _shadow(made, now.shadow, before.shadow if same else None)
        if now.canary is not None:
            same = before.canary is not None and before.canary.version == now.canary.version
            _arm(made, "canary", now.canary.arm, before.canary.arm if same and before.canary else None)
            _arm(
                made, "canary/current", now.canary.baseline, before.canary.baseline if same and before.canary else None
            )
        return made


def _failures(seen: DeploymentStats) -> int:
    return sum(seen.fallbacks.values())


def _shadow(made: dict[str, float], now: ShadowStats, before: ShadowStats | None) -> None:
    made["shadow/decision_p50_s"] = now.decision_s.p50_s
    made["shadow/decision_p99_s"] = now.decision_s.p99_s
    if before is None or before.decision_s.count > now.decision_s.count:  # it was started anew
        before = _NO_SHADOW
    scored = now.decision_s.count - before.decision_s.count
    decisions = now.decisions - before.decisions
    _share(made, "shadow/disagreement", now.disagreements, before.disagreements, decisions)
    _share(made, "shadow/predicted_gain", now.predicted_gain, before.predicted_gain, now.compared - before.compared)
    _share(made, "shadow/failures", sum(now.failures.values()), sum(before.failures.values()), scored)


def _arm(made: dict[str, float], tag: str, now: ArmStats, before: ArmStats | None) -> None:
    made[f"{tag}/decision_p50_s"] = now.decision_s.p50_s
    if before is None or before.ended > now.ended:  # it is counted anew
        before = _NO_ARM
    _share(made, f"{tag}/attainment", now.attained, before.attained, now.ended - before.ended)
    _share(made, f"{tag}/errors", now.errors, before.errors, now.ended - before.ended)


def _share(made: dict[str, float], tag: str, now: float, before: float, of: float) -> None:
    if of > 0:
        made[tag] = (now - before) / of
