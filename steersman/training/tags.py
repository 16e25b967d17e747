"""Names of what is watched, in training and in service, and the values of a summary under them.

Shares lie in [0, 1], times are in seconds, rates per second. A tenant or a replica whose name is one of the
fixed last parts ("all", "worst", "shed") has a mark added.
"""

from __future__ import annotations

from steersman.runtime.outcomes import Summary

ATTAINMENT_ALL = "slo/attainment/all"
ATTAINMENT_WORST = "slo/attainment/worst"
GOODPUT_RPS = "slo/goodput_rps"
ACTION_SHED = "actions/shed"

REWARD = "train/reward"
STEPS = "train/steps"
LOSSES = "train/loss/"
TUNED = "tune/"

FINAL_ATTAINMENT = "final/attainment"
FINAL_WORST = "final/attainment_worst"
FINAL_GOODPUT_RPS = "final/goodput_rps"
FINAL_GOODPUT_RATIO = "final/goodput_over_best_heuristic"
FINAL_TTFT_P99_S = "final/ttft_p99_s"
FINAL_TPOT_P99_S = "final/tpot_p99_s"
FINAL_COST = "final/cost_per_1000_good"

ATTAINMENT_BARS = "comparison/attainment"
GOODPUT_BARS = "comparison/goodput"
TTFT_CDF = "comparison/ttft_cdf"
TPOT_CDF = "comparison/tpot_cdf"
COMPARISON_TABLE = "comparison/table"
BEST_HEURISTIC = "comparison/best_heuristic"


def attainment(tenant: str) -> str:
    return f"slo/attainment/{_free(tenant, 'tenant')}"


def ttft_p99_s(tenant: str) -> str:
    return f"latency/ttft_p99_s/{tenant}"


def tpot_p99_s(tenant: str) -> str:
    return f"latency/tpot_p99_s/{tenant}"


def busy(replica: str) -> str:
    return f"replica/busy/{replica}"


def occupancy(replica: str) -> str:
    return f"replica/occupancy/{replica}"


def kv_use(replica: str) -> str:
    return f"replica/kv_use/{replica}"


def action(replica: str) -> str:
    return f"actions/{_free(replica, 'replica')}"


def _free(name: str, kind: str) -> str:
    return f"{name} ({kind})" if name in ("all", "worst", "shed") else name


def watched(summary: Summary) -> dict[str, float]:
    """What an evaluation shows: attainment, goodput, latency where any request completed, and the fleet."""
    values = {
        ATTAINMENT_ALL: summary.attainment,
        ATTAINMENT_WORST: summary.worst_tenant_attainment,
        GOODPUT_RPS: summary.goodput_rps,
        ACTION_SHED: summary.shed / max(1, summary.arrived),
    }
    for name, tenant in summary.tenants.items():
        values[attainment(name)] = tenant.attainment
        if tenant.ttft_s.p99 > 0:
            values[ttft_p99_s(name)] = tenant.ttft_s.p99
        if tenant.tpot_s.p99 > 0:
            values[tpot_p99_s(name)] = tenant.tpot_s.p99
    for replica in summary.replicas:
        values[action(replica.name)] = replica.share
        values[busy(replica.name)] = replica.busy
        values[occupancy(replica.name)] = replica.occupancy
        values[kv_use(replica.name)] = replica.kv_use
    return values
