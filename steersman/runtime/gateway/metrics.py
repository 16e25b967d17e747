"""The gateway's own metrics, for Prometheus.

Counting on the path of a request is an addition to a dictionary; names, labels and text are made when asked for.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from steersman.runtime.gateway.audit import Audit
from steersman.runtime.journal import Journal
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import DISPATCH, REFUSED, Decision, Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 50)
_TPOT_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
_E2E_S = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300)


class Counts:
    """A counter with labels: one number for each of their values."""

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self.name, self.text, self.labels = name, text, labels
        self.values: defaultdict[tuple[str, ...], float] = defaultdict(float)

    def add(self, *values: str, by: float = 1.0) -> None:
        self.values[values] += by

    def metric(self) -> Metric:
        family = CounterMetricFamily(f"steersman_{self.name}", self.text, labels=self.labels)
        for values, count in self.values.items():
            family.add_metric(values, count)
        return family


class Histogram:
    """A histogram with at most one label."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> None:
        self.name, self.text, self.bounds, self.labels = name, text, bounds, labels
        self._counts: dict[str, list[int]] = {}
        self._sums: defaultdict[str, float] = defaultdict(float)

    def observe(self, value: float, label: str = "") -> None:
        counts = self._counts.get(label)
        if counts is None:
            counts = self._counts[label] = [0] * (len(self.bounds) + 1)
        counts[bisect_left(self.bounds, value)] += 1
        self._sums[label] += value

    def metric(self) -> Metric:
        family = HistogramMetricFamily(f"steersman_{self.name}", self.text, labels=self.labels)
        counted = self._counts or ({} if self.labels else {"": [0] * (len(self.bounds) + 1)})
        for label, counts in counted.items():
            total, buckets = 0, []
            for bound, count in zip((*self.bounds, math.inf), counts, strict=True):
                total += count
                buckets.append(("+Inf" if bound == math.inf else str(float(bound)), total))
            family.add_metric((label,) if self.labels else (), buckets, self._sums[label])
        return family


def of_journal(journal: Journal) -> Iterator[Metric]:
    """What a journal counts."""
    for name, text, count in (
        ("written", "Decisions written to the journal", journal.written),
        ("dropped", "Decisions that the journal had to drop", journal.dropped),
        ("failures", "Journal files that could not be written", journal.failures),
    ):
        family = CounterMetricFamily(f"steersman_journal_{name}", text)
        family.add_metric((), count)
        yield family
    yield GaugeMetricFamily("steersman_journal_bytes", "Size of the journal's files", journal.bytes)


def of_caches(names: Sequence[str], hit_rates: Sequence[float]) -> Iterator[Metric]:
    """What engines say of their prefix caches; of those that do not, nothing."""
    family = GaugeMetricFamily(
        "steersman_engine_prefix_hit_rate",
        "Share of prompt tokens that an engine had cached so far",
        labels=("replica",),
    )
    for name, rate in zip(names, hit_rates, strict=True):
        if rate == rate:
            family.add_metric((name,), rate)
    yield family


def of_audit(audit: Audit) -> Iterator[Metric]:
    """What an audit log counts."""
    family = CounterMetricFamily("steersman_audit_failures", "Writes of the audit log that failed and are tried again")
    family.add_metric((), audit.failed)
    yield family


def http_metrics(connections: int, rejected: Mapping[int, int]) -> Iterator[Metric]:
    """What the HTTP server counts: clients connected now, and answers to what no handler saw, by status."""
    yield GaugeMetricFamily("steersman_connections", "Open connections of clients", float(connections))
    text = "Requests refused before they were looked at: malformed, too large, too slow"
    family = CounterMetricFamily("steersman_http_rejected", text, labels=("status",))
    for status, count in rejected.items():
        family.add_metric((str(status),), count)
    yield family


class Metrics(Collector):
    """Counts and histograms of one gateway."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.tenants = list(scheduler.tenants)
        self._names = scheduler.fleet.names
        # Who decided is what a deployment counts, by policy; here, what.
        self._decisions = Counts("decisions", "Decisions by the replica chosen, or hold, or shed", "replica")
        self._refused = Counts("refused", "Requests that no replica may take, by reason", "reason")
        self._ttft_s = Histogram("ttft_seconds", "Arrival to first token, streams only", _TTFT_S, "tenant")
        self._tpot_s = Histogram(
            "tpot_seconds", "Time per output token after the first, streams only", _TPOT_S, "tenant"
        )
        self._e2e_s = Histogram("e2e_seconds", "Arrival to last token", _E2E_S, "tenant")
        self._requests = Counts("requests", "Requests by what became of them", "tenant", "outcome")
        self._attained = Counts("attained", "Requests that met both SLOs", "tenant")
        self._tokens = Counts("output_tokens", "Output tokens", "replica")
        self._errors = Counts("errors", "Failed attempts by replica and kind", "replica", "kind")
        self._limited = Counts("limited", "Requests over a tenant's limits, by limit", "tenant", "limit")
        self._answered_errors = Counts(
            "answered_errors", "Errors that clients were answered with, by status and code", "status", "code"
        )
        self._retries = Counts("retries", "Attempts after one that failed, by the replica that failed", "replica")
        for tenant in self.tenants:
            self._attained.add(tenant, by=0.0)
        for name in self._names:
            self._tokens.add(name, by=0.0)
        self._more: list[Callable[[], Iterable[Metric]]] = []
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def add(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """`collect` gives further metrics, whenever they are asked for."""
        self._more.append(collect)

    def decided(self, decision: Decision) -> None:
        """A decision was taken."""
        kind = decision.kind
        if kind is REFUSED:
            for reason in decision.reasons:
                self._refused.add(reason.name.lower())
        else:
            self._decisions.add(self._names[decision.replica] if kind is DISPATCH else kind.value)

    def over(self, tenant: int, outcome: str, attained: bool) -> None:
        """A request is over, as `Gateway.ended` tells, or over a limit (limited)."""
        name = self.tenants[tenant]
        self._requests.add(name, outcome)
        if attained:
            self._attained.add(name)

    def served(self, tenant: int, replica: int, served: Served) -> None:
        """A replica answered a request in full."""
        name = self.tenants[tenant]
        if served.ttft_s == served.ttft_s:
            self._ttft_s.observe(served.ttft_s, name)
            if served.tokens > 1:
                self._tpot_s.observe(served.tpot_s, name)
        self._e2e_s.observe(served.e2e_s, name)
        self._tokens.add(self._names[replica], by=served.tokens)

    def limited(self, tenant: str, limit: str) -> None:
        """A request was turned away because its tenant is over a limit."""
        self._limited.add(tenant, limit)

    def answered_error(self, status: int, code: str | None) -> None:
        """A client was answered with an error of the gateway's own, whether its request was let in or not."""
        self._answered_errors.add(str(status), code or "")

    def error(self, replica: int, kind: str) -> None:
        """An attempt on a replica failed.

        kind: connect, broke (before its answer), cut (in its answer), status, busy, or silent.
        """
        self._errors.add(self._names[replica], kind)

    def retried(self, replica: int) -> None:
        """A request that `replica` failed is tried on another one."""
        self._retries.add(self._names[replica])

    def collect(self) -> Iterator[Metric]:
        """All of it, for a registry."""
        for counts in (
            self._decisions,
            self._refused,
            self._requests,
            self._attained,
            self._tokens,
            self._errors,
            self._limited,
            self._answered_errors,
            self._retries,
        ):
            yield counts.metric()
        for histogram in (self._ttft_s, self._tpot_s, self._e2e_s):
            yield histogram.metric()
        scheduler = self._scheduler
        yield GaugeMetricFamily(
            "steersman_held", "Requests that wait at the gateway now", float(scheduler.book.fleet["held"][0])
        )
        yield self._gauge("inflight", "Requests on a replica now", scheduler.book.views["inflight"])
        yield self._gauge("replica_up", "Whether a replica may take requests", scheduler.replicas["up"] == 1)
        yield self._gauge(
            "engine_running", "Sequences in an engine's batch, as scraped", scheduler.book.views["running"]
        )
        yield self._gauge("engine_waiting", "Requests queued in an engine, as scraped", scheduler.book.views["waiting"])
        yield self._gauge(
            "engine_kv_use", "Share of an engine's KV cache in use, as scraped", scheduler.book.views["kv_use"]
        )
        age = scheduler.now - scheduler.book.views["scraped_at_s"]
        yield self._gauge("engine_metrics_age_seconds", "Since an engine's metrics were last read", age)
        for collect in self._more:
            yield from collect()

    def _gauge(self, name: str, text: str, values: Iterable[float]) -> Metric:
        """One number a replica."""
        family = GaugeMetricFamily(f"steersman_{name}", text, labels=("replica",))
        for replica, value in zip(self._names, values, strict=True):
            family.add_metric((replica,), float(value))
        return family

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
