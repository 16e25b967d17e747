"""The simulated runtime: a cluster that plays episodes of requests, decision by decision or all at once."""

from __future__ import annotations

import numpy as np

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.observation import WIDTH
from steersman.runtime.outcomes import Episode, Outcomes
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import kernel
from steersman.runtime.simulator.state import (
    OUTCOME,
    Shape,
    State,
    buffer_size,
    header,
    open_state,
    reset_state,
    shape_of,
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
    )


class SimulatedRuntime:
    """One simulated cluster.

    After `reset`, `advance()` runs to the next decision and fills `rows` (C, WIDTH), `mask` (C,) and `reasons` (C,);
    `apply(action)` carries it out: a replica's index, or the last candidate to shed. `run(policy)` plays the rest
    of the episode in compiled code.

    candidates: C, at least replicas + 1 (the default); more leaves room for padding.
    """

    def __init__(self, fleet: Fleet, candidates: int | None = None) -> None:
        self.fleet = fleet
        self.replicas = fleet.table()
        self.candidates = candidates or len(self.replicas) + 1
        if self.candidates <= len(self.replicas):
            raise UserError(f"{len(self.replicas)} replicas and shed do not fit into {self.candidates} candidates")
        self.rows = np.zeros((self.candidates, WIDTH), np.float32)
        self.mask = np.zeros(self.candidates, np.bool_)
        self.reasons = np.zeros(self.candidates, np.int8)
        self._buffer = np.zeros(0, np.uint8)
        self._shape: Shape | None = None
        self._requests: Requests | None = None
        self._outcomes = np.zeros(0, OUTCOME)
        self.state: State  # views of the state, once reset: for tests, rendering and metrics

    @property
    def shed(self) -> int:
        """The action that sheds."""
        return self.candidates - 1

    def reset(self, requests: Requests) -> None:
        """Start an episode on an empty cluster with cold caches.

        Raises:
            UserError: the prefix blocks of the workload do not fit the KV blocks of the fleet.
        """
        if requests.block_tokens % self.fleet.block_tokens:
            raise UserError(
                f"the workload's block_tokens {requests.block_tokens} must be a multiple of the fleet's "
                f"{self.fleet.block_tokens}"
            )
        shape = shape_of(
            self.replicas,
            len(requests.tenants),
            len(requests),
            self.fleet.block_tokens,
            requests.block_tokens,
        )
        if shape != self._shape:
            self._shape = shape
            self._buffer = np.zeros(buffer_size(shape), np.uint8)
        self._requests = requests
        self._outcomes = new_outcomes(len(requests))
        reset_state(
            self._buffer,
            header(shape),
            self.replicas,
            requests.tenant_table,
            requests.block_tokens,
            requests.window_s,
        )
        self.state = open_state(self._buffer)

    def advance(self) -> bool:
        """Run to the next decision. Returns whether there is one; False: every request has ended."""
        q = self._episode
        if not kernel.advance(self._buffer, q.table, q.blocks, self._outcomes):
            return False
        kernel.observe(self._buffer, q.table, q.blocks, self.rows, self.mask, self.reasons)
        return True

    def apply(self, action: int) -> None:
        """Carry out the decision that is due. A masked action sheds."""
        q = self._episode
        kernel.apply(self._buffer, q.table, q.blocks, self._outcomes, action, self.mask)

    def step(self, action: int) -> bool:
        """`apply`, then `advance`, in one compiled call."""
        q = self._episode
        return bool(
            kernel.step(self._buffer, q.table, q.blocks, self._outcomes, action, self.rows, self.mask, self.reasons)
        )

    def run(self, policy: CompiledPolicy, seed: int = 0) -> int:
        """Play the rest of the episode under `policy`. Returns the number of decisions."""
        return self._play(policy, seed, 0)[0]

    def record(self, policy: CompiledPolicy, seed: int = 0, limit: int = 1 << 30) -> tuple[np.ndarray, np.ndarray]:
        """`run`, keeping the first `limit` observations, (D, C, WIDTH) float32, and the actions (D,) on them."""
        decisions, trace, actions = self._play(policy, seed, min(limit, len(self._episode)))
        return trace[:decisions], actions[:decisions]

    def _play(self, policy: CompiledPolicy, seed: int, keep: int) -> tuple[int, np.ndarray, np.ndarray]:
        q = self._episode
        trace = np.empty((keep, self.candidates, WIDTH), np.float32)
        actions = np.empty(keep, np.int32)
        decisions = kernel.run()(
            self._buffer,
            q.table,
            q.blocks,
            self._outcomes,
            self.rows,
            self.mask,
            self.reasons,
            policy.function,
            policy.values,
            policy.memory(seed),
            trace,
            actions,
        )
        return decisions, trace, actions

    @property
    def now(self) -> float:
        """Simulated seconds since the start of the episode."""
        return float(self.state.cluster["now"][0])

    @property
    def ended(self) -> np.ndarray:
        """Rows of the requests that ended (or were shed) since the decision before this one, int32."""
        return self.state.ended[: self.state.cluster["n_ended"][0]]

    @property
    def episode(self) -> Episode:
        """What happened so far."""
        return Episode(self._episode, self.outcomes(), self.usage(), self._episode.window_s)

    def outcomes(self) -> Outcomes:
        """What became of every request so far; columns are views."""
        return outcome_columns(self._outcomes)

    def usage(self) -> np.ndarray:
        """USAGE (R,) over the arrival window so far."""
        return self.state.usage.copy()

    def clone(self) -> np.ndarray:
        """A copy of the cluster's state, for `restore`."""
        return self._buffer.copy()

    def restore(self, clone: np.ndarray) -> None:
        """Return to a state that `clone` gave in this episode. Outcomes of later ends stay until overwritten."""
        self._buffer[:] = clone

    def close(self) -> None:
        """Nothing to stop; runtimes of real replicas have."""

    @property
    def _episode(self) -> Requests:
        if self._requests is None:
            raise RuntimeError("call reset() first")
        return self._requests
