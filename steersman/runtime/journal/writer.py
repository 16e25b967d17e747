"""The journal as the gateway sees it: two calls a request, which copy a little and never raise."""

from __future__ import annotations

import queue
import secrets
import struct
import threading
import time
from collections.abc import Mapping

import numpy as np

from steersman import __version__
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.journal.config import JournalConfig
from steersman.runtime.journal.segment import CODES, PACK_DECISION, PACK_REQUEST, Batch, Ending, Header, pack
from steersman.runtime.journal.store import Store
from steersman.runtime.observation import WIDTH
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.tenant import Tenant
from steersman.runtime.ticket import DISPATCH, HOLD, REFUSED, Decision, Fallback, Served, Ticket

SEGMENT_BYTES = 32 << 20  # of memory, at most: a large fleet, or long prompts, have fewer decisions in a file
_FALLBACKS = {fallback: code for code, fallback in enumerate(Fallback)}
_DECIDED = PACK_DECISION.pack
_OVER = PACK_REQUEST.pack


class Journal:
    """Writes what one scheduler decides. `decided` and `over` belong to its event loop; a thread of its own packs and
    writes. What cannot be written is dropped and counted: serving never waits for it, and memory stays bounded.

    written, dropped: decisions. failures: files that could not be written. last_error: why the last one could not.
    """

    def __init__(self, config: JournalConfig, fleet: Fleet, tenants: Mapping[str, Tenant]) -> None:
        """
        Raises:
            UserError: the folder cannot be used.
        """
        self.config = config
        self.written = self.dropped = self.failures = 0
        self.last_error = ""
        try:
            self._store = Store(config.folder, config.max_mib << 20)
        except OSError as error:
            raise UserError(
                f"{config.folder}: the journal cannot be written there: {error.strerror or error}; name another folder"
            ) from None
        self._header = Header(
            steersman=__version__,
            run=secrets.token_hex(8),
            sequence=0,
            started_s=0.0,
            lost_decisions=0,
            candidates=len(fleet.names) + 2,
            fleet=portable(fleet),
            # Only what is promised: a tenant's model may have more, such as its keys.
            tenants={name: Tenant.model_validate({k: getattr(t, k) for k in _TENANT}) for name, t in tenants.items()},
            policies=[],
            fallbacks=list(Fallback),
            endings=list(Ending),
        )
        self._scheduler: Scheduler | None = None
        self._candidates = self._decision_bytes = 0
        self._no_scores = b""
        self._limit = config.memory_mib << 20
        self._segment_bytes = min(SEGMENT_BYTES, self._limit // 4)
        self._started_s = 0.0
        self._numbers = self._order = 0
        self._policies: dict[tuple[str, str], int] = {}
        self._open: dict[Ticket, tuple[int, list[bytes]]] = {}
        self._open_bytes = 0  # of decisions whose requests are not over
        self._waiting_bytes = 0  # of those that are not written
        self._batch = Batch()
        self._lock = threading.Lock()  # for the batch, what waits, and the counters
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    @property
    def files(self) -> int:
        """Files in the folder."""
        return self._store.files

    @property
    def bytes(self) -> int:
        """Their size."""
        return self._store.bytes

    # What the event loop calls

    def decided(self, scheduler: Scheduler, ticket: Ticket, decision: Decision) -> None:
        """A decision was made; call right after it, before anything else is observed."""
        if scheduler is not self._scheduler and not self._follow(scheduler):
            return
        if self._open_bytes + self._waiting_bytes >= self._limit:
            self._drop(1, "decisions come faster than they are written; raise memory_mib, or look at the disk")
            return
        entry = self._open.get(ticket)
        if entry is None:
            entry = self._open[ticket] = self._numbers, []
            self._numbers += 1
        kind = decision.kind
        if kind is DISPATCH:
            choice = decision.replica
        elif kind is REFUSED:
            choice = -1
        else:
            choice = self._candidates - (2 if kind is HOLD else 1)
        who = decision.policy, decision.version
        policy = self._policies.get(who)
        if policy is None:
            policy = self._policies[who] = len(self._policies)
        scores = decision.scores
        record = _DECIDED(
            entry[0],
            self._order,
            int(scheduler.now * 1e6),
            decision.decision_s,
            choice,
            policy,
            -1 if decision.fallback is None else _FALLBACKS[decision.fallback],
        )
        told = self._no_scores if scores is None or scores.nbytes != len(self._no_scores) else scores.tobytes()
        entry[1].append(record + scheduler.situation.tobytes() + told)
        self._order += 1
        self._open_bytes += self._decision_bytes

    def over(
        self,
        ticket: Ticket,
        outcome: str,
        served: Served | None = None,
        *,
        attained: bool = False,
        cached_tokens: int = -1,
    ) -> None:
        """A request is over; once for each ticket.

        outcome: a value of `Ending`. served: how it fared, if it went to a replica. attained: whether it met its
        promise, where `served` does not say. cached_tokens: prompt tokens from the replica's cache, if it told.
        """
        entry = self._open.pop(ticket, None)
        if entry is None:
            return
        number, copies = entry
        size = len(copies) * self._decision_bytes
        self._open_bytes -= size
        scheduler, q = self._scheduler, ticket.request
        assert scheduler is not None
        ttft_s, tpot_s, e2e_s, tokens, met = served or (
            ticket.first_token_s - ticket.arrived_s,
            np.nan,
            scheduler.now - ticket.arrived_s,
            ticket.streamed,
            attained,
        )
        keys = q.keys.tobytes()
        try:
            record = _OVER(
                number,
                int(ticket.arrived_s * 1e6),
                q.regions,
                q.tenant,
                q.prompt_tokens,
                q.max_tokens,
                q.block_tokens,
                len(q.keys),
                q.priority,
                q.model,
                ticket.replica,
                tokens,
                cached_tokens,
                ticket.matched_tokens,
                len(copies),
                ticket.holds,
                ttft_s,
                tpot_s,
                e2e_s,
                CODES.get(outcome, 0),  # type: ignore[call-overload]
                met,
            )
        except (struct.error, OverflowError):  # a number that no honest client sends
            self._drop(len(copies), "a request had a number that no column holds")
            return
        size += len(keys)
        with self._lock:
            batch = self._batch
            batch.requests.append(record)
            batch.keys.append(keys)
            batch.decisions += copies
            batch.size += size
            self._waiting_bytes += size
            if len(batch.decisions) >= self.config.segment_decisions or batch.size >= self._segment_bytes:
                self._batch = Batch()
                self._queue.put(batch)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what there is; requests that are not over are kept as unended. Takes `timeout_s` at most."""
        if self._closed:
            return
        for ticket in list(self._open):
            self.over(ticket, Ending.UNENDED)
        self._closed, self._scheduler = True, None
        with self._lock:
            self._queue.put(self._batch)
            self._queue.put(None)
            self._batch = Batch()
        self._thread.join(timeout_s)

    def _follow(self, scheduler: Scheduler) -> bool:
        """Get to know the scheduler. Returns whether the journal is open and is of this scheduler."""
        if self._closed or self._scheduler is not None:
            self._drop(1, "the journal is closed" if self._closed else "another scheduler has this journal")
            return False
        self._scheduler, self._candidates = scheduler, scheduler.candidates
        self._started_s = time.time() - scheduler.now
        self._no_scores = np.full(scheduler.candidates, np.nan).tobytes()
        self._decision_bytes = scheduler.candidates * (4 * WIDTH + 10) + 500  # with what Python needs
        return True

    def _drop(self, decisions: int, why: str) -> None:
        with self._lock:
            self.dropped += decisions
            self.last_error = why

    # What the thread does

    def _work(self) -> None:
        while True:
            try:
                batch = self._queue.get(timeout=self.config.segment_s)
            except queue.Empty:
                with self._lock:
                    batch, self._batch = self._batch, Batch()
            if batch is None:
                return
            if batch.decisions:
                self._write(batch)
            with self._lock:
                self._waiting_bytes -= batch.size

    def _write(self, batch: Batch) -> None:
        told = {
            "sequence": self._store.sequence,
            "started_s": self._started_s,
            "lost_decisions": self.dropped,
            "candidates": self._candidates,
            "policies": list(self._policies),
        }
        try:
            self._store.put(pack(batch, self._header.model_copy(update=told)))
        except Exception as error:  # a full disk, most likely: the next file may fit again
            why = error.strerror or error if isinstance(error, OSError) else repr(error)
            self._drop(len(batch.decisions), f"{self.config.folder}: the journal could not be written: {why}")
            self.failures += 1
        else:
            self.written += len(batch.decisions)


_TENANT = tuple(Tenant.model_fields)


def portable(fleet: Fleet) -> Fleet:
    """The fleet as others can simulate it: with its cost profiles inside, without its backends, which name hosts."""
    groups = [group.model_copy(update={"backend": None, "profile": group.cost}) for group in fleet.replicas]
    return fleet.model_copy(update={"replicas": groups})
