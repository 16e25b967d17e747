"""What became of requests, and the figures that summarise it.

attainment = share of arrived requests that met both SLOs; goodput = such requests per second. Shed, failed and
unended requests count as missed; one whose client left counts as met if no SLO was broken by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from steersman.runtime.config import Model
from steersman.runtime.requests import Requests
from steersman.runtime.tenant import Tenant, tenant_table


class State(IntEnum):
    """What became of a request."""

    PENDING = 0
    DONE = 1
    SHED = 2
    FAILED = 3
    CANCELLED = 4  # its client left


@dataclass(frozen=True)
class Outcomes:
    """Columns over the requests of an episode, in order of arrival; times are NaN where there is none."""

    state: np.ndarray  # int8 (N,): State
    replica: np.ndarray  # int32 (N,): −1 where none
    ttft_s: np.ndarray  # float64 (N,)
    tpot_s: np.ndarray  # float64 (N,): 0 for a single output token
    e2e_s: np.ndarray  # float64 (N,)
    attained: np.ndarray  # bool (N,)
    cached_tokens: np.ndarray  # int32 (N,): prompt tokens that the replica had cached
    holds: np.ndarray  # int (N,): how often it was held at its gateway


def judged(outcomes: Outcomes, table: np.ndarray, tenants: Mapping[str, Tenant]) -> Outcomes:
    """The outcomes of the REQUEST `table`, (N,), with `attained` by the SLOs of other `tenants`."""
    slo = tenant_table(tenants)[table["tenant"]]
    with np.errstate(invalid="ignore"):
        kept = (outcomes.ttft_s <= slo["ttft_slo_s"]) & (outcomes.tpot_s <= slo["tpot_slo_s"])
    # A client that left before the first token was promised no more than its TTFT.
    kept = np.where(np.isfinite(outcomes.ttft_s), kept, table["cancel_s"] <= slo["ttft_slo_s"])
    ended = np.isin(outcomes.state, (State.DONE, State.CANCELLED))
    return replace(outcomes, attained=kept & ended)


class Latency(Model):
    """Percentiles of completed requests, in seconds; 0 where none completed."""

    p50: float
    p90: float
    p99: float
    mean: float


class TenantSummary(Model):
    """One tenant's part."""

    arrived: int
    attainment: float
    goodput_rps: float
    shed: int
    ttft_s: Latency
    tpot_s: Latency
    e2e_s: Latency


class ReplicaSummary(Model):
    """One replica's part. Shares are over the whole episode."""

    name: str
    requests: int
    share: float  # of all arrived requests
    busy: float  # share of time with an iteration running
    occupancy: float  # running sequences over max_num_seqs, time-weighted
    kv_use: float  # KV blocks held by requests over capacity, time-weighted
    output_tokens_per_s: float
    preemptions: int


class Summary(Model):
    """The figures of one policy over one or more episodes."""

    policy: str
    episodes: int
    duration_s: float  # simulated or real time, summed over episodes
    arrived: int
    offered_rps: float
    attainment: float
    worst_tenant_attainment: float
    goodput_rps: float
    shed: int
    failed: int
    cancelled: int
    held: int  # at least once
    prefix_hit: float  # cached over prompt tokens of completed requests
    throughput_tokens_per_s: float  # output tokens
    busy: float
    occupancy: float
    kv_use: float
    cost_per_hour: float
    cost_per_1000_good: float  # 0 where nothing was good
    ttft_s: Latency
    tpot_s: Latency
    e2e_s: Latency
    tenants: dict[str, TenantSummary]
    replicas: list[ReplicaSummary]


# Time integrals of one replica over an episode.
USAGE = np.dtype(
    [
        ("busy_s", "f8"),
        ("sequence_s", "f8"),  # ∫ running sequences dt
        ("kv_s", "f8"),  # ∫ share of KV blocks held by requests dt
        ("output_tokens", "i8"),
        ("iterations", "i8"),
        ("preemptions", "i8"),
    ],
    align=True,
)


@dataclass(frozen=True)
class Episode:
    """One played episode."""

    requests: Requests
    outcomes: Outcomes
    usage: np.ndarray  # USAGE (R,)
    duration_s: float


def latency(values: np.ndarray) -> Latency:
    values = values[np.isfinite(values)]
    if not len(values):
        return Latency(p50=0.0, p90=0.0, p99=0.0, mean=0.0)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return Latency(p50=float(p50), p90=float(p90), p99=float(p99), mean=float(values.mean()))


def summarise(
    policy: str,
    episodes: list[Episode],
    replica_names: list[str],
    max_num_seqs: np.ndarray,
    price_per_hour: float,
) -> Summary:
    """The figures of `policy` over `episodes` on one fleet; all episodes have the same tenants."""
    duration = sum(e.duration_s for e in episodes)
    tenant_names = list(episodes[0].requests.tenants)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(e.outcomes, name) for e in episodes])

    state, replica, attained = joined("state"), joined("replica"), joined("attained")
    ttft, tpot, e2e, cached = joined("ttft_s"), joined("tpot_s"), joined("e2e_s"), joined("cached_tokens")
    tenant = np.concatenate([e.requests.table["tenant"] for e in episodes])
    prompt = np.concatenate([e.requests.table["prompt_tokens"] for e in episodes])
    done = state == State.DONE
    arrived = len(state)

    tenants = {}
    for index, name in enumerate(tenant_names):
        own = tenant == index
        if not own.any():
            continue
        tenants[name] = TenantSummary(
            arrived=int(own.sum()),
            attainment=float(attained[own].mean()),
            goodput_rps=float(attained[own].sum() / duration),
            shed=int((state[own] == State.SHED).sum()),
            ttft_s=latency(ttft[own & done]),
            tpot_s=latency(tpot[own & done]),
            e2e_s=latency(e2e[own & done]),
        )

    usage = {name: np.sum([e.usage[name] for e in episodes], axis=0) for name in USAGE.names or ()}
    replicas = [
        ReplicaSummary(
            name=name,
            requests=int((replica == r).sum()),
            share=float((replica == r).sum() / max(1, arrived)),
            busy=float(usage["busy_s"][r] / duration),
            occupancy=float(usage["sequence_s"][r] / duration / max_num_seqs[r]),
            kv_use=float(usage["kv_s"][r] / duration),
            output_tokens_per_s=float(usage["output_tokens"][r] / duration),
            preemptions=int(usage["preemptions"][r]),
        )
        for r, name in enumerate(replica_names)
    ]
    good = int(attained.sum())
    return Summary(
        policy=policy,
        episodes=len(episodes),
        duration_s=duration,
        arrived=arrived,
        offered_rps=arrived / duration,
        attainment=good / max(1, arrived),
        worst_tenant_attainment=min((t.attainment for t in tenants.values()), default=0.0),
        goodput_rps=good / duration,
        shed=int((state == State.SHED).sum()),
        failed=int((state == State.FAILED).sum()),
        cancelled=int((state == State.CANCELLED).sum()),
        held=int((joined("holds") > 0).sum()),
        prefix_hit=float(cached[done].sum() / max(1, prompt[done].sum())),
        throughput_tokens_per_s=float(usage["output_tokens"].sum() / duration),
        busy=float(np.mean([r.busy for r in replicas])),
        occupancy=float(usage["sequence_s"].sum() / duration / max_num_seqs.sum()),
        kv_use=float(np.mean([r.kv_use for r in replicas])),
        cost_per_hour=price_per_hour,
        cost_per_1000_good=price_per_hour * duration / 3600 / good * 1000 if good else 0.0,
        ttft_s=latency(ttft[done]),
        tpot_s=latency(tpot[done]),
        e2e_s=latency(e2e[done]),
        tenants=tenants,
        replicas=replicas,
    )
