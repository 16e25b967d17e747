"""The simulated cluster again, as `docs/simulator.md` has it: iteration by iteration, plain and slow, to be read.

It shares nothing with the compiled core but the tables that describe an episode. It plays given actions; what only
policies see (observations, scrapes, beliefs) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from reference_engine import Engine, Sequence

from steersman.runtime.outcomes import State
from steersman.runtime.requests import Requests
from steersman.runtime.simulator.faults import Kind

OUTPUT_MEMORY = 200.0  # requests over which a gateway's mean output length decays
PAUSES, SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 10, 0.01, 0.5


def plain(row: np.void) -> Any:
    """A row of a structured array as an object with Python numbers."""
    return SimpleNamespace(**{name: row[name].item() for name in row.dtype.names or ()})


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
    holds: int = 0  # since it arrived, or a crash brought it back


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
        self.engines = [Engine(self, plain(row)) for row in replicas]
        self.retries: list[int] = []
        self.held: list[tuple[float, int]] = []  # when each is decided anew, and its number
        self.now_s, self.arrived = 0.0, 0
        self.pending: int | None = None
        self.warm()

    def warm(self) -> None:
        turn = 0
        for request in map(plain, self.requests.before):
            if allowed := self.allowed(request):
                while turn % len(self.engines) not in allowed:
                    turn += 1
                self.engines[turn % len(self.engines)].keep(self.path(request)[: request.prompt_blocks])
                turn += 1

    def path(self, request: Any) -> list[int]:
        path: list[int] = self.requests.blocks[request.block_start :][: request.block_count].tolist()
        return path

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
            held_s = min(self.held)[0] if self.held else math.inf
            if min(engine.due_s, arrival_s, held_s) == math.inf:
                return False
            self.now_s = min(engine.due_s, fault_s, arrival_s, held_s)
            if engine.due_s == self.now_s:
                engine.end(self.now_s)
            elif fault_s == self.now_s:
                while self.faults and self.faults[0].time_s == self.now_s:
                    self.strike(self.faults.pop(0))
            elif arrival_s == self.now_s:
                self.pending = self.arrived
                self.arrived += 1
            else:
                self.resume()
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
        """Send the pending request to a replica, or hold it (the number after the last replica's); else shed it."""
        number, self.pending = self.pending, None
        assert number is not None
        request, outcome = self.arrivals[number], self.outcomes[number]
        if action == len(self.engines) and self.may_hold(number):
            outcome.holds += 1
            self.held.append((self.now_s + self.pause_s(self.tenants[request.tenant]), number))
            return
        if action not in self.allowed(request):
            outcome.state = State.SHED
            return
        outcome.replica = action
        expected = min(self.means[self.gateway(number)][request.tenant], request.max_tokens)
        q = Sequence(number, request, self.path(request), self.now_s, expected, request.prompt_tokens)
        self.engines[action].enter(q)

    @staticmethod
    def pause_s(tenant: Any) -> float:
        return min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, tenant.ttft_slo_s / PAUSES))

    def may_hold(self, number: int) -> bool:
        request = self.arrivals[number]
        tenant = self.tenants[request.tenant]
        in_time = self.now_s - request.arrival_s + self.pause_s(tenant) < tenant.ttft_slo_s
        return in_time and bool(self.allowed(request))

    def resume(self) -> None:
        """The first of the held requests is decided anew, unless its client has left."""
        first = min(self.held)
        self.held.remove(first)
        number = first[1]
        request, outcome = self.arrivals[number], self.outcomes[number]
        if request.cancel_s and request.arrival_s + request.cancel_s <= self.now_s:
            outcome.state = State.CANCELLED
            outcome.attained = request.cancel_s <= self.tenants[request.tenant].ttft_slo_s
        else:
            self.pending = number

    def allowed(self, request: Any) -> list[int]:
        """The replicas that may take a request: of those that could, the ones of the lowest tier."""
        rows = [engine.row for engine in self.engines]
        able = [
            number
            for number, row in enumerate(rows)
            if row.up
            and request.model in (-1, row.model)
            and (request.regions == 0 or request.regions >> row.zone & 1)
            and request.prompt_tokens + request.max_tokens <= min(row.max_model_len, row.kv_tokens)
        ]
        return [number for number in able if rows[number].tier == min(rows[other].tier for other in able)]

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
        outcome.ttft_s = q.first_token_s - q.request.arrival_s + engine.row.latency_s
        outcome.tpot_s = (now - q.first_token_s) / (q.generated - 1) if q.generated > 1 else 0.0
        outcome.attained = outcome.ttft_s <= slo.ttft_slo_s and outcome.tpot_s <= slo.tpot_slo_s
        if state == State.DONE:
            outcome.e2e_s = now - q.request.arrival_s + engine.row.latency_s
            means = self.means[self.gateway(q.number)]
            means[q.request.tenant] += (q.generated - means[q.request.tenant]) / OUTPUT_MEMORY
