"""What is answered without a decision: the models, how the gateway is, its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.http.exchange import Exchange
from steersman.runtime.gateway.metrics import CONTENT_TYPE
from steersman.runtime.gateway.refusals import not_allowed

if TYPE_CHECKING:
    from steersman.runtime.gateway.app import Gateway


class Pages:
    """The pages of a gateway."""

    def __init__(self, gateway: Gateway, open_metrics: bool) -> None:
        """open_metrics: /metrics is here, for anybody."""
        self._gateway = gateway
        self._pages: dict[bytes, Callable[[Exchange], None]] = {
            b"/v1/models": self._list_models,
            b"/health": self._show_health,
        }
        if open_metrics:
            self._pages[b"/metrics"] = self._show_metrics

    def answer(self, exchange: Exchange) -> None:
        """Answer with the page that is asked for.

        Raises:
            ApiError: 404 where there is none, 405 for another method than GET or HEAD, or as `models`.
        """
        page = self._pages.get(exchange.path)
        if page is None:
            asked = f"{exchange.method.decode()} {exchange.path.decode('latin-1')}"
            raise ApiError(404, f"{asked} is not served here", code="not_found")
        if exchange.method not in (b"GET", b"HEAD"):
            raise not_allowed(exchange.path, "GET, HEAD")
        page(exchange)

    def models(self, headers: Mapping[bytes, bytes]) -> bytes:
        """What /v1/models answers.

        Raises:
            ApiError: 401 without a known key, where there are keys.
        """
        access, fleet = self._gateway.access, self._gateway.scheduler.fleet
        if access.keys is not None:
            access.caller(headers)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "steersman"} for name in fleet.models]
        return json.dumps({"object": "list", "data": models}).encode()

    def health(self) -> dict[str, object]:
        """`status` is "ok", or says what is wrong; `replicas` tells operators which ones may take requests."""
        pool, replicas = self._gateway.pool, self._gateway.scheduler.replicas
        up = {name: bool(up) for name, up in zip(pool.names, replicas["up"], strict=True)}
        return {"status": self._status(), "replicas": up}

    def _status(self) -> str:
        if self._gateway.phase:
            return "draining"
        return "ok" if self._gateway.scheduler.replicas["up"].any() else "no replica is up"

    def _list_models(self, exchange: Exchange) -> None:
        exchange.respond(200, self.models(exchange.headers))

    def _show_health(self, exchange: Exchange) -> None:
        # Everybody may ask: how many there are, and none of their names.
        status, up = self._status(), self._gateway.scheduler.replicas["up"]
        health = {"status": status, "replicas": {"up": int((up == 1).sum()), "of": len(up)}}
        exchange.respond(200 if status == "ok" else 503, json.dumps(health).encode())

    def _show_metrics(self, exchange: Exchange) -> None:
        exchange.respond(200, self._gateway.metrics.text(), content_type=CONTENT_TYPE.encode())
