"""One replica's engine in the reference: its KV memory, its queue, and what an iteration computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steersman.runtime.fleet import Batching, Queue
from steersman.runtime.outcomes import State

if TYPE_CHECKING:
    from reference import Reference


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
class Engine:
    """One replica. Its sequences are in one of `waiting`, `partial`, `decoding` and `finishing`."""

    cluster: Reference
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
        self.extra_s = 0.0  # what swapping adds to the next iteration
        self.budget, self.prefill_s = 0, 0.0  # of the iteration that is planned: tokens left, seconds of its chunks
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

    def keep(self, path: list[int]) -> None:
        """What the cache keeps of a prompt that was served before the episode."""
        path = path[: self.row.kv_tokens // self.cluster.prefix_tokens]
        for block in path:
            if block not in self.cache.holders:
                self.take(self.cluster.per_prefix)
            self.cache.hold(block)
        self.cache.release(path)

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

    def enter(self, q: Sequence) -> None:
        present = {other.request.tenant for other in self.sequences}
        if present and q.request.tenant not in present:
            least = min(self.served[tenant] for tenant in present)
            self.served[q.request.tenant] = max(self.served[q.request.tenant], least)
        self.waiting.append(q)
        if not self.running:
            self.due_s = q.queued_s

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
        """Add or take KV blocks. Returns whether anything was preempted for that."""
        before, self.total = self.total, self.row.kv_tokens // self.cluster.block_tokens
        self.free += self.total - before
        preempted = self.available() < 0
        while self.available() < 0:
            self.preempt(self.victim())
        self.take(0)
        return preempted

    def iteration(self, now: float, preempted: bool) -> bool:
        """Plan an iteration. Returns False where none runs but something waits that can run now."""
        if self.waits_for_a_batch(now):
            return True
        preempted |= self.grow()
        self.budget, self.prefill_s = max(0, self.row.token_budget - len(self.decoding)), 0.0
        if self.partial and self.budget:
            preempted |= not self.go_on(self.partial)
        while not preempted and not self.partial and self.budget and self.admit(now):
            pass
        if not self.prefill_s and not self.decoding:
            return not self.waiting
        held = sum(q.own for q in self.sequences) + len(self.cache.holders) * self.cluster.per_prefix
        assert self.free + held == self.total
        self.running, self.start_s = True, now
        self.due_s = now + self.seconds() * self.slowdown + self.extra_s
        self.extra_s = 0.0
        return True

    def waits_for_a_batch(self, now: float) -> bool:
        if self.row.batching != Batching.STATIC or self.decoding or self.partial:
            return False
        self.batch = sorted(self.waiting, key=self.key)[: self.row.max_num_seqs]
        if not self.waiting or len(self.waiting) >= self.row.max_num_seqs:
            return False
        until = self.waiting[0].queued_s + self.row.batch_wait_s
        if now < until:
            self.due_s = min(until, *(q.cancel_s for q in self.waiting))
        return now < until

    def grow(self) -> bool:
        """Take the blocks of the decodes. Returns whether anything was preempted for them."""

        def full() -> list[Sequence]:
            return [q for q in self.decoding if q.computed % self.cluster.block_tokens == 0]

        preempted = len(full()) > self.available()
        while len(full()) > self.available():
            self.preempt(self.victim())
        for q in full():
            q.own += self.take(1)
        return preempted

    def go_on(self, q: Sequence) -> bool:
        """Schedule another chunk of the partial sequence. Returns whether it has room; if not, it is preempted."""
        chunk = min(q.target - q.computed, self.budget)
        if self.blocks(q.computed + chunk) - self.blocks(q.computed) > self.available():
            self.preempt(q)
            return False
        self.prefill(q, chunk)
        return True

    def admit(self, now: float) -> bool:
        """Schedule the first chunk of the sequence that is next. Returns whether there is one and room for it."""
        waiting = self.waiting
        if self.row.batching == Batching.STATIC:
            waiting = [q for q in waiting if q in self.batch]
        if not waiting or len(self.decoding) + len(self.finishing) >= self.row.max_num_seqs:
            return False
        q = min(waiting, key=self.key)
        if self.blocks(q.target) > self.total:
            self.waiting.remove(q)
            self.host_free += q.swapped
            self.cluster.over(self, q, State.FAILED, now)
            return True
        prefix_tokens, per_prefix = self.cluster.prefix_tokens, self.cluster.per_prefix
        hit = min(self.cache.longest(q.path[: q.request.prompt_blocks]), (q.target - 1) // prefix_tokens)
        computed = max(hit * prefix_tokens, q.swapped)
        chunk = min(q.target - computed, self.budget)
        idle = sum(block in self.cache.released for block in q.path[:hit])
        if self.blocks(computed + chunk) - hit * per_prefix > self.available() - idle * per_prefix:
            return False
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
        self.prefill(q, chunk)
        return True

    def prefill(self, q: Sequence, chunk: int) -> None:
        row = self.row
        self.prefill_s += row.prefill_d_s + chunk * (row.prefill_b_s + row.prefill_c_s * (q.computed + chunk / 2))
        self.budget -= chunk
        q.own += self.take(self.blocks(q.computed + chunk) - self.blocks(q.computed))
        q.computed += chunk
        self.share(q, min(q.computed // self.cluster.prefix_tokens, q.request.prompt_blocks))
        self.partial = q if q.computed < q.target else None
        if self.partial is None:
            self.finishing.append(q)

    def seconds(self) -> float:
        row, decodes = self.row, len(self.decoding)
        seconds = row.overhead_s + row.decode_b_s * decodes + row.decode_c_s * sum(q.computed for q in self.decoding)
        bases = [row.decode_a_s + (row.decode_many_s if decodes > 1 else 0.0)] if decodes else []
        if self.prefill_s:
            bases.append(row.prefill_a_s + self.prefill_s)
        return seconds + max(bases)

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
                self.cluster.outcomes[q.number].replica, self.cluster.outcomes[q.number].holds = -1, 0
                self.cluster.retries.append(q.number)
        self.clear()
