"""The last seconds of service as an `Episode`: summarised as simulated ones are, under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from steersman.runtime.outcomes import USAGE, Episode, Outcomes, State, Summary, summarise
from steersman.runtime.requests import REQUEST, Requests
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.tenant import Tenant
from steersman.runtime.ticket import Served, Ticket

_STATES = {"done": State.DONE, "shed": State.SHED, "cancelled": State.CANCELLED}
MOST = 100_000  # requests of one window; of more, the first ones count


class Gathered(NamedTuple):
    """A window that is over."""

    rows: list[tuple[float, ...]]
    usage: np.ndarray  # USAGE (R,)
    duration_s: float


class Window:
    """Gathers what ended since the last `take`. A request belongs to the window in which it ended.

    Replicas are busy while they have requests; their occupancy is by the gateway's own count, their KV use as scraped.
    """

    def __init__(self, scheduler: Scheduler, tenants: Mapping[str, Tenant]) -> None:
        self._scheduler, self._tenants, self._fleet = scheduler, dict(tenants), scheduler.fleet
        self._slots = scheduler.replicas["max_num_seqs"].astype(float)
        self._began_s = self._sampled_s = scheduler.now
        self._rows: list[tuple[float, ...]] = []
        self._usage = np.zeros(len(self._slots), USAGE)

    def over(self, ticket: Ticket, outcome: str, served: Served | None, attained: bool, cached: int = 0) -> None:
        """A request is over, as `Gateway.ended` tells."""
        if len(self._rows) >= MOST:
            return
        q = ticket.request
        ttft, tpot, e2e, tokens, met = served if served is not None else (np.nan, np.nan, np.nan, 0, attained)
        self._rows.append(
            (
                ticket.arrived_s,
                q.tenant,
                q.prompt_tokens,
                _STATES.get(outcome, State.FAILED),
                ticket.replica,
                ttft,
                tpot,
                e2e,
                met,
                cached,
                ticket.holds,
                tokens,
            )
        )

    def sample(self) -> None:
        """Count the time since the last sample as the fleet is now. Call about once a second."""
        now = self._scheduler.now
        elapsed, self._sampled_s = max(0.0, now - self._sampled_s), now
        views = self._scheduler.book.views
        self._usage["busy_s"] += elapsed * (views["inflight"] > 0)
        self._usage["sequence_s"] += elapsed * np.minimum(views["inflight"], self._slots)
        self._usage["kv_s"] += elapsed * views["kv_use"]

    def take(self) -> Gathered:
        """What has gathered since the last `take`, and a new window."""
        self.sample()
        now = self._scheduler.now
        gathered = Gathered(self._rows, self._usage, now - self._began_s)
        self._rows, self._usage, self._began_s = [], np.zeros_like(self._usage), now
        return gathered

    def summary(self, gathered: Gathered, policy: str) -> Summary | None:
        """Its figures, under the name of the policy in use; None where no time has passed. Fit for another thread."""
        rows, usage, duration_s = gathered
        if duration_s <= 0.0:
            return None
        columns = np.array(sorted(rows), float).reshape(len(rows), 12).T
        table = np.zeros(len(rows), REQUEST)
        table["arrival_s"], table["tenant"], table["prompt_tokens"] = columns[:3]
        replica = columns[4].astype(np.int32)
        for r in range(len(usage)):
            usage["output_tokens"][r] = int(columns[11][replica == r].sum())
        outcomes = Outcomes(
            state=columns[3].astype(np.int8),
            replica=replica,
            ttft_s=columns[5],
            tpot_s=columns[6],
            e2e_s=columns[7],
            attained=columns[8].astype(np.bool_),
            cached_tokens=columns[9].astype(np.int32),
            holds=columns[10].astype(np.int32),
        )
        requests = Requests(table, np.zeros(0, np.int64), 1, self._tenants, duration_s)
        episode = Episode(requests, outcomes, usage, duration_s)
        return summarise(policy, [episode], self._fleet.names, self._slots, self._fleet.price_per_hour)
