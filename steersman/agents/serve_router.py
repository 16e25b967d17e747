"""A request router for Ray Serve: a policy ranks a deployment's replicas for each call (docs/cluster.md).

    @serve.deployment(
        num_replicas=3,
        request_router_config=RequestRouterConfig(
            request_router_class="steersman.agents.serve_router:PolicyRouter",
            request_router_kwargs={"policy": "runs/default-…", "fleet": "fleet.yaml", "workload": "default"},
        ),
    )
    class Model:
        def record_replica_metadata(self):
            return {"steersman_replica": "fast-0"}      # its name in the fleet file

It decides as the gateway does, from its own counts of what each replica has in flight, so that a call's length and a
replica's speed both matter. Ray Serve can neither hold nor shed: a policy's wish to do so is passed over. Written for
the custom request router API of Ray 2.60 (`ray.serve.request_router`, alpha).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from steersman.agents.policies import serving
from steersman.runtime.configs import find_config
from steersman.runtime.fleet import load_fleet
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.prompt import TokenEstimate, read_call
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import LiveRequest, Stage, Ticket
from steersman.runtime.workload import load_workload

NAME = "steersman_replica"  # what a replica's `record_replica_metadata` calls its name


class PolicyRouter(RequestRouter):
    """Ranks replicas by a policy's scores; those that are in no fleet file, or that the guard masks, come last.

    A call whose first argument, or `body`, is the body of an OpenAI completion (a dict or JSON) is seen with its
    prompt, prefix and limit; any other counts as a short one. Its keyword `tenant` names the tenant.
    """

    def initialize_state(  # type: ignore[override]
        self, policy: str = "jsed", fleet: str = "default", workload: str = "default", traces: str | None = None
    ) -> None:
        """policy: as `serve --policy` takes it. workload: where tenants and their promises are read from.

        Raises:
            UserError: one of them is wrong.
        """
        tenants = load_workload(find_config("workloads", workload), traces=Path(traces) if traces else None).tenants
        self.scheduler = Scheduler(load_fleet(find_config("fleets", fleet)), tenants)
        self._policy = serving(policy)
        self._slots = {name: slot for slot, name in enumerate(self.scheduler.fleet.names)}
        self._estimate = TokenEstimate()
        self._tickets: dict[str, Ticket] = {}
        self._choosing: dict[str, Any] = {}  # futures of calls that no replica has yet
        for slot in self._slots.values():
            self.scheduler.set_up(slot, False)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [[replica] for replica in candidate_replicas]
        self._forget_cancelled()
        named = {self._slot(replica): replica for replica in candidate_replicas if self._slot(replica) >= 0}
        others = [replica for replica in candidate_replicas if self._slot(replica) < 0]
        key = pending_request.metadata.internal_request_id
        ticket = self._tickets.get(key)
        if ticket is None:
            ticket = self._tickets[key] = self.scheduler.arrive(self._request(pending_request))
        self._choosing[key] = pending_request.future
        self.scheduler.withdrawn(ticket)  # where it was chosen before, and its replica took no more
        self.scheduler.observe(ticket)
        order = [slot for slot in self._ranked() if slot in named]
        if order:
            # Counted at once: calls that come before it is sent must see it.
            self.scheduler.dispatched(ticket, order[0])
        return [[named[slot]] for slot in order] + [[replica] for replica in others]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        up = {self._slot(replica) for replica in replicas}
        for slot in self._slots.values():
            self.scheduler.set_up(slot, slot in up)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        key = pending_request.metadata.internal_request_id
        ticket, replica = self._tickets.get(key), self._replicas.get(replica_id)
        self._choosing.pop(key, None)
        if ticket is None or replica is None or (slot := self._slot(replica)) < 0 or slot == ticket.replica:
            return
        self.scheduler.withdrawn(ticket)
        self.scheduler.observe(ticket)
        self.scheduler.dispatched(ticket, slot)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._over(internal_request_id, True)

    def _over(self, key: str, ok: bool) -> None:
        self._choosing.pop(key, None)
        ticket = self._tickets.pop(key, None)
        if ticket is None:
            return
        # Its answer is not seen here: as long as it may have been.
        self.scheduler.ended(ticket, ok, ticket.request.max_tokens if ok else None)
        if ticket.stage is Stage.WAITING:
            self.scheduler.shed(ticket)

    def _forget_cancelled(self) -> None:
        """Calls that were given up before they had a replica: nobody tells of them."""
        for key in [key for key, future in self._choosing.items() if future.cancelled()]:
            self._over(key, False)

    def _slot(self, replica: RunningReplica) -> int:
        """Its place in the fleet; −1: none."""
        return self._slots.get(replica.replica_metadata.get(NAME, ""), -1)

    def _ranked(self) -> Sequence[int]:
        """Places in the fleet, best first: what the guard allows by score, then the rest by what it has in flight."""
        count, scheduler = len(self._slots), self.scheduler
        inflight = np.array([scheduler.inflight(slot) for slot in range(count)], float)
        allowed = scheduler.mask[:count]
        try:
            scores = np.asarray(self._policy.score(scheduler.rows, scheduler.mask), float)[:count]
        except Exception:  # whatever a policy throws, requests go on
            scores = -inflight
        if not np.isfinite(scores[allowed]).all():
            scores = -inflight
        ranked = np.lexsort((inflight, -np.where(allowed, scores, -np.inf), ~allowed))
        return [int(slot) for slot in ranked]

    def _request(self, pending: PendingRequest) -> LiveRequest:
        """What scheduling may know of a call."""
        tenants = list(self.scheduler.tenants)
        tenant = pending.kwargs.get("tenant")
        index = tenants.index(tenant) if tenant in tenants else 0
        body = pending.kwargs.get("body", pending.args[0] if pending.args else None)
        try:
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            call = read_call(text)
        except (ApiError, TypeError, ValueError):
            return LiveRequest(index, 1)
        tokens = call.exact_tokens or self._estimate.tokens(call.prompt_bytes)
        return LiveRequest(index, tokens, call.max_tokens, call.keys, self._estimate.block_tokens)
