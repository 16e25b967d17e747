"""The access log: a line for each request, once it is over. It holds no key, no query and no word of a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.log import named
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Ticket

UNLOGGED = (b"/health", b"/metrics")
_log = logging.getLogger("steersman.access")


class AccessLog:
    """Writes the lines of requests."""

    def __init__(self, tenants: Sequence[str], replicas: Sequence[str], scheduler: Scheduler) -> None:
        """tenants, replicas: their names, by index."""
        self._tenants, self._replicas, self._scheduler = tenants, replicas, scheduler

    def over(self, exchange: Exchange) -> None:
        """An exchange is over: it was answered, or its client left."""
        if exchange.path not in UNLOGGED:
            self.line(
                exchange.request_id,
                exchange.method,
                exchange.path,
                exchange.status,
                exchange.code,
                exchange.ticket,
            )

    def line(
        self,
        request_id: bytes,
        method: bytes,
        path: bytes,
        status: int,
        reason: str,
        ticket: Ticket | None,
    ) -> None:
        """A request is over.

        path: without its query. status: 0 where its client left before one was sent. reason: code of the gateway's
        error. ticket: of a request that was let in.
        """
        told: dict[str, object] = {
            "request_id": _text(request_id),
            "method": _text(method),
            "path": _text(path),
            "status": status,
        }
        if reason:
            told["reason"] = reason
        if ticket is not None:
            request, served = ticket.request, ticket.served
            told |= {
                "tenant": self._tenants[request.tenant],
                "outcome": ticket.outcome,
                "duration_s": round(self._scheduler.now - ticket.arrived_s, 6),
                "prompt_tokens": request.prompt_tokens,
                "attempts": ticket.attempts,
                "holds": ticket.holds,
            }
            if ticket.replica >= 0:
                told["replica"] = self._replicas[ticket.replica]
            if ticket.arm is not None:
                told["policy"] = ticket.arm.version
            if served is not None:
                told |= {"tokens": served.tokens, "attained": served.attained}
                told |= {
                    name: round(value, 6)
                    for name, value in (("ttft_s", served.ttft_s), ("tpot_s", served.tpot_s), ("e2e_s", served.e2e_s))
                    if value == value
                }
        _log.info("", extra=named("request", told))


def _text(name: bytes) -> str:
    """What a client sent, on one line whatever it holds."""
    return name.decode("latin-1").encode("unicode_escape").decode()
