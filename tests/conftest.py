"""Which event loops asynchronous tests run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

# uvloop is what serves; the other one is what environments and notebooks have.
_ON_UVLOOP = ("test_malformed.py",)
_ON_BOTH = ("test_http_server.py", "test_http_client.py", "test_tls.py")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.path.name in _ON_UVLOOP:
        return {"uvloop": uvloop.new_event_loop}
    if item.path.name in _ON_BOTH:
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
