"""The simulated runtime: a cluster that plays episodes of requests, decision by decision or all at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from steersman.runtime.cost import load_profile
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, set_profile
from steersman.runtime.observation import WIDTH, candidates_for
from steersman.runtime.outcomes import Episode, Outcomes, State, judged
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import episodes, kernel
from steersman.runtime.simulator.faults import faults_of
from steersman.runtime.simulator.jump import interrupt
from steersman.runtime.simulator.records import FAULT, OUTCOME
from steersman.runtime.simulator.state import (
    copy_state,
    count_blocks,
    layout,
    move_blocks,
    reset_state,
    shape_in,
    shape_of,
    view,
)


def new_outcomes(count: int) -> np.ndarray:
    """OUTCOME (count,) of requests that have not arrived."""
    outcomes = np.zeros(count, OUTCOME)
    outcomes["replica"] = -1
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        outcomes[name] = np.nan
    return outcomes


def outcome_columns(outcomes: np.ndarray) -> Outcomes:
    """The columns of an OUTCOME array, as views."""
    return Outcomes(
        state=outcomes["state"],
        replica=outcomes["replica"],
        ttft_s=outcomes["ttft_s"],
        tpot_s=outcomes["tpot_s"],
        e2e_s=outcomes["e2e_s"],
        attained=outcomes["attained"],
        cached_tokens=outcomes["cached_tokens"],
        holds=outcomes["holds"],
    )


class SimulatedRuntime:
    """One simulated cluster.

    After `reset`, `advance()` runs to the first decision and fills `rows` (C, WIDTH), `mask` (C,) and `reasons` (C,);
    `step(action)` carries it out and runs to the next: a replica's index, or one of the last two candidates, to hold or
    to shed. `run(policy)` plays the rest of the episode in compiled code.

    candidates: C, at least replicas + 2 (the default); more leaves room for padding.
    """

    def __init__(
        self,
        fleet: Fleet,
        candidates: int | None = None,
        into: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """into: arrays that are to be `rows`, `mask` and `reasons`, C-contiguous."""
        self.fleet = fleet
        self.replicas = fleet.table()
        self.candidates = candidates_for(len(self.replicas), candidates)
        self.rows, self.mask, self.reasons = into or (
            np.zeros((self.candidates, WIDTH), np.float32),
            np.zeros(self.candidates, np.bool_),
            np.zeros(self.candidates, np.int8),
        )
        self._buffer = np.zeros(0, np.uint8)
        self._requests: Requests | None = None
        self._outcomes = np.zeros(0, OUTCOME)
        self._faults = np.zeros(0, FAULT)
        self.address = 0  # of the cluster's buffer, for compiled functions; valid until the next `reset`

    @property
    def hold(self) -> int:
        """The action that holds."""
        return self.candidates - 2

    @property
    def shed(self) -> int:
        """The action that sheds."""
        return self.candidates - 1

    def reset(self, requests: Requests, faults: np.ndarray | None = None, more: bool = False) -> None:
        """Start an episode on an empty cluster, whose caches are cold but for what was served before.

        faults: a table made by `faults.faults`; by default, what the fleet says.
        more: further requests will `follow`, so that it stops when the last of these has been decided.

        Raises:
            UserError: the prefix blocks of the workload do not fit the KV blocks of the fleet, or a fault names a
                replica that there is not.
        """
        if requests.block_tokens % self.fleet.block_tokens:
            raise UserError(
                f"the workload's block_tokens {requests.block_tokens} must be a multiple of the fleet's "
                f"{self.fleet.block_tokens}"
            )
        self._faults = faults_of(self.fleet, requests) if faults is None else faults
        for replica in self._faults["replica"]:
            if not 0 <= replica < len(self.replicas):
                raise UserError(f"a fault names replica {replica}; the fleet has 0 to {len(self.replicas) - 1}")
        self._open(requests)
        self.view("replicas")[:] = self.replicas
        self.view("tenants")[:] = requests.tenant_table
        reset_state(self.address, requests.block_tokens, np.inf if more else requests.window_s, self.fleet.scrape_s)
        self.view("cluster")["more"] = more
        if len(requests.before):
            kernel.warm(self.address, requests.before)

    def over(self) -> tuple[np.ndarray, Outcomes]:
        """The requests that have ended, REQUEST (n,), and their outcomes."""
        ended = self._outcomes["state"] != State.PENDING
        return self.requests.table[ended], outcome_columns(self._outcomes[ended])

    def follow(self, requests: Requests) -> tuple[np.ndarray, Outcomes]:
        """Let further requests follow those that have arrived. What has ended leaves.

        Returns what `over` does. The numbers of requests, as in `ended`, start anew.
        """
        ended, before, outcomes = self.over(), self.requests, self._outcomes
        cluster = self.view("cluster")
        stay = np.flatnonzero(outcomes["state"][: cluster["next_request"][0]] == State.PENDING)
        old = before.table[stay]
        own = int(old["block_count"].sum())
        blocks = np.empty(own + count_blocks(self.address) + len(requests.blocks), np.int64)
        table = np.concatenate([old, requests.table])
        place = 0
        for row, was in zip(table, old, strict=False):
            count, start = was["block_count"], was["block_start"]
            blocks[place : place + count] = before.blocks[start : start + count]
            row["block_start"] = place
            place += count
        place = int(move_blocks(self.address, blocks, own))
        blocks[place:] = requests.blocks
        table["block_start"][len(stay) :] += place
        number = np.full(len(before.table), -1, np.int32)
        number[stay] = np.arange(len(stay))
        self._renumber(number, len(table))
        self._requests, self._outcomes = replace(requests, table=table, blocks=blocks), new_outcomes(len(table))
        self._outcomes[: len(stay)] = outcomes[stay]
        self._bind()
        cluster = self.view("cluster")
        cluster["next_request"], cluster["last_request"], cluster["n_ended"] = len(stay), len(table), 0
        cluster["cancels"] |= bool(requests.table["cancel_s"].any())
        return ended

    def _renumber(self, number: np.ndarray, room: int) -> None:
        """Give the requests in flight new numbers, by their old ones, and have room for `room` of them."""
        cluster = self.view("cluster")
        sequences = self.view("sequences")[: cluster["used_slots"][0]].copy()
        held = self.view("held")[: cluster["n_held"][0]].copy()
        sequences["request"] = number.take(sequences["request"], mode="clip")  # free slots have any number
        if cluster["pending"] >= 0:
            cluster["pending"] = number[cluster["pending"]]
        shape = shape_in(cluster)._replace(sequences=max(room, len(sequences)))
        record, kept = layout(shape), int(cluster["at_ended"][0])
        if len(self._buffer) < record["bytes"][0]:
            old, self._buffer = self._buffer, np.zeros(int(record["bytes"][0]), np.uint8)
            self._buffer[:kept] = old[:kept]
            self.address = self._buffer.ctypes.data
        cluster = self.view("cluster")
        for name in ("n_sequences", "at_held", "at_sequences", "bytes"):
            cluster[name] = record[name]
        self.view("held")[: len(held)] = held
        self.view("sequences")[: len(sequences)] = sequences

    def finish(self) -> None:
        """Nothing follows any more."""
        self.view("cluster")["more"] = 0

    def _open(self, requests: Requests) -> None:
        """Have a buffer of the right layout, bound to the episode's data."""
        block_tokens = self.fleet.block_tokens
        shape = shape_of(
            self.replicas,
            len(requests.tenants),
            len(requests),
            block_tokens,
            requests.block_tokens,
            self.fleet.gateways,
        )
        record = layout(shape)
        if len(self._buffer) < record["bytes"][0]:
            self._buffer = np.zeros(int(record["bytes"][0]), np.uint8)
            self.address = self._buffer.ctypes.data
        self._buffer[: record.nbytes] = record.view(np.uint8)
        self._requests, self._outcomes = requests, new_outcomes(len(requests))
        self._bind()

    def _bind(self) -> None:
        """Tell the cluster where the data beside its buffer stand."""
        cluster, requests = self.view("cluster")[0], self.requests
        arrays = {"requests": requests.table, "blocks": requests.blocks, "outcomes": self._outcomes}
        arrays |= {"faults": self._faults, "rows": self.rows, "mask": self.mask, "reasons": self.reasons}
        for name, array in arrays.items():
            assert array.flags.c_contiguous, name
            cluster[f"p_{name}"] = array.ctypes.data
        cluster["p_step"] = kernel.step_address()
        cluster["n_requests"], cluster["n_blocks"] = len(requests.table), len(requests.blocks)
        cluster["n_faults"], cluster["n_candidates"] = len(self._faults), self.candidates

    def view(self, section: str) -> np.ndarray:
        """A section of the state as an array, by its name in `state.State` or `Bookkeeping`, or `cluster`."""
        return view(self._buffer, section)

    def advance(self) -> bool:
        """Run to the first decision, or observe the present one again. Returns whether there is one."""
        self.requests  # noqa: B018 (raises before the first reset)
        return bool(kernel.step(self.address, kernel.STAY, 1))

    def step(self, action: int) -> bool:
        """Carry out the decision that is due, and run to the next. Returns whether there is one.

        A masked action sheds.
        """
        return bool(kernel.step(self.address, action, 1))

    def run(self, policy: CompiledPolicy, seed: int = 0, memory: np.ndarray | None = None) -> int:
        """Play the rest of the episode under `policy`. Returns the number of decisions.

        memory: float64 (gateways, M) that the policy goes on with; by default fresh ones, from `seed` on.
        """
        return self._play(policy, seed, 0, 0, memory)[0]

    def record(self, policy: CompiledPolicy, seed: int = 0, limit: int = 1 << 30) -> tuple[np.ndarray, np.ndarray]:
        """`run`, keeping the first `limit` observations, (D, C, WIDTH) float32, and the actions (D,) on them."""
        actions, trace = self._whole(policy, seed, limit, keep=True)
        return trace[:limit], actions[:limit]

    def routes(self, policy: CompiledPolicy, seed: int = 0) -> np.ndarray:
        """`run`, returning the action of every decision, int32 (D,), for `replay`."""
        return self._whole(policy, seed, 1 << 30, keep=False)[0]

    def _whole(self, policy: CompiledPolicy, seed: int, limit: int, keep: bool) -> tuple[np.ndarray, np.ndarray]:
        """The first `limit` actions, and observations if `keep`; played again where there were more than expected."""
        room, start = min(limit, 2 * len(self.requests) + 1024), self.clone()
        while True:
            decisions, trace, actions = self._play(policy, seed, room if keep else 0, room)
            if min(decisions, limit) <= room:
                return actions[:decisions], trace[:decisions]
            self.restore(start)
            room = min(limit, decisions)

    def replay(self, actions: np.ndarray) -> int:
        """Play the rest of the episode with given actions (D,); a masked one sheds. Returns how many were taken.

        Stops at the first decision beyond them.
        """
        return int(episodes.replay(self.address, np.ascontiguousarray(actions, np.int32)))

    def replay_each(self, routes: np.ndarray, holds: np.ndarray) -> None:
        """Play the rest of the episode with a replica, or −1 to shed, for each request (N,), held so often (N,) before.

        Unlike in `replay`, the order in which they are decided does not matter.
        """
        arrays = (np.ascontiguousarray(array, np.int32) for array in (routes, holds))
        episodes.replay_each(self.address, *arrays)

    def _play(
        self, policy: CompiledPolicy, seed: int, keep: int, actions: int, memory: np.ndarray | None = None
    ) -> tuple[int, np.ndarray, np.ndarray]:
        self.requests  # noqa: B018 (raises before the first reset)
        trace, taken = np.empty((keep, self.candidates, WIDTH), np.float32), np.empty(actions, np.int32)
        if memory is None:
            memory = np.stack([policy.memory(seed + g) for g in range(self.fleet.gateways)])
        decisions = episodes.run()(self.address, policy.function, policy.values, memory, trace, taken)
        return decisions, trace, taken

    # What may be set while it runs, from the next iteration on

    def set_precision(self, replica: int, profile: str, kv_tokens: int, quality: float = 1.0) -> None:
        """Another precision of weights or KV: its cost profile, what the KV memory then holds, and its quality.

        Raises:
            UserError: there is no such profile, or the KV memory is empty.
        """
        if kv_tokens < self.fleet.block_tokens:
            raise UserError(f"kv_tokens {kv_tokens}: expected at least one block of {self.fleet.block_tokens}")
        row = self.view("replicas")[replica]
        set_profile(row, load_profile(profile))
        row["kv_tokens"], row["quality"] = kv_tokens - kv_tokens % self.fleet.block_tokens, quality
        interrupt(self.address, replica)

    def set_limits(self, replica: int, max_num_seqs: int | None = None, token_budget: int | None = None) -> None:
        """Another batch limit, at most that of the fleet's largest replica, or token budget.

        Raises:
            UserError: a limit is not in its range.
        """
        row = self.view("replicas")[replica]
        slots = int(self.view("cluster")["n_slots"][0])
        if max_num_seqs is not None:
            if not 1 <= max_num_seqs <= slots:
                raise UserError(f"max_num_seqs {max_num_seqs}: expected 1 to {slots}, the largest of the fleet")
            row["max_num_seqs"] = max_num_seqs
        if token_budget is not None:
            if token_budget < row["max_num_seqs"]:
                raise UserError(f"token_budget {token_budget}: expected at least max_num_seqs, {row['max_num_seqs']}")
            row["token_budget"] = token_budget
        interrupt(self.address, replica)

    @property
    def now(self) -> float:
        """Simulated seconds since the start of the episode."""
        return float(self.view("cluster")["now"][0])

    @property
    def ended(self) -> np.ndarray:
        """Rows of the requests that ended (or were shed) since the decision before this one, int32."""
        return self.view("ended")[: self.view("cluster")["n_ended"][0]]

    @property
    def episode(self) -> Episode:
        """What happened so far."""
        outcomes, requests = self.outcomes(), self.requests
        if requests.judged is not None:
            outcomes = judged(outcomes, requests.table, requests.judged)
        return Episode(requests, outcomes, self.usage(), requests.window_s)

    def outcomes(self) -> Outcomes:
        """What became of every request so far; columns are views."""
        return outcome_columns(self._outcomes)

    def usage(self) -> np.ndarray:
        """USAGE (R,) over the arrival window so far."""
        return self.view("usage").copy()

    def clone(self, into: np.ndarray | None = None) -> np.ndarray:
        """A copy of the cluster's state, for `restore`; into: an older one, to be overwritten."""
        into = np.zeros_like(self._buffer) if into is None else into
        copy_state(into.ctypes.data, self.address)
        return into

    def restore(self, clone: np.ndarray) -> None:
        """Return to a state that `clone` gave in this episode. Outcomes of later ends stay until overwritten."""
        copy_state(self.address, clone.ctypes.data)

    def twin(self) -> SimulatedRuntime:
        """Another runtime of the same make, to `adopt` the state of this one."""
        return SimulatedRuntime(self.fleet, self.candidates)

    def adopt(self, other: SimulatedRuntime) -> None:
        """Become a copy of a runtime of the same make, which goes on by itself from here; requests are shared."""
        size = int(other.view("cluster")["bytes"][0])
        if len(self._buffer) < size:
            self._buffer = np.zeros(size, np.uint8)
            self.address = self._buffer.ctypes.data
        copy_state(self.address, other.address)
        if len(self._outcomes) != len(other._outcomes):
            self._outcomes = np.zeros_like(other._outcomes)
        self._outcomes[:] = other._outcomes
        self._requests, self._faults = other._requests, other._faults
        self._bind()

    def close(self) -> None:
        """Nothing to stop; runtimes of real replicas have."""

    @property
    def records(self) -> np.ndarray:
        """OUTCOME (N,): what `outcomes` has the columns of."""
        return self._outcomes

    @property
    def requests(self) -> Requests:
        """The requests of the episode."""
        if self._requests is None:
            raise RuntimeError("call reset() first")
        return self._requests
