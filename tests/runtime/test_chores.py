"""What the gateway does beside requests, and says to its operator."""

from __future__ import annotations

import asyncio
import threading

import pytest
from backends import Prefer, serving

from steersman.runtime.gateway import chores, terminal
from steersman.runtime.gateway.config import GatewayConfig
from steersman.runtime.gateway.window import Window
from steersman.runtime.outcomes import Summary


async def test_a_board_that_cannot_be_written_does_not_end_the_chores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "CHORES_S", 0.001)
    monkeypatch.setattr(chores, "WINDOW_S", 0.0)
    loop, again, calls = asyncio.get_running_loop(), asyncio.Event(), list[float]()

    def board(_summary: Summary, _more: dict[str, float]) -> None:
        calls.append(0.0)
        if len(calls) > 1:
            loop.call_soon_threadsafe(again.set)
        raise OSError(28, "No space left on device")

    async with serving(Prefer(0), 1) as s:
        s.gateway.window = Window(s.gateway.scheduler, s.gateway.access.rows)
        task = asyncio.create_task(chores.chores(s.gateway, s.gateway.access, (), chores.Recorders(board=board)))
        async with asyncio.timeout(10):
            await again.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_keys_are_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "CHORES_S", 0.001)
    read_by: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    async with serving(Prefer(0), 1) as s:

        def refresh() -> None:
            loop.call_soon_threadsafe(read_by.put_nowait, threading.get_ident())

        monkeypatch.setattr(s.gateway.access, "refresh", refresh)
        task = asyncio.create_task(chores.chores(s.gateway, s.gateway.access, (), chores.Recorders()))
        async with asyncio.timeout(10):
            assert await read_by.get() != threading.get_ident()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("asked", "warned"),
    [
        ({}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "keys": "keys.yaml"}, False),
        ({"host": "::1"}, False),
        ({"admin": {"host": "0.0.0.0"}}, True),
        ({"admin": {"host": "0.0.0.0", "tls": {"certificate": "cert.pem", "key": "key.pem"}}}, False),
    ],
)
def test_a_gateway_that_is_open_to_others_says_so(asked: dict[str, object], warned: bool) -> None:
    assert bool(list(terminal.open_to(GatewayConfig.model_validate(asked)))) == warned
