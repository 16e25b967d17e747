"""The simulated cluster again, as `docs/simulator.md` has it: iteration by iteration, plain and slow, to be read.

It shares nothing with the compiled core but the tables that describe an episode. It plays given actions; what only
policies see (observations, scrapes, beliefs) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from steersman.runtime.fleet import Batching, Queue
from steersman.runtime.outcomes import State
from steersman.runtime.requests import Requests
from steersman.runtime.simulator.faults import Kind

OUTPUT_MEMORY = 200.0  # requests over which a gateway's mean output length decays


def plain(row: np.void) -> Any:
    """A row of a structured array as an object with Python numbers."""
    return SimpleNamespace(**{name: row[name].item() for name in row.dtype.names or ()})


class Cache:
    """The prefix blocks in the KV memory of a replica: how many sequences hold each, and when it was last used."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.released: dict[int, int] = {}  # idle blocks: a number that grows with time
        self.clock = 0

    def longest(self, path: list[int]) -> int:
        """Leading blocks of `path` that are in the cache."""
        return next((k for k, block in enumerate(path) if block not in self.holders), len(path))

    def hold(self, block: int) -> None:
        self.holders[block] = self.holders.get(block, 0) + 1
        self.released.pop(block, None)

    def release(self, path: list[int]) -> None:
        for block in reversed(path):
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.clock += 1
                self.released[block] = self.clock

    def evict(self) -> None:
        block = min(self.released, key=self.released.__getitem__)
        del self.released[block], self.holders[block]


@dataclass(eq=False)
class Sequence:
    """A request on a replica."""

    number: int
    request: Any  # a REQUEST row
    path: list[int]  # its prefix blocks, those of a known output after those of the prompt
    queued_s: float
    expected: float
    target: int  # tokens to compute before it decodes
    computed: int = 0
    generated: int = 0
    own: int = 0  # KV blocks of its own
    held: int = 0  # prefix blocks of the cache that it holds
    swapped: int = 0  # computed tokens in host memory
    cached: int | None = None  # prompt tokens found in the cache at first admission
    first_token_s: float = math.nan

    @property
    def cancel_s(self) -> float:
        return self.request.arrival_s + self.request.cancel_s if self.request.cancel_s else math.inf


@dataclass
class Usage:
    """What a replica did; times and tokens up to the end of the arrival window."""

    busy_s: float = 0.0
    sequence_s: float = 0.0
    output_tokens: int = 0
    iterations: int = 0
    preemptions: int = 0


@dataclass
class Outcome:
    """What became of a request."""

    state: State = State.PENDING
    replica: int = -1
    ttft_s: float = math.nan
    tpot_s: float = math.nan
    e2e_s: float = math.nan
    attained: bool = False
    cached_tokens: int = 0


@dataclass
class Engine:
    """One replica. Its sequences are in one of `waiting`, `partial`, `decoding` and `finishing`."""

    cluster: Reference
    index: int
    row: Any  # its REPLICA row; may change at any time
    usage: Usage = field(default_factory=Usage)
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.cache = Cache()
        self.total = self.free = self.row.kv_tokens // self.cluster.block_tokens
        self.host_free = self.row.host_tokens
        self.waiting: list[Sequence] = []
        self.batch: list[Sequence] = []  # static batching: those of `waiting` that may be admitted
        self.partial: Sequence | None = None
        self.decoding: list[Sequence] = []  # in the order in which they began to
        self.finishing: list[Sequence] = []  # their prefill is complete with the running iteration
        self.served = [0.0] * len(self.cluster.requests.tenants)
        self.extra_s = 0.0
        self.running, self.start_s, self.due_s = False, 0.0, math.inf  # `due_s`: when it plans next

    @property
    def sequences(self) -> list[Sequence]:
        return self.waiting + ([self.partial] if self.partial else []) + self.decoding + self.finishing

    # KV memory, in blocks

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.cluster.block_tokens)

    def available(self) -> int:
        return self.free + len(self.cache.released) * self.cluster.per_prefix

    def take(self, count: int) -> int:
        while self.free < count:
            self.cache.evict()
            self.free += self.cluster.per_prefix
        self.free -= count
        return count

    def share(self, q: Sequence, upto: int) -> None:
        """The first `upto` prefix blocks of a sequence go to the cache, or were there already."""
        for block in q.path[q.held : upto]:
            q.own -= self.cluster.per_prefix
            if block in self.cache.holders:
                self.free += self.cluster.per_prefix
            self.cache.hold(block)
            q.held += 1

    def release(self, q: Sequence) -> None:
        self.free += q.own
        self.cache.release(q.path[: q.held])
        q.own = q.held = 0

    # Who is next, and who has to go

    def key(self, q: Sequence) -> float:
        tenant = q.request.tenant
        return {
            Queue.FCFS: 0.0,
            Queue.PRIORITY: -q.request.priority,
            Queue.EDF: q.request.arrival_s + self.cluster.tenants[tenant].ttft_slo_s,
            Queue.SJF: q.expected,
            Queue.VTC: self.served[tenant],
        }[Queue(self.row.queue)]

    def enter(self, q: Sequence, now: float) -> None:
        present = {other.request.tenant for other in self.sequences}
        if present and q.request.tenant not in present:
            least = min(self.served[tenant] for tenant in present)
            self.served[q.request.tenant] = max(self.served[q.request.tenant], least)
        self.waiting.append(q)
        if not self.running:
            self.due_s = now

    def victim(self) -> Sequence:
        running = self.decoding + ([self.partial] if self.partial else [])
        if self.row.queue == Queue.PRIORITY:
            lowest = min(q.request.priority for q in running)
            running = [q for q in running if q.request.priority == lowest]
        return running[-1]

    def preempt(self, q: Sequence) -> None:
        if q is self.partial:
            self.partial = None
        else:
            self.decoding.remove(q)
        self.release(q)
        if self.row.swap_s_per_token > 0 and q.computed <= self.host_free:
            q.swapped = q.computed
            self.host_free -= q.swapped
            self.extra_s += q.swapped * self.row.swap_s_per_token
        q.computed, q.target = 0, q.request.prompt_tokens + q.generated
        self.waiting.insert(0, q)
        self.usage.preemptions += 1

    def leave(self, now: float) -> None:
        """The sequences whose clients have left are dropped."""
        for q in [q for q in self.sequences if q.cancel_s <= now]:
            if q is self.partial:
                self.partial = None
            else:
                (self.waiting if q in self.waiting else self.decoding).remove(q)
            self.release(q)
            self.host_free += q.swapped
            self.cluster.over(self, q, State.CANCELLED, now)

    # An iteration begins

    def plan(self, now: float) -> None:
        self.running, self.due_s = False, math.inf
        self.leave(now)
        preempted = self.resize()
        while not self.iteration(now, preempted):
            preempted = False

    def resize(self) -> bool:
        total, preempted = self.row.kv_tokens // self.cluster.block_tokens, False
        self.free += total - self.total
        self.total = total
        while self.available() < 0:
            self.preempt(self.victim())
            preempted = True
        self.take(0)
        return preempted

    def iteration(self, now: float, preempted: bool) -> bool:
        """Plan an iteration. Returns False where none runs but something waits that can run now."""
        static = self.row.batching == Batching.STATIC
        if static and not self.decoding and not self.partial:
            self.batch = sorted(self.waiting, key=self.key)[: self.row.max_num_seqs]
            if self.waiting and len(self.waiting) < self.row.max_num_seqs:
                until = self.waiting[0].queued_s + self.row.batch_wait_s
                if now < until:
                    self.due_s = min(until, *(q.cancel_s for q in self.waiting))
                    return True

        def growing() -> list[Sequence]:
            return [q for q in self.decoding if q.computed % self.cluster.block_tokens == 0]

        while len(growing()) > self.available():
            self.preempt(self.victim())
            preempted = True
        for q in growing():
            q.own += self.take(1)

        budget = max(0, self.row.token_budget - len(self.decoding))
        prefill_s = 0.0
        if self.partial and budget:
            q = self.partial
            chunk = min(q.target - q.computed, budget)
            if self.blocks(q.computed + chunk) - self.blocks(q.computed) > self.available():
                self.preempt(q)
                preempted = True
            else:
                budget -= chunk
                prefill_s += self.prefill(q, chunk)
        while not preempted and not self.partial and budget and self.room():
            waiting = [q for q in self.waiting if q in self.batch] if static else self.waiting
            if not waiting:
                break
            q = min(waiting, key=self.key)
            if self.blocks(q.target) > self.total:
                self.waiting.remove(q)
                self.host_free += q.swapped
                self.cluster.over(self, q, State.FAILED, now)
                continue
            chunk, seconds = self.admit(q, budget)
            if chunk == 0:
                break
            budget -= chunk
            prefill_s += seconds

        if prefill_s == 0 and not self.decoding:
            return not self.waiting
        assert self.free + sum(q.own for q in self.sequences) + len(self.cache.holders) * self.cluster.per_prefix == (
            self.total
        )
        self.running, self.start_s = True, now
        self.due_s = now + self.seconds(prefill_s) * self.slowdown + self.extra_s
        self.extra_s = 0.0
        return True

    def room(self) -> bool:
        return len(self.decoding) + len(self.finishing) < self.row.max_num_seqs

    def admit(self, q: Sequence, budget: int) -> tuple[int, float]:
        """Schedule the first chunk of a sequence. Returns (tokens, 0 where there is no room, seconds)."""
        prefix_tokens, per_prefix = self.cluster.prefix_tokens, self.cluster.per_prefix
        hit = min(self.cache.longest(q.path[: q.request.prompt_blocks]), (q.target - 1) // prefix_tokens)
        computed = max(hit * prefix_tokens, q.swapped)
        chunk = min(q.target - computed, budget)
        need = self.blocks(computed + chunk) - hit * per_prefix
        idle = sum(block in self.cache.released for block in q.path[:hit])
        if need > self.available() - idle * per_prefix:
            return 0, 0.0
        for block in q.path[:hit]:
            self.cache.hold(block)
        q.held, q.computed = hit, computed
        q.own = self.take(self.blocks(computed) - hit * per_prefix)
        self.waiting.remove(q)
        self.batch = [other for other in self.batch if other is not q]
        if q.cached is None:
            q.cached = computed
            self.served[q.request.tenant] += q.request.prompt_tokens
        self.extra_s += self.row.swap_s_per_token * max(0, q.swapped - hit * prefix_tokens)
        self.host_free += q.swapped
        q.swapped = 0
        return chunk, self.prefill(q, chunk)

    def prefill(self, q: Sequence, chunk: int) -> float:
        """Schedule a chunk. Returns the seconds that it adds."""
        row = self.row
        seconds = chunk * (row.prefill_b_s + row.prefill_c_s * (q.computed + chunk / 2))
        q.own += self.take(self.blocks(q.computed + chunk) - self.blocks(q.computed))
        q.computed += chunk
        self.share(q, min(q.computed // self.cluster.prefix_tokens, q.request.prompt_blocks))
        self.partial = q if q.computed < q.target else None
        if self.partial is None:
            self.finishing.append(q)
        return seconds

    def seconds(self, prefill_s: float) -> float:
        row, context = self.row, sum(q.computed for q in self.decoding)
        decodes_s = row.decode_b_s * len(self.decoding) + row.decode_c_s * context
        if prefill_s == 0:
            return row.overhead_s + row.decode_a_s + decodes_s
        base = row.prefill_a_s + prefill_s
        return row.overhead_s + decodes_s + (max(base, row.decode_a_s) if self.decoding else base)

    # … and ends

    def count(self, now: float) -> None:
        """Seconds of the iteration that ends, or is lost, now."""
        seconds = max(0.0, min(now, self.cluster.horizon_s) - self.start_s)
        self.usage.busy_s += seconds
        self.usage.sequence_s += seconds * (len(self.sequences) - len(self.waiting))

    def end(self, now: float) -> None:
        if self.running:
            self.count(now)
            self.usage.iterations += 1
            for q in self.decoding:
                q.computed += 1
            decoded, self.decoding = self.decoding + self.finishing, []
            self.finishing = []
            for q in decoded:
                if q.generated == 0:
                    q.first_token_s = now
                q.generated += 1
                self.usage.output_tokens += now <= self.cluster.horizon_s
                self.served[q.request.tenant] += 2
                if q.generated < q.request.output_tokens:
                    self.decoding.append(q)
                else:
                    self.share(q, min(q.computed // self.cluster.prefix_tokens, len(q.path)))
                    self.release(q)
                    self.cluster.over(self, q, State.DONE, now)
        self.plan(now)

    def crash(self, now: float) -> None:
        if self.running:
            self.count(now)
        for q in self.sequences:
            if q.generated:
                self.cluster.over(self, q, State.FAILED, now)
            else:
                self.cluster.outcomes[q.number].replica = -1
                self.cluster.retries.append(q.number)
        self.clear()


class Reference:
    """A cluster that plays an episode. `replicas`: a REPLICA table; `faults`: a FAULT table."""

    def __init__(
        self,
        replicas: np.ndarray,
        block_tokens: int,
        requests: Requests,
        faults: np.ndarray | None = None,
        gateways: int = 1,
    ) -> None:
        self.requests, self.block_tokens = requests, block_tokens
        self.prefix_tokens, self.per_prefix = requests.block_tokens, requests.block_tokens // block_tokens
        self.horizon_s = requests.window_s
        self.tenants = [plain(row) for row in requests.tenant_table]
        self.arrivals = [plain(row) for row in requests.table]
        self.faults = [] if faults is None else [plain(row) for row in faults]
        self.means = [[tenant.expected_output_tokens for tenant in self.tenants] for _ in range(gateways)]
        self.outcomes = [Outcome() for _ in self.arrivals]
        self.engines = [Engine(self, index, plain(row)) for index, row in enumerate(replicas)]
        self.retries: list[int] = []
        self.now_s, self.arrived = 0.0, 0
        self.pending: int | None = None

    def play(self, actions: list[int]) -> int:
        """Play with given actions, one a decision. Returns how many were taken."""
        taken = 0
        while self.advance() and taken < len(actions):
            self.apply(actions[taken])
            taken += 1
        return taken

    def advance(self) -> bool:
        """Run to the next decision. Returns whether there is one."""
        while self.pending is None:
            if self.retries:
                self.pending = min(self.retries)
                self.retries.remove(self.pending)
                break
            engine = min(self.engines, key=lambda engine: engine.due_s)
            fault_s = self.faults[0].time_s if self.faults else math.inf
            arrival_s = self.arrivals[self.arrived].arrival_s if self.arrived < len(self.arrivals) else math.inf
            self.now_s = min(engine.due_s, fault_s, arrival_s)
            if min(engine.due_s, arrival_s) == math.inf:
                return False
            if engine.due_s == self.now_s:
                engine.end(self.now_s)
            elif fault_s == self.now_s:
                while self.faults and self.faults[0].time_s == self.now_s:
                    self.strike(self.faults.pop(0))
            else:
                self.pending = self.arrived
                self.arrived += 1
        return True

    def change(self, replica: int, **changes: Any) -> None:
        """Set fields of a replica's row, from its next iteration on."""
        engine = self.engines[replica]
        vars(engine.row).update(changes)
        if engine.waiting and not engine.running:
            engine.due_s = self.now_s

    def gateway(self, number: int) -> int:
        return ((number + 1) * 0x9E3779B97F4A7C15 % 2**64 >> 40) % len(self.means)

    def apply(self, action: int) -> None:
        """Send the pending request to a replica; shed it where there is none, or the guard forbids it."""
        number, self.pending = self.pending, None
        assert number is not None
        request, outcome = self.arrivals[number], self.outcomes[number]
        if not (0 <= action < len(self.engines) and self.allowed(self.engines[action].row, request)):
            outcome.state = State.SHED
            return
        outcome.replica = action
        path = self.requests.blocks[request.block_start :][: request.block_count].tolist()
        expected = min(self.means[self.gateway(number)][request.tenant], request.max_tokens)
        self.engines[action].enter(
            Sequence(number, request, path, self.now_s, expected, request.prompt_tokens), self.now_s
        )

    @staticmethod
    def allowed(row: Any, request: Any) -> bool:
        return bool(
            row.up
            and request.model in (-1, row.model)
            and (request.regions == 0 or request.regions >> row.region & 1)
            and request.prompt_tokens + request.max_tokens <= min(row.max_model_len, row.kv_tokens)
        )

    def strike(self, fault: Any) -> None:
        engine = self.engines[fault.replica]
        if fault.kind in (Kind.START, Kind.RESUME):
            engine.row.up = 1
        if fault.kind in (Kind.CRASH, Kind.DRAIN):
            engine.row.up = 0
        if fault.kind == Kind.CRASH:
            engine.crash(self.now_s)
        if fault.kind in (Kind.START, Kind.SLOW):
            engine.slowdown = fault.value if fault.kind == Kind.SLOW else 1.0

    def over(self, engine: Engine, q: Sequence, state: State, now: float) -> None:
        """A sequence has ended, well or not."""
        outcome, slo = self.outcomes[q.number], self.tenants[q.request.tenant]
        outcome.state, outcome.cached_tokens = state, q.cached or 0
        if state == State.FAILED:
            return
        if q.generated == 0:
            outcome.attained = q.request.cancel_s <= slo.ttft_slo_s
            return
        outcome.ttft_s = q.first_token_s - q.request.arrival_s
        outcome.tpot_s = (now - q.first_token_s) / (q.generated - 1) if q.generated > 1 else 0.0
        outcome.attained = outcome.ttft_s <= slo.ttft_slo_s and outcome.tpot_s <= slo.tpot_slo_s
        if state == State.DONE:
            outcome.e2e_s = now - q.request.arrival_s
            means = self.means[self.gateway(q.number)]
            means[q.request.tenant] += (q.generated - means[q.request.tenant]) / OUTPUT_MEMORY
