"""What would have come of each candidate: counterfactual roll-outs from the decision that is due.

`full` plays every candidate to its end while the policy goes on deciding, over the same arrivals. That is what really
would have happened, but small differences grow: soon every request goes elsewhere, and the one decision drowns in
noise. `frozen` sends the later requests where they went in the baseline, so that only the replica that gets the
request and the one that does not differ; only these two are played again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from steersman.runtime.outcomes import State
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import episodes, kernel
from steersman.runtime.simulator.simulator import SimulatedRuntime


class Rollout(NamedTuple):
    """What came of n requests under each of A actions."""

    actions: np.ndarray  # int64 (A,)
    table: np.ndarray  # REQUEST (n,): those in flight at the decision, the decided one, and those that came after it
    outcomes: np.ndarray  # OUTCOME (A, n)
    decided: int  # which of the n the decision was about


class Rollouts:
    """Roll-outs from decisions of one runtime, which stays as it is.

    policy: decides what comes after. arrivals: so many further requests come, then the cluster runs dry.
    """

    def __init__(self, runtime: SimulatedRuntime, policy: CompiledPolicy, arrivals: int = 256) -> None:
        self._runtime, self._policy, self._arrivals = runtime, policy, arrivals
        self._start, self._branch = runtime.twin(), runtime.twin()
        self._rows = np.zeros(0, np.int64)

    def full(self, memory: np.ndarray, actions: Sequence[int] | None = None, future: Requests | None = None) -> Rollout:
        """Play each action, the policy deciding from there on.

        memory: float64 (gateways, M), the policy's at this decision; it is left as it is.
        actions: those to try; by default all that the guard allows.
        future: arrivals in seconds from now, in place of the true ones: a sample of the workload.
        """
        tried = self._begin(actions, future)
        return self._rollout(tried, [self._play(action, memory) for action in tried])

    def frozen(
        self, action: int, memory: np.ndarray, actions: Sequence[int] | None = None, future: Requests | None = None
    ) -> Rollout:
        """Play `action`, the baseline, the policy deciding from there on; then others, later requests going as in it.

        Other arguments as in `full`. To hold is tried only as the baseline: what comes of it is up to the policy. Later
        requests are held as often as in the baseline. Where a replica crashes, what it loses does not come back.
        """
        tried = self._begin(actions, future)
        tried = tried[(tried != self._runtime.hold) | (tried == action)]
        baseline = self._play(action, memory)
        went = np.where(baseline["state"] == State.SHED, -1, baseline["replica"]).astype(np.int32)
        first, went[self._decided] = went[self._decided], -1
        routes, holds = (np.full(len(self._start.outcomes().state), n, np.int32) for n in (-1, 0))
        routes[self._rows], holds[self._rows] = went, baseline["holds"]
        holds[self._rows[self._decided]] = 0
        without = self._replay(first, routes, holds)
        results = []
        for other in tried:
            result = baseline.copy()
            if other != action:
                if first >= 0:
                    result[went == first] = without[went == first]
                result[self._decided] = self._shed_outcome()
                if other < len(self._runtime.replicas):
                    routes[self._rows[self._decided]] = other
                    played = self._replay(other, routes, holds)
                    routes[self._rows[self._decided]] = -1
                    touched = went == other
                    touched[self._decided] = True
                    result[touched] = played[touched]
            results.append(result)
        return self._rollout(tried, results)

    def _begin(self, actions: Sequence[int] | None, future: Requests | None) -> np.ndarray:
        """Copy the runtime with its future. Returns the actions (A,)."""
        start = self._start
        start.adopt(self._runtime)
        cluster = start.view("cluster")
        if cluster["pending"] < 0:
            raise RuntimeError("no decision is due: call advance() first")
        if future is not None:
            table = future.table[: self._arrivals].copy()
            table["arrival_s"] += start.now
            start.follow(replace(future, table=table))
            cluster = start.view("cluster")
        cluster["more"] = 0
        last = min(int(cluster["next_request"][0]) + self._arrivals, int(cluster["last_request"][0]))
        cluster["last_request"] = last
        self._rows = np.flatnonzero(start.outcomes().state[:last] == State.PENDING)
        self._decided = int(np.searchsorted(self._rows, int(cluster["pending"][0])))
        return np.flatnonzero(self._runtime.mask) if actions is None else np.asarray(actions, np.int64)

    def _play(self, action: int, memory: np.ndarray) -> np.ndarray:
        """OUTCOME (n,) where the decided request goes to `action`, and the policy decides the later ones."""
        self._branch.adopt(self._start)
        kernel.step(self._branch.address, action, 0)
        self._branch.run(self._policy, memory=memory.copy())
        return self._branch.records[self._rows]

    def _replay(self, replica: int, routes: np.ndarray, holds: np.ndarray) -> np.ndarray:
        """OUTCOME (n,) of those that `routes` (N,) sends to `replica`, which is played alone, after `holds` (N,)."""
        if replica < 0:
            return np.zeros(len(self._rows), self._branch.records.dtype)
        self._branch.adopt(self._start)
        episodes.replay_one(self._branch.address, replica, routes, holds)
        return self._branch.records[self._rows]

    def _shed_outcome(self) -> np.ndarray:
        outcome = self._start.records[self._rows[self._decided]].copy()
        outcome["state"], outcome["replica"] = State.SHED, -1
        outcome["holds"] = min(int(self._start.view("cluster")["holds"][0]), kernel.MOST_HOLDS)
        return outcome

    def _rollout(self, tried: np.ndarray, outcomes: list[np.ndarray]) -> Rollout:
        return Rollout(tried, self._start.requests.table[self._rows], np.stack(outcomes), self._decided)
