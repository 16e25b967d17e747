"""What all requests that Envoy carries share: the gateway that decides, where its replicas are, answers made before."""

from __future__ import annotations

from typing import Protocol

from steersman.runtime.gateway.app import Gateway
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.ext_proc import answers
from steersman.runtime.gateway.ext_proc.endpoints import Endpoints

_REMEMBERED = 1024  # answers


class Waiting(Protocol):
    """A request under way."""

    def waits_for(self, replica: int) -> bool:
        """Whether a replica owes it the head of a response."""
        ...

    def give_up(self, error: ApiError) -> None:
        """Answer its client with an error."""
        ...


class Picker:
    """Shared by all sessions."""

    def __init__(self, gateway: Gateway, endpoints: Endpoints, fallbacks: int, body_bytes: int) -> None:
        """fallbacks: further endpoints named for a request; body_bytes: bound on its body."""
        self.gateway = gateway
        self.endpoints = endpoints
        self.fallbacks = fallbacks
        self.body_bytes = body_bytes
        self.sessions: set[Waiting] = set()
        self._picked: dict[tuple[str, int, str], bytes] = {}
        self._named = [answers.named(name) for name in gateway.pool.names]
        gateway.on_down = self.went_down

    def picked(self, part: str, replica: int, endpoints: str) -> bytes:
        """The answer to `part` that sends a request to a replica."""
        key = (part, replica, endpoints)
        found = self._picked.get(key)
        if found is None:
            if len(self._picked) >= _REMEMBERED:
                self._picked.clear()
            message = answers.picking(part, endpoints, self.gateway.pool.replicas[replica].headers)
            found = self._picked[key] = message.SerializeToString()
        return found

    def named(self, replica: int) -> bytes:
        """The answer to the head of a replica's response."""
        return self._named[replica]

    def went_down(self, replica: int) -> None:
        """A replica does not answer any more: those that wait for it are told so."""
        name = self.gateway.pool.names[replica]
        for session in [s for s in self.sessions if s.waits_for(replica)]:
            self.gateway.metrics.error(replica, "silent")
            session.give_up(ApiError(502, f"{name}: it does not answer any more", code="replica_failed"))
