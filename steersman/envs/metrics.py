"""The figures of one episode, for `info["metrics"]`."""

from __future__ import annotations

from steersman.runtime.fleet import Fleet
from steersman.runtime.outcomes import Episode, summarise


def episode_metrics(episode: Episode, fleet: Fleet) -> dict[str, float]:
    """Shares in [0, 1], times in seconds, rates per second; a percentile of nothing is 0."""
    limits = fleet.table()["max_num_seqs"]
    s = summarise("", [episode], fleet.names, limits, fleet.price_per_hour)
    return {
        "offered_rps": s.offered_rps,
        "attainment": s.attainment,
        "worst_tenant_attainment": s.worst_tenant_attainment,
        **{f"attainment/{name}": tenant.attainment for name, tenant in s.tenants.items()},
        "goodput_rps": s.goodput_rps,
        "shed": s.shed / max(1, s.arrived),
        "failed": s.failed / max(1, s.arrived),
        "cancelled": s.cancelled / max(1, s.arrived),
        "held": s.held / max(1, s.arrived),
        "ttft_p50_s": s.ttft_s.p50,
        "ttft_p99_s": s.ttft_s.p99,
        "tpot_p50_s": s.tpot_s.p50,
        "tpot_p99_s": s.tpot_s.p99,
        "busy": s.busy,
        "occupancy": s.occupancy,
        "kv_use": s.kv_use,
        "prefix_hit": s.prefix_hit,
        "cost_per_1000_good": s.cost_per_1000_good,
    }
