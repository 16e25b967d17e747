"""A Ray Serve deployment of replicas of different speed; its replicas import this module by its name."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve

# Seconds of a call, by rank.
REPLICAS = (("fast", 0.02), ("middle", 0.05), ("slow", 0.2))


class Model:
    """Waits as long as its replica is slow, one call at a time."""

    def __init__(self) -> None:
        rank = serve.get_replica_context().rank
        self.name, self.seconds = REPLICAS[getattr(rank, "rank", rank)]
        self.turn = asyncio.Lock()

    def record_replica_metadata(self) -> dict[str, Any]:
        return {"steersman_replica": self.name}

    async def __call__(self, body: dict[str, Any]) -> str:
        async with self.turn:
            await asyncio.sleep(self.seconds)
        return self.name
