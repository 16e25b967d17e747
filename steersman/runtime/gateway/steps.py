"""Steps of a request that no task stands behind: each is called by a timer, a connection or a client that leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, TypeVar, TypeVarTuple


class Breakable(Protocol):
    """What has steps."""

    def broken(self) -> None:
        """A bug of ours ended it; called where the exception was caught."""
        ...


_Self = TypeVar("_Self", bound=Breakable)
_Given = TypeVarTuple("_Given")


def step(do: Callable[[_Self, *_Given], None]) -> Callable[[_Self, *_Given], None]:
    """A step whose failure ends its request: whoever calls it could not, and the client would wait for ever."""

    @functools.wraps(do)
    def guarded(self: _Self, /, *given: *_Given) -> None:
        try:
            do(self, *given)
        except Exception:
            self.broken()

    return guarded
