"""Made-up episodes of policies of a known quality: what reports and dashboards are tested on."""

from __future__ import annotations

import numpy as np

from steersman.runtime.outcomes import USAGE, Episode, Outcomes, State, Summary, summarise
from steersman.runtime.requests import REQUEST, Requests
from steersman.runtime.tenant import Slo, Tenant

TENANTS = {
    "chat": Tenant(slo=Slo(ttft_s=0.8, tpot_s=0.05)),
    "code-completion": Tenant(slo=Slo(ttft_s=0.3, tpot_s=0.03)),
    "all": Tenant(slo=Slo(ttft_s=8.0, tpot_s=0.15)),  # a name that dashboards use for themselves
}
REPLICAS = ["h100-0", "h100-1", "l40s"]


def episode(seed: int, slowness: float, shed: float = 0.0, count: int = 120) -> Episode:
    """`count` requests in 60 s whose TTFT is `slowness` times half of what was promised, give or take."""
    rng = np.random.default_rng(seed)
    table = np.zeros(count, REQUEST)
    table["arrival_s"] = np.sort(rng.uniform(0, 60, count))
    table["tenant"] = np.arange(count) % len(TENANTS)
    table["prompt_tokens"] = rng.integers(50, 2000, count)
    terms = list(TENANTS.values())
    ttft_slo = np.array([terms[t].slo.ttft_s for t in table["tenant"]])
    tpot_slo = np.array([terms[t].slo.tpot_s for t in table["tenant"]])
    state = np.where(rng.random(count) < shed, State.SHED, State.DONE).astype(np.int8)
    lost = state == State.SHED
    ttft = np.where(lost, np.nan, 0.5 * slowness * ttft_slo * rng.lognormal(0, 0.5, count))
    tpot = np.where(lost, np.nan, 0.4 * tpot_slo * rng.lognormal(0, 0.3, count))
    replica = np.where(lost, -1, rng.integers(0, len(REPLICAS), count)).astype(np.int32)
    usage = np.zeros(len(REPLICAS), USAGE)
    usage["busy_s"], usage["sequence_s"], usage["kv_s"] = 45.0, 600.0, 20.0
    usage["output_tokens"] = 9000
    outcomes = Outcomes(
        state=state,
        replica=replica,
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s=ttft + 100 * tpot,
        attained=~lost & (ttft <= ttft_slo) & (tpot <= tpot_slo),
        cached_tokens=(table["prompt_tokens"] // 3).astype(np.int32),
        holds=np.zeros(count, np.int32),
    )
    return Episode(Requests(table, np.zeros(0, np.int64), 16, TENANTS, 60.0), outcomes, usage, 60.0)


def summary(policy: str, episodes: list[Episode]) -> Summary:
    return summarise(policy, episodes, REPLICAS, np.array([64, 64, 32]), 7.5)


def field(policies: dict[str, float]) -> tuple[list[Summary], dict[str, list[Episode]]]:
    """Summaries and episodes of policies by their slowness; a learned one also sheds."""
    played = {
        name: [episode(seed, slowness, 0.05 if "learned" in name else 0.0) for seed in range(3)]
        for name, slowness in policies.items()
    }
    return [summary(name, episodes) for name, episodes in played.items()], played
