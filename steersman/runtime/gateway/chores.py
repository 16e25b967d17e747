"""What the gateway does beside requests, once a second."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from steersman.runtime.deployment.scalars import Scalars
from steersman.runtime.gateway.access import Access
from steersman.runtime.gateway.app import Gateway
from steersman.runtime.gateway.audit import Audit
from steersman.runtime.gateway.window import Gathered, Window
from steersman.runtime.journal import Journal
from steersman.runtime.log import named, tell
from steersman.runtime.outcomes import Summary
from steersman.runtime.tls import Tls

CHORES_S = 1.0
WINDOW_S = 10.0  # of what the board shows
_log = logging.getLogger("steersman.gateway")

Board = Callable[[Summary, dict[str, float]], object]


class Recorders(NamedTuple):
    """What keeps a record of the service."""

    audit: Audit | None = None
    journal: Journal | None = None
    board: Board | None = None


async def chores(gateway: Gateway, access: Access, certificates: Sequence[Tls], recorders: Recorders) -> None:
    """Once a second: what is idle too long, and files that have changed; now and then, a window for the board."""
    loop = asyncio.get_running_loop()
    assert gateway.scheduler.deployment is not None
    scalars, watched_s = Scalars(gateway.scheduler.deployment), loop.time()
    while True:
        await asyncio.sleep(CHORES_S)
        try:
            gateway.sweep(loop.time())
            if recorders.audit is not None:
                await asyncio.to_thread(recorders.audit.flush)
            # Thousands of keys take seconds to parse; a certificate is not changed while it may be in use.
            for problem in (await asyncio.to_thread(access.refresh), *(tls.refresh() for tls in certificates)):
                if problem is not None:
                    tell("file_not_read", f"{problem}; what was read before stays in use", logging.WARNING)
            if loop.time() - watched_s >= WINDOW_S:
                watched_s = loop.time()
                if gateway.window is not None and recorders.board is not None:
                    policy = gateway.scheduler.policy
                    await asyncio.to_thread(
                        _show,
                        gateway.window,
                        gateway.window.take(),
                        policy.name if policy is not None else "",
                        scalars.take(),
                        recorders.board,
                    )
        except Exception:  # a board on a full disk, say: time limits, keys and audit must not end with it
            _log.exception("a chore failed, and is done again", extra=named("chore_failed", {}))


def _show(window: Window, gathered: Gathered, policy: str, more: dict[str, float], board: Board) -> None:
    summary = window.summary(gathered, policy)
    if summary is not None:
        board(summary, more)
