"""The admin API: policies, replicas and state, on a port and with a key of its own.

Everything below /admin wants `Authorization: Bearer KEY`; without a configured key it answers on loopback only, and no
browser. /health and /metrics answer everybody who can reach the port.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, get_args

from aiohttp import web

import steersman
from steersman.runtime import archive
from steersman.runtime.deployment.deployer import SHARE, Deployer, Done, Place
from steersman.runtime.deployment.stats import stats
from steersman.runtime.errors import UserError
from steersman.runtime.manifest import finite
from steersman.runtime.plugins import nearest
from steersman.runtime.scheduler import Scheduler

JSON_LIMIT = 1 << 16  # bytes of a body that names a heuristic
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PLACES: tuple[Place, ...] = get_args(Place)
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Replicas(Protocol):
    """What the admin API needs of the pool of replicas; index is the place in the fleet."""

    @property
    def names(self) -> Sequence[str]: ...

    def drain(self, index: int, draining: bool) -> None:
        """It gets no new requests, or gets them again; those in flight go on."""
        ...

    def status(self, index: int) -> str:
        """up, down, open (its breaker), ramping or draining."""
        ...


@dataclass(frozen=True)
class AdminState:
    """What the admin API speaks for."""

    deployer: Deployer
    scheduler: Scheduler
    replicas: Replicas
    metrics: Callable[[], bytes]  # in Prometheus' text format
    health: Callable[[], Mapping[str, Any]]  # with `status`: "ok", or what is wrong
    key_sha256: str = ""  # of the admin key, hexadecimal; empty: there is none
    started_s: float = field(default_factory=time.monotonic)


class _Refused(Exception):
    """An answer other than 200: status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def admin_app(state: AdminState) -> web.Application:
    """The application of the admin port."""
    app = web.Application(client_max_size=archive.LARGEST)
    api = _Api(state)
    for method, path, handler in (
        ("GET", "/admin/state", api.show_state),
        ("GET", "/admin/policies", api.list_policies),
        ("POST", "/admin/policies", api.push),
        ("POST", "/admin/policies/rollback", api.rollback),
        ("POST", "/admin/policies/promote", api.promote),
        ("POST", "/admin/policies/{version}/activate", api.activate),
        ("DELETE", "/admin/policies/{place:shadow|canary}", api.stop),
        ("POST", "/admin/replicas/{name}/drain", api.drain),
        ("POST", "/admin/replicas/{name}/resume", api.resume),
        ("*", "/admin{rest:.*}", api.unknown),
    ):
        app.router.add_route(method, path, api.guarded(handler))
    app.router.add_get("/metrics", api.show_metrics)
    app.router.add_get("/health", api.show_health)
    return app


Handler = Callable[[web.Request], Awaitable[Mapping[str, Any]]]


class _Api:
    def __init__(self, state: AdminState) -> None:
        self._state = state

    def guarded(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Only for who may; JSON out, and one sentence for what is wrong."""

        async def handle(request: web.Request) -> web.Response:
            try:
                self._authorise(request)
                answer, status = await handler(request), 200
            except _Refused as error:
                answer, status = {"error": str(error)}, error.status
            except UserError as error:
                answer, status = {"error": str(error)}, 400
            except web.HTTPRequestEntityTooLarge:
                answer, status = {"error": f"the body is larger than {archive.LARGEST >> 20} MiB"}, 413
            return web.json_response(finite(dict(answer)), status=status)

        return handle

    def _authorise(self, request: web.Request) -> None:
        expected = self._state.key_sha256
        if not expected:
            if not _from_here(request):
                raise _Refused(403, "without an admin key the admin API answers on loopback only; configure a key")
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        if not hmac.compare_digest(digest, expected.lower()) or scheme.lower() != "bearer":
            raise _Refused(401, "the admin key is missing or wrong; send it as Authorization: Bearer KEY")

    # State

    async def show_state(self, request: web.Request) -> Mapping[str, Any]:
        scheduler = self._state.scheduler
        return {
            "version": steersman.__version__,
            "uptime_s": time.monotonic() - self._state.started_s,
            "policies": asdict(stats(self._state.deployer.deployment)),
            "replicas": [self._replica(index) for index in range(len(self._state.replicas.names))],
            "tenants": [self._tenant(index, name) for index, name in enumerate(scheduler.tenants)],
            "held": int(scheduler.book.fleet["held"][0]),
        }

    def _replica(self, index: int) -> dict[str, Any]:
        scheduler = self._state.scheduler
        view = scheduler.book.views[index]
        scraped = view["scraped_at_s"] > 0
        return {
            "name": self._state.replicas.names[index],
            "status": str(self._state.replicas.status(index)),
            "inflight": int(view["inflight"]),
            "running": int(view["running"]) if scraped else None,
            "waiting": int(view["waiting"]) if scraped else None,
            "kv_use": float(view["kv_use"]) if scraped else None,
            "metrics_age_s": scheduler.now - float(view["scraped_at_s"]) if scraped else None,
        }

    def _tenant(self, index: int, name: str) -> dict[str, Any]:
        book, promise = self._state.scheduler.book, self._state.scheduler.tenants[name].slo
        view = book.tenant_views[index]
        return {
            "name": name,
            "ttft_slo_s": promise.ttft_s,
            "tpot_slo_s": promise.tpot_s,
            "inflight": int(book.tenant_inflight[:, index].sum()),
            "arrived": int(view["arrived"]),
            "ended": int(view["ended"]),
            "attainment": float(view["attainment"]),  # a decaying mean
        }

    async def show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._state.metrics(), headers={"Content-Type": METRICS_TYPE})

    async def show_health(self, request: web.Request) -> web.Response:
        health = self._state.health()
        return web.json_response(dict(health), status=200 if health.get("status") == "ok" else 503)

    # Policies

    async def list_policies(self, request: web.Request) -> Mapping[str, Any]:
        return {"policies": [listed._asdict() for listed in self._state.deployer.listed()]}

    async def push(self, request: web.Request) -> Mapping[str, Any]:
        place, share = _asked(request)
        if request.content_type != "application/json":
            data = await request.read()
            return _told(await self._state.deployer.push_zip(data, place, share))
        if (request.content_length or 0) > JSON_LIMIT:
            raise _Refused(413, f"a JSON body may have {JSON_LIMIT} bytes; send a bundle's zip as application/zip")
        try:
            spec = json.loads(await request.read())["heuristic"]
        except (ValueError, KeyError, TypeError, RecursionError):
            spec = None
        if not isinstance(spec, str):
            raise _Refused(400, 'a JSON body must be {"heuristic": "NAME"}; send a bundle\'s zip as application/zip')
        return _told(await self._state.deployer.push_heuristic(spec, place, share))

    async def activate(self, request: web.Request) -> Mapping[str, Any]:
        place, share = _asked(request)
        return _told(await self._state.deployer.activate(request.match_info["version"], place, share))

    async def rollback(self, request: web.Request) -> Mapping[str, Any]:
        return _told(await self._state.deployer.rollback())

    async def promote(self, request: web.Request) -> Mapping[str, Any]:
        return _told(await self._state.deployer.promote())

    async def stop(self, request: web.Request) -> Mapping[str, Any]:
        place = request.match_info["place"]
        return _told(await self._state.deployer.stop("shadow" if place == "shadow" else "canary"))

    # Replicas

    async def drain(self, request: web.Request) -> Mapping[str, Any]:
        index = self._index(request)
        self._state.replicas.drain(index, True)
        left = self._state.scheduler.inflight(index)
        return {"sentence": f"{self._state.replicas.names[index]} gets no new requests; {left} are in flight there"}

    async def resume(self, request: web.Request) -> Mapping[str, Any]:
        index = self._index(request)
        self._state.replicas.drain(index, False)
        return {"sentence": f"{self._state.replicas.names[index]} gets requests again"}

    def _index(self, request: web.Request) -> int:
        names, name = list(self._state.replicas.names), request.match_info["name"]
        if name not in names:
            raise _Refused(404, f"there is no replica {name!r}; {nearest(name, names)}")
        return names.index(name)

    async def unknown(self, request: web.Request) -> Mapping[str, Any]:
        raise _Refused(404, f"{request.method} {request.path} is not served here")


def _asked(request: web.Request) -> tuple[Place, float]:
    """The place that a policy is to take, and its share of the requests."""
    asked, share = request.query.get("as", "current"), request.query.get("share")
    place = next((place for place in _PLACES if place == asked), None)
    if place is None:
        raise _Refused(400, f"a policy cannot be deployed as {asked!r}; {nearest(asked, list(_PLACES))}")
    if share is None:
        return place, SHARE
    if place != "canary":
        raise _Refused(400, f"only a canary has a share of the requests; leave it out with as={place}")
    try:
        return place, float(share)
    except ValueError:
        raise _Refused(400, f"share must be a number above 0 and at most 1, got {share!r}") from None


def _told(done: Done) -> Mapping[str, Any]:
    return done._asdict()


def _from_here(request: web.Request) -> bool:
    """Whether a process of this machine asks, and not a web page that its browser shows."""
    try:
        local = ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        local = False
    host = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdigit() else request.host
    return local and "Origin" not in request.headers and host in _LOOPBACK_NAMES
