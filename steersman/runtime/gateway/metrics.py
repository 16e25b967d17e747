"""The gateway's own metrics, for Prometheus."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Decision, Kind, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_DECISION_S = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.1)
_TTFT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 50)
_TPOT_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
_E2E_S = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300)


class Metrics:
    """Counts and histograms of one gateway."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._tenants = list(scheduler.tenants)
        self._names = scheduler.fleet.names
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"steersman_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"steersman_{name}", text, labels, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"steersman_{name}", text, labels, registry=registry)

        self._decisions = counter(
            "decisions", "Decisions by replica (or hold, or shed) and the policy that took them", "replica", "policy"
        )
        self._shed = counter("shed", "Requests turned away by the policy", "tenant", "policy")
        self._refused = counter("refused", "Requests that no replica may take, by reason", "reason")
        self._fallbacks = counter("fallbacks", "Decisions of the fallback heuristic, by reason", "reason")
        self._decision_s = histogram("decision_seconds", "Time that the policy took to score", _DECISION_S)
        self._ttft_s = histogram("ttft_seconds", "Arrival to first token, streams only", _TTFT_S, "tenant")
        self._tpot_s = histogram(
            "tpot_seconds", "Time per output token after the first, streams only", _TPOT_S, "tenant"
        )
        self._e2e_s = histogram("e2e_seconds", "Arrival to last token", _E2E_S, "tenant")
        self._requests = counter("requests", "Requests by what became of them", "tenant", "outcome")
        self._attained = counter("attained", "Requests that met both SLOs", "tenant")
        self._tokens = counter("output_tokens", "Output tokens", "replica")
        self._errors = counter("errors", "Failed attempts by replica and kind", "replica", "kind")
        self._inflight = gauge("inflight", "Requests on a replica now", "replica")
        self._held = gauge("held", "Requests that wait at the gateway now")
        self._up = gauge("replica_up", "Whether a replica may take requests", "replica")
        policy, fallback = scheduler.policy, scheduler.fallback
        if policy is not None and fallback is not None:
            gauge("policy_info", "The policy in use", "policy", "fallback").labels(policy.name, fallback.name).set(1)
        for tenant in self._tenants:
            self._attained.labels(tenant)
        for name in self._names:
            self._tokens.labels(name)

    def decided(self, tenant: int, decision: Decision) -> None:
        """A decision was taken."""
        if decision.kind is Kind.REFUSED:
            for reason in decision.reasons:
                self._refused.labels(reason.name.lower()).inc()
            return
        self._decision_s.observe(decision.decision_s)
        if decision.fallback is not None:
            self._fallbacks.labels(decision.fallback).inc()
        if decision.kind is Kind.SHED:
            self._shed.labels(self._tenants[tenant], decision.policy).inc()
            self._decisions.labels("shed", decision.policy).inc()
        elif decision.kind is Kind.HOLD:
            self._decisions.labels("hold", decision.policy).inc()
        else:
            self._decisions.labels(self._names[decision.replica], decision.policy).inc()

    def over(self, tenant: int, outcome: str) -> None:
        """A request is over: done, shed, refused, failed, rejected (by the replica) or cancelled."""
        self._requests.labels(self._tenants[tenant], outcome).inc()

    def served(self, tenant: int, replica: int, served: Served) -> None:
        """A replica answered a request in full."""
        name = self._tenants[tenant]
        if not math.isnan(served.ttft_s):
            self._ttft_s.labels(name).observe(served.ttft_s)
            if served.tokens > 1:
                self._tpot_s.labels(name).observe(served.tpot_s)
        self._e2e_s.labels(name).observe(served.e2e_s)
        self._tokens.labels(self._names[replica]).inc(served.tokens)
        if served.attained:
            self._attained.labels(name).inc()

    def error(self, replica: int, kind: str) -> None:
        """An attempt on a replica failed: `connect`, `status`, `cut` (the answer broke off) or `timeout`."""
        self._errors.labels(self._names[replica], kind).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        self._held.set(float(self._scheduler.book.fleet["held"][0]))
        for r, name in enumerate(self._names):
            self._inflight.labels(name).set(self._scheduler.inflight(r))
            self._up.labels(name).set(int(self._scheduler.replicas["up"][r]))
        return generate_latest(self.registry)
