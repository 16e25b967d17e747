"""A client's request on its way through the gateway: decided, held, tried on one replica or several, answered.

Every step is a call from what it waited for: a timer, a connection, the client that leaves. No task stands behind it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from steersman.runtime.gateway.attempt import Attempt, AttemptFailed, Suspect
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.refusals import all_failed, too_late
from steersman.runtime.gateway.steps import step
from steersman.runtime.ticket import DISPATCH, HOLD, Decision

if TYPE_CHECKING:
    from steersman.runtime.gateway.app import Gateway

# Failures that may be the end of a replica, and how many of them one request may meet.
_DEATHS, _MOST_DEATHS = ("broke", "silent"), 3
_log = logging.getLogger("steersman.gateway")


class Passage:
    """One request; the `Owner` of its attempts."""

    __slots__ = (
        "_attempt",
        "_call",
        "_caller",
        "_deadline",
        "_deaths",
        "_exchange",
        "_failure",
        "_gateway",
        "_inside",
        "_pause",
        "_ticket",
        "_tried",
        "suspects",
    )

    def __init__(self, gateway: Gateway, exchange: Exchange) -> None:
        """
        Raises:
            ApiError: it may not come in.
        """
        self._gateway, self._exchange = gateway, exchange
        self._caller, self._call, self._ticket = gateway.enter(exchange.headers, exchange.path, exchange.body)
        self._inside = True  # until it was told to leave
        exchange.ticket = self._ticket
        exchange.on_leave = self._left
        self.suspects: list[Suspect] = []
        self._tried: list[int] = []
        self._deaths = 0
        self._failure: AttemptFailed | None = None
        self._attempt: Attempt | None = None
        self._pause: asyncio.TimerHandle | None = None  # while it is held
        self._deadline: asyncio.TimerHandle | None = None
        if self._caller.deadline_s is not None:
            self._deadline = asyncio.get_running_loop().call_later(self._caller.deadline_s, self.too_late)

    @step
    def go(self) -> None:
        """Decide it, and do what was decided."""
        try:
            self._decide()
        except ApiError as error:
            self._refuse(error)

    def _decide(self) -> None:
        gateway, ticket = self._gateway, self._ticket
        decision = gateway.scheduler.decide(ticket, self._tried)
        if decision.kind is DISPATCH:
            gateway.scheduler.dispatched(ticket, decision.replica)
            self._attempt = gateway.relay.serve(self._exchange, self._call, ticket, self)
            # Noted only now: its replica need not wait for that.
            if self._inside:  # else a bug of ours ended it at once, and it is counted as over
                self._note(decision)
                if self._tried:
                    gateway.metrics.retried(self._tried[-1])
            return
        self._note(decision)
        if decision.kind is HOLD:
            pause_s = gateway.scheduler.held(ticket)
            self._pause = asyncio.get_running_loop().call_later(pause_s, self._resumed)
        else:
            gateway.turn_away(ticket, decision.kind if self._failure is None else "failed")
            if self._failure is None:
                raise gateway.turned_away(decision, ticket.request)
            raise self._all_failed(self._failure)

    def _note(self, decision: Decision) -> None:
        self._gateway.note(self._exchange.request_id, self._caller, self._ticket, decision, self._tried)

    @step
    def _resumed(self) -> None:
        self._pause = None
        self._gateway.scheduler.resumed(self._ticket)
        self.go()

    # From its attempts

    @step
    def answered(self) -> None:
        """The client has all that it will get."""
        self._attempt = None  # or each would keep the other until the garbage collector comes
        self._leave()
        self._exchange.over()

    @step
    def failed(self, error: AttemptFailed) -> None:
        """A replica failed it before the client got a byte: another one may have it."""
        gateway, ticket, replica = self._gateway, self._ticket, self._ticket.replica
        self._attempt, self._failure = None, error
        gateway.scheduler.withdrawn(ticket)
        gateway.metrics.error(replica, error.kind)
        self._tried.append(replica)
        self._deaths += error.kind in _DEATHS
        if self._deaths < _MOST_DEATHS:
            self.go()
        else:  # it may be what kills them
            gateway.turn_away(ticket, "failed")
            self._refuse(self._all_failed(error))

    def broken(self) -> None:
        """A bug of ours ended it; called where the exception was caught."""
        gateway, ticket = self._gateway, self._ticket
        try:
            self._stop()
            gateway.broke_off(ticket, "failed")
            if gateway.scheduler.abandoned(ticket):
                gateway.ended(ticket, "failed")
        except Exception:  # what broke it may break this, too: neither its client nor other requests are to wait
            _log.exception("request %s could not be counted", self._exchange.request_id.decode())
        self._leave()
        gateway.broken(self._exchange)

    def _all_failed(self, failure: AttemptFailed) -> ApiError:
        if len(self.suspects) == 1:  # of several that gave 5xx to one request, none is to blame
            self._gateway.pool.failed(*self.suspects[0])
        return all_failed(failure)

    # Other ends

    @step
    def too_late(self) -> None:
        """Its deadline has come: it ends, unless its answer has begun."""
        if not self._exchange.started:
            self._ticket.late = True
            self._give_up()
            self._refuse(too_late(self._caller.deadline_s))

    @step
    def _left(self) -> None:
        """Its client is gone."""
        self._give_up()
        self._leave()
        self._exchange.over()

    def _give_up(self) -> None:
        """It ends while it is held, or at a replica."""
        gateway, ticket, held = self._gateway, self._ticket, self._pause is not None
        self._stop()
        if held:
            gateway.given_up(ticket)
        else:
            gateway.broke_off(ticket, gateway.cause(ticket))

    def _stop(self) -> None:
        """Nothing that it waits for calls it any more."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None

    def _refuse(self, error: ApiError) -> None:
        self._leave()
        self._gateway.refuse(self._exchange, error)

    def _leave(self) -> None:
        if not self._inside:  # what failed came after it
            return
        self._inside = False
        if self._deadline is not None:
            self._deadline.cancel()
        self._exchange.on_leave = None
        self._gateway.leave(self._caller, self._ticket)
