"""Variants of a workload and its fleet: what a policy may meet that was trained for that workload on that fleet.

Domain randomisation (Tobin et al., "Domain randomization for transferring deep neural networks", IROS 2017): each
variant differs in many ways at once, by chance, and none is one that anybody uses.

| what | how |
|---|---|
| speed, KV memory of a group of replicas | times exp(N(0, 0.5)), exp(N(0, 0.3)) |
| number of its replicas | half, as many or twice as many |
| a tenant's rate, first guess of its output length | times exp(N(0, 0.5)), exp(N(0, 0.7)); the total rate stays |
| bursts | 0.7 to 2 times as high, half to once as long; gaps 0.7 to 2 times as uneven |
| metrics, gateways, crashes | each in two of five variants: up to 6 s old; two or three; every 5 to 15 minutes |

Each can be played with guessed SLOs, too: policies are told the same ones for all tenants, a quantile between 0.25 and
0.75 of the true ones, and are judged by those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from steersman.runtime.cost import CostProfile
from steersman.runtime.fleet import Fleet, RandomFaults, ReplicaGroup
from steersman.runtime.tenant import Slo, Tenant
from steersman.runtime.workload import Workload, WorkloadTenant

# What a source calls its rate, where it may be changed for one tenant alone.
RATES = ("rate_rps", "rate_factor")


class Variant(NamedTuple):
    """What is played in place of a workload on a fleet."""

    workload: Workload
    fleet: Fleet
    told: Mapping[str, Tenant] | None  # what schedulers are told of the tenants, where it is not the truth


def variant(workload: Workload, fleet: Fleet, number: int, guessed: bool = False) -> Variant:
    """The variant of that number, from 0; the same arguments give the same one. Its fleet depends on no workload.

    guessed: policies are told guesses of the SLOs.
    """
    varied = _fleet(fleet, np.random.default_rng([number, 1]))
    rng = np.random.default_rng([number, 2])
    tenants = _tenants(workload, rng)
    return Variant(
        workload.model_copy(update={"tenants": tenants}),
        varied,
        told_alike(tenants, float(rng.uniform(0.25, 0.75))) if guessed else None,
    )


def told_alike(tenants: Mapping[str, Tenant], quantile: float = 0.5) -> dict[str, Tenant]:
    """`tenants` with that quantile of their TTFT and TPOT targets for all, as a guess; by default the median."""
    ttft, tpot = ([getattr(t.slo, name) for t in tenants.values()] for name in ("ttft_s", "tpot_s"))
    slo = Slo(ttft_s=float(np.quantile(ttft, quantile)), tpot_s=float(np.quantile(tpot, quantile)), guessed=True)
    return {name: tenant.model_copy(update={"slo": slo}) for name, tenant in tenants.items()}


def _fleet(fleet: Fleet, rng: np.random.Generator) -> Fleet:
    changes: dict[str, Any] = {"replicas": [_group(group, rng) for group in fleet.replicas]}
    age_s, gateways = float(rng.uniform(0, 6)), int(rng.integers(2, 4))
    up_s, down_s = float(rng.uniform(300, 900)), float(rng.uniform(10, 30))
    stale, several, failing = rng.random(3) < 0.4
    if stale:
        changes["scrape_s"] = age_s
    if several:
        changes["gateways"] = gateways
    if failing:
        changes["random_faults"] = RandomFaults(mean_up_s=up_s, mean_down_s=down_s)
    varied = fleet.model_copy(update=changes)
    # A fault of a replica that is not there, or has another name as it is alone, is none.
    return varied.model_copy(update={"faults": [fault for fault in fleet.faults if fault.replica in varied.names]})


def _group(group: ReplicaGroup, rng: np.random.Generator) -> ReplicaGroup:
    slower, memory = np.exp(rng.normal(0, 0.5)), np.exp(rng.normal(0, 0.3))
    profile = group.cost
    slowed = {name: value * slower for name, value in profile if isinstance(value, float) and name != "latency_s"}
    return group.model_copy(
        update={
            "profile": CostProfile.model_copy(profile, update=slowed),
            # No less than the longest request that it was made for.
            "kv_tokens": max(min(group.kv_tokens, group.max_model_len), int(group.kv_tokens * memory)),
            "count": max(1, round(group.count * rng.choice([0.5, 1, 2]))),
        }
    )


def _tenants(workload: Workload, rng: np.random.Generator) -> dict[str, WorkloadTenant]:
    factors = np.exp(rng.normal(0, 0.5, len(workload.tenants)))
    rates = np.array(list(workload.tenants_rps.values()))
    factors *= rates.sum() / (factors @ rates)
    higher, shorter, uneven = rng.uniform(0.7, 2), rng.uniform(0.5, 1), rng.uniform(0.7, 2)
    made = {}
    for (name, tenant), factor in zip(workload.tenants.items(), factors, strict=True):
        source = dict(tenant.source)
        for key in RATES:
            if key in type(tenant.made_source).model_fields:
                source[key] = float(getattr(tenant.made_source, key) * factor)
        if "arrivals" in source:
            source["arrivals"] = _arrivals(source["arrivals"], higher, shorter, uneven)
        guess = tenant.expected_output_tokens * float(np.exp(rng.normal(0, 0.7)))
        made[name] = WorkloadTenant.model_validate(
            tenant.model_dump() | {"source": source, "expected_output_tokens": guess}
        )
    return made


def _arrivals(arrivals: Mapping[str, Any], higher: float, shorter: float, uneven: float) -> dict[str, Any]:
    varied = dict(arrivals)
    if "cv" in varied:
        varied["cv"] = float(min(100.0, varied["cv"] * uneven))
    if varied.get("bursts"):
        bursts = varied["bursts"]
        varied["bursts"] = dict(bursts) | {
            "factor": [float(min(1000.0, max(1.0, f * higher))) for f in bursts["factor"]],
            "duration_s": [float(d * shorter) for d in bursts["duration_s"]],
        }
    return varied
