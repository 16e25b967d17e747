"""What all requests that Envoy carries share: the gateway that decides, where its replicas are, answers made before."""

from __future__ import annotations

from typing import Protocol

from steersman.runtime.gateway.app import Gateway
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.ext_proc import answers
from steersman.runtime.gateway.ext_proc.config import ExtProcConfig
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

    def __init__(self, gateway: Gateway, endpoints: Endpoints, config: ExtProcConfig, body_bytes: int) -> None:
        """body_bytes: bound on the body of a request."""
        self.gateway = gateway
        self.endpoints = endpoints
        self.fallbacks = config.fallbacks
        self._watch, self._due = config.watch, 0.0
        self.body_bytes = body_bytes
        self.sessions: set[Waiting] = set()
        self._picked: dict[tuple[str, int, str], bytes] = {}
        self._named = [tuple(answers.named(name, shown) for shown in (False, True)) for name in gateway.pool.names]
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

    def named(self, replica: int, shown: bool) -> bytes:
        """The answer to the head of a replica's response. shown: its body is to be shown."""
        return self._named[replica][shown]

    def watches(self) -> bool:
        """Whether the events of the next stream are to be looked at: a share of all, evenly."""
        self._due += self._watch
        if self._due < 1.0 - 1e-9:
            return False
        self._due -= 1.0
        return True

    def went_down(self, replica: int) -> None:
        """A replica does not answer any more: those that wait for it are told so."""
        name = self.gateway.pool.names[replica]
        for session in [s for s in self.sessions if s.waits_for(replica)]:
            self.gateway.metrics.error(replica, "silent")
            session.give_up(ApiError(502, f"{name}: it does not answer any more", code="replica_failed"))
