"""The live scheduler: the simulator's decision loop over real replicas and a real clock.

It owns what a router knows (`Bookkeeping`) and decides with the same compiled functions as the simulator. It
does no input or output: whoever speaks to clients and replicas tells it what happened, once for each event of
a `Ticket`. Not thread-safe: one event loop, one scheduler.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import numpy as np

from steersman.runtime import bookkeeping, router
from steersman.runtime.bookkeeping import new_bookkeeping
from steersman.runtime.deployment import Deployment, Release
from steersman.runtime.deployment.deployment import LIMIT_S as POLICY_LIMIT_S
from steersman.runtime.fleet import Fleet
from steersman.runtime.guard import Reason
from steersman.runtime.holding import pause_s
from steersman.runtime.observation import COLUMN, candidates_for
from steersman.runtime.policy import Policy
from steersman.runtime.pool import Pool
from steersman.runtime.situation import situation
from steersman.runtime.tenant import Tenant, tenant_table
from steersman.runtime.ticket import (
    DECODING,
    DISPATCH,
    HELD,
    HOLD,
    NO_REASONS,
    OVER,
    PREFILLING,
    REFUSED,
    SHED,
    WAITING,
    Decision,
    Fallback,
    LiveRequest,
    Served,
    Ticket,
)

ASSUMED = 10_000  # tickets that wait for an assumed token before those that are over are left out
_TTFT = COLUMN["predicted_ttft"]


class Scheduler:
    """guard → policy → decision over a fleet, and the counts behind it.

    For R replicas and C = `candidates` ≥ R + 2 (the default), `observe` fills `rows` float32 (C, WIDTH),
    `mask` bool (C,) and `reasons` int8 (C,), which are parts of the record `situation`. Without a `policy` the
    scheduler observes and counts, and somebody else decides. All times are seconds of `clock` since the scheduler
    was made.

    Raises:
        UserError: the candidates cannot hold the fleet.
    """

    def __init__(
        self,
        fleet: Fleet,
        tenants: Mapping[str, Tenant],
        policy: Policy | Release | None = None,
        fallback: Policy | Release | None = None,
        *,
        prefix_block_tokens: int = 64,
        candidates: int | None = None,
        policy_limit_s: float = POLICY_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fleet = fleet
        self.tenants = dict(tenants)
        self.replicas = fleet.table()
        self.candidates = candidates_for(len(self.replicas), candidates)
        self.prefix_block_tokens = prefix_block_tokens
        self.situation = np.zeros((), situation(self.candidates))
        self.rows, self.mask, self.reasons = (self.situation[name] for name in ("rows", "mask", "reasons"))
        self._matched = np.zeros(len(self.replicas))
        self._table = tenant_table(self.tenants)
        self._promises = [(tenant.slo.ttft_s, tenant.slo.tpot_s) for tenant in self.tenants.values()]
        self._clock = clock
        self.deployment: Deployment | None = None
        self._caps: dict[int, float] = {}
        self._assumed: list[tuple[float, int, Ticket, int]] = []  # a heap, by when a first token is taken to come
        self._numbers = 0
        self._router = router.Entries()
        self._compile()
        self._router = router.entries()
        self._start()
        if policy is not None and fallback is not None:
            self.deployment = Deployment(policy, fallback, self.rows, self.mask, policy_limit_s)

    @property
    def policy(self) -> Policy | None:
        """The current policy."""
        return None if self.deployment is None else self.deployment.current.policy

    @property
    def fallback(self) -> Policy | None:
        return None if self.deployment is None else self.deployment.fallback.policy

    @property
    def fallbacks(self) -> Mapping[Fallback, int]:
        """Decisions of the fallback, by reason."""
        return {} if self.deployment is None else self.deployment.fallbacks

    @property
    def now(self) -> float:
        return self._clock() - self._origin

    def inflight(self, replica: int) -> int:
        """Requests on a replica by the scheduler's own count."""
        return int(self.book.views["inflight"][replica])

    # Decisions

    def bounded(self, request: LiveRequest) -> LiveRequest:
        """The request, where it states no limit on its output with the tenant's mean output so far as one."""
        if request.max_tokens > 0:
            return request
        expected = math.ceil(self.book.tenant_views["output_tokens"][request.tenant])
        return request._replace(max_tokens=max(1, expected))

    def arrive(self, request: LiveRequest) -> Ticket:
        """A request came in; it is `bounded`."""
        request, now = self.bounded(request), self.now
        self._router.arrive(self._a, now, request.tenant)
        return Ticket(request, now)

    def observe(self, ticket: Ticket, exclude: Collection[int] = ()) -> int:
        """Fill `rows`, `mask` and `reasons` for a waiting request. Returns how many replicas are allowed.

        exclude: replicas that it has been tried on.
        """
        if self._assumed:
            self.catch_up()
        self._staged = self._stage(ticket.request.keys)
        caps = self._caps
        full = [r for r, cap in caps.items() if self.inflight(r) >= cap and self.replicas["up"][r] == 1] if caps else []
        if not full and not exclude:
            return self._look(ticket, False)
        up = self.replicas["up"].copy()
        try:
            self.replicas["up"][list(exclude)] = 0
            self.replicas["up"][full] = 2
            allowed = self._look(ticket, bool(exclude))
            if not allowed and full:  # rather one that starts slowly than none
                self.replicas["up"][full] = 1
                self.replicas["up"][list(exclude)] = 0
                allowed = self._look(ticket, bool(exclude))
        finally:
            self.replicas["up"] = up
        return allowed

    def _stage(self, keys: np.ndarray) -> int:
        if not len(keys):
            return 0
        before = self._pool.blocks
        staged = self._pool.stage(keys)
        if self._pool.blocks is not before:
            router.set_blocks(self._record, self._pool.blocks)
        return staged

    def _look(self, ticket: Ticket, again: bool) -> int:
        q, now = ticket.request, self.now
        return int(
            self._router.observe(
                self._a,
                now,
                q.tenant,
                q.prompt_tokens,
                q.max_tokens,
                q.model,
                q.regions,
                q.priority,
                self._staged,
                len(q.keys),
                q.block_tokens,
                now - ticket.arrived_s if again or ticket.holds else 0.0,
            )
        )

    def decide(self, ticket: Ticket, exclude: Collection[int] = ()) -> Decision:
        """Guard, score, pick. The caller carries it out with `dispatched`, `held` or `shed`."""
        if not self.observe(ticket, exclude):
            masked = Counter(Reason(int(reason)) for reason in self.reasons[: len(self.replicas)])
            return Decision(REFUSED, -1, "guard", 0.0, None, masked, version="guard")
        if self.deployment is None:
            raise RuntimeError("this scheduler has no policy and fallback")
        choice, policy, version, arm, decision_s, failure, scores = self.deployment.decide(ticket)
        if choice < 0:  # nobody scores: the emptiest replica is never a bad answer
            inflight = np.where(self.mask[: len(self.replicas)], self.book.views["inflight"], np.inf)
            policy = version = "least-inflight"
            choice = int(np.argmin(inflight))
        if choice < len(self.replicas) and self.mask[choice]:
            return Decision(DISPATCH, choice, policy, decision_s, failure, NO_REASONS, 1.0, scores, version, arm)
        if choice == self.candidates - 2 and self.mask[choice]:
            return Decision(HOLD, -1, policy, decision_s, failure, NO_REASONS, 1.0, scores, version, arm)
        retry_after_s = self._retry_after_s(ticket)
        return Decision(SHED, -1, policy, decision_s, failure, NO_REASONS, retry_after_s, scores, version, arm)

    def _over(self, ticket: Ticket, attained: bool, failed: bool) -> None:
        """A request is over: its policy's deployment counts how it fared."""
        ticket.stage = OVER
        if self.deployment is not None:
            self.deployment.over(ticket, attained, failed)

    def _retry_after_s(self, ticket: Ticket) -> float:
        allowed = self.mask[: len(self.replicas)]
        best = float(self.rows[: len(self.replicas), _TTFT][allowed].min())
        return max(1.0, best - float(self._promises[ticket.request.tenant][0]))

    # Events, each counted once

    def dispatched(self, ticket: Ticket, replica: int) -> None:
        """A waiting request goes to `replica`; call right after `observe` or `decide`."""
        if ticket.stage is not WAITING:
            return
        q = ticket.request
        ticket.matched_tokens = int(self._matched[replica])
        ticket.uncached_tokens = q.prompt_tokens - ticket.matched_tokens
        ticket.predicted_ttft_s = float(self.rows[replica, _TTFT])
        ticket.replica, ticket.stage, ticket.attempts = replica, PREFILLING, ticket.attempts + 1
        self._router.dispatch(
            self._a,
            self.now,
            replica,
            q.tenant,
            q.prompt_tokens,
            ticket.uncached_tokens,
            self._staged,
            len(q.keys),
            self._cache_blocks[replica],
        )
        self._pool.keep(len(q.keys))

    def held(self, ticket: Ticket) -> float:
        """A waiting request is held. Returns the seconds after which it is `resumed`, to be decided anew."""
        if ticket.stage is not WAITING:
            return 0.0
        ticket.stage, ticket.holds = HELD, ticket.holds + 1
        self.book.fleet["held"] += 1.0
        return float(pause_s(self._promises[ticket.request.tenant][0]))

    def resumed(self, ticket: Ticket) -> None:
        """A held request waits for a decision again."""
        if ticket.stage is HELD:
            ticket.stage = WAITING
            self.book.fleet["held"] -= 1.0

    def given_up(self, ticket: Ticket, after_s: float | None = None) -> bool:
        """The client of a held request has left, `after_s` it arrived (by default: now), or its deadline came.

        Returns whether its promise was not broken by then; one that is late missed it.
        """
        if ticket.stage is not HELD:
            return False
        self.resumed(ticket)
        waited_s = self.now - ticket.arrived_s if after_s is None else after_s
        attained = not ticket.late and bool(waited_s <= self._promises[ticket.request.tenant][0])
        self._router.settle(self._a, ticket.request.tenant, attained)
        self._over(ticket, attained, failed=ticket.late)
        return attained

    def first_token(self, ticket: Ticket, assumed: bool = False) -> None:
        """The first token came, or (`assumed`) must have come by now, where a response does not show it."""
        if ticket.stage is PREFILLING:
            now = self.now
            self._router.first_token(self._a, now, ticket.replica, ticket.request.prompt_tokens, ticket.uncached_tokens)
            ticket.stage, ticket.streamed = DECODING, 1
            if not assumed:
                ticket.seen, ticket.first_token_s, ticket.last_token_s = True, now, now

    def assume_first_token(self, ticket: Ticket) -> None:
        """The answer will not show its first token: it is taken to come when it was predicted."""
        self._numbers += 1
        heapq.heappush(
            self._assumed, (ticket.arrived_s + ticket.predicted_ttft_s, self._numbers, ticket, ticket.attempts)
        )
        if len(self._assumed) > ASSUMED:
            self._assumed = [entry for entry in self._assumed if entry[2].stage is PREFILLING]
            heapq.heapify(self._assumed)

    def catch_up(self) -> None:
        """Count the first tokens that are taken to have come by now; `observe` does so before it looks."""
        now, assumed = self.now, self._assumed
        while assumed and assumed[0][0] <= now:
            _, _, ticket, attempt = heapq.heappop(assumed)
            if ticket.attempts == attempt:
                self.first_token(ticket, assumed=True)

    def streamed(self, ticket: Ticket, tokens: int) -> None:
        """`tokens` more came after the first."""
        if ticket.stage is DECODING and tokens > 0:
            self._context_tokens[ticket.replica] += tokens  # `bookkeeping.stream`, without the price of a call
            ticket.streamed += tokens
            ticket.last_token_s = self.now

    def ended(self, ticket: Ticket, ok: bool, tokens: int | None = None, left: bool = False) -> Served | None:
        """The request is over, well or not. `tokens`: its true output length, if the replica told it.

        left: its client gave it up, so it is not ok, but meets its promise if that was not broken by then.

        Returns how it fared, or None if it was over already. A request that was not streamed meets its
        promise if it ends within TTFT + (tokens − 1) · TPOT.
        """
        if ticket.stage not in (PREFILLING, DECODING):
            return None
        now, q, started = self.now, ticket.request, ticket.stage is DECODING
        if started and tokens is not None and tokens != ticket.streamed:
            self._context_tokens[ticket.replica] += tokens - ticket.streamed
            ticket.streamed = tokens
        elif ok and not started:  # nothing of it was counted as context
            ticket.streamed = 1 if tokens is None else tokens
        served = self._fared(ticket, now, ok or left)
        self._router.end(
            self._a,
            now,
            ticket.replica,
            q.tenant,
            q.prompt_tokens,
            ticket.uncached_tokens,
            ticket.streamed,
            started,
            ok,
            served.attained,
        )
        self._over(ticket, served.attained, failed=not (ok or left))
        return served

    def _fared(self, ticket: Ticket, now: float, ok: bool) -> Served:
        (ttft_slo_s, tpot_slo_s), tokens = self._promises[ticket.request.tenant], ticket.streamed
        e2e = now - ticket.arrived_s
        if ticket.seen:
            ttft = ticket.first_token_s - ticket.arrived_s
            tpot = (ticket.last_token_s - ticket.first_token_s) / (tokens - 1) if tokens > 1 else 0.0
            kept = ttft <= ttft_slo_s and tpot <= tpot_slo_s
        else:
            ttft = tpot = math.nan
            kept = e2e <= ttft_slo_s + max(0, tokens - 1) * tpot_slo_s
        return Served(ttft, tpot, e2e, tokens, ok and kept)

    def withdrawn(self, ticket: Ticket) -> None:
        """A replica failed before it gave anything: the request waits again, for another one."""
        if ticket.stage not in (PREFILLING, DECODING):
            return
        self._router.withdraw(
            self._a,
            self.now,
            ticket.replica,
            ticket.request.tenant,
            ticket.request.prompt_tokens,
            ticket.uncached_tokens,
            ticket.streamed,
            ticket.stage is DECODING,
        )
        ticket.stage, ticket.replica, ticket.streamed, ticket.seen = WAITING, -1, 0, False

    def shed(self, ticket: Ticket) -> None:
        """A waiting request is turned away: shed, or no replica is left for it. It missed its promise."""
        if ticket.stage is WAITING:
            self._router.settle(self._a, ticket.request.tenant, False)
            self._over(ticket, attained=False, failed=ticket.attempts > 0)

    def abandoned(self, ticket: Ticket) -> bool:
        """Something of ours failed on a request: one that is not over ends as missed. Returns whether it was not."""
        if ticket.stage is OVER:
            return False
        self.resumed(ticket)
        if ticket.stage is WAITING:
            self.shed(ticket)
        else:
            self.ended(ticket, ok=False)
        return True

    # Replicas

    def scraped(self, replica: int, running: float, waiting: float, kv_use: float) -> None:
        """Fresh metrics of a replica's engine."""
        view = self.book.views[replica]
        view["running"], view["waiting"], view["kv_use"] = running, waiting, min(1.0, max(0.0, kv_use))
        view["scraped_at_s"] = self.now

    def set_up(self, replica: int, up: bool, kept_cache: bool = False) -> None:
        """Whether a replica may take requests. One that comes up again has lost its cache, unless it `kept_cache`."""
        if up and not kept_cache and not self.replicas["up"][replica]:
            bookkeeping.forget(self.book, replica)
        self.replicas["up"][replica] = int(up)

    def set_cap(self, replica: int, cap: float) -> None:
        """How many requests a replica may have in flight, while another one may take them; infinite: any number."""
        if cap == math.inf:
            self._caps.pop(replica, None)
        else:
            self._caps[replica] = cap

    def _start(self) -> None:
        self._origin = self._clock()
        self.book = new_bookkeeping(self.replicas, self._table, self.prefix_block_tokens)
        self._context_tokens = self.book.views["context_tokens"]
        self._pool, self._staged = Pool(self.book), 0
        self._cache_blocks = [int(tokens) // self.prefix_block_tokens for tokens in self.replicas["kv_tokens"]]
        self._record = router.router_record(
            self.replicas, self.book, self._pool.blocks, self._matched, self.rows, self.mask, self.reasons
        )
        self._a = int(self._record.ctypes.data)

    def _compile(self) -> None:
        """Play requests through every event on counts of their own: no client waits for the compiler."""
        self._start()
        bookkeeping.forget(self.book, 0)
        keys = np.arange(2, dtype=np.int64)
        for ending in (self.given_up, self.withdrawn, lambda ticket: self.ended(ticket, True, 3)):
            ticket = self.arrive(LiveRequest(0, 200, 8, keys, self.prefix_block_tokens))
            self.observe(ticket)
            if ending == self.given_up:
                self.held(ticket)
            else:
                self.dispatched(ticket, 0)
                self.first_token(ticket)
                self.streamed(ticket, 1)
            ending(ticket)
