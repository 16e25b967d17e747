"""A gateway and its admin side together: what an operator changes is what the next request meets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from backends import Served, serving
from bundles import WEIGHTS, export
from certificates import make, needs_openssl

from steersman.agents.policies import heuristic
from steersman.runtime import archive
from steersman.runtime.admin.client import AdminClient
from steersman.runtime.admin.config import AdminConfig
from steersman.runtime.deployment.store import PolicyStore
from steersman.runtime.errors import UserError
from steersman.runtime.gateway.control import Control, Policies, check_reach
from steersman.runtime.policy import Policy
from steersman.runtime.tls import Tls, TlsConfig

PATH = "/v1/completions"
BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}


def named(spec: str) -> Policy:
    return heuristic(spec).bind()


@asynccontextmanager
async def operated(
    path: Path | None = None, tls: Tls | None = None, folder: Path | None = None
) -> AsyncIterator[tuple[Served, str, list[str]]]:
    """A gateway with its admin API, that API's URL, and what the operator was told."""
    store, told = PolicyStore(folder, named), list[str]()
    first = store.prepare_heuristic("jsed") if path is None else store.prepare_path(path)
    release, _ = store.begin(first)
    async with serving(release) as s:
        policies = Policies(store, first, path)
        control = Control(AdminConfig(), policies, s.gateway, lambda _event, said: told.append(said), tls)
        listener = socket.create_server(("127.0.0.1", 0))
        await control.start(listener)
        try:
            yield s, f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}", told
        finally:
            await control.stop()


async def ask(s: Served, method: str, url: str, **options: Any) -> dict[str, Any]:
    async with s.client.request(method, url, **options) as answer:
        assert answer.status == 200
        return dict(await answer.json())


async def replica_of(s: Served) -> str:
    async with s.client.post(PATH, json=BODY) as response:
        assert response.status == 200
        return response.headers["X-Steersman-Replica"]


@needs_openssl
async def test_the_admin_port_speaks_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = make(tmp_path)
    async with operated(tls=Tls(TlsConfig(certificate=certificate, key=key), "admin.tls")) as (_, admin, _):
        with pytest.raises(UserError, match=r"its certificate is not trusted here .* SSL_CERT_FILE"):
            await asyncio.to_thread(AdminClient(admin, None).state)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        state = await asyncio.to_thread(AdminClient(admin, None).state)
        assert state["policies"]["current"] == "jsed"


async def test_what_is_tried_goes_on_when_the_gateway_is_started_again(tmp_path: Path) -> None:
    async with operated(folder=tmp_path) as (s, admin, _):
        await ask(s, "POST", f"{admin}/admin/policies?as=canary&share=0.5", json={"heuristic": "least-tokens"})
    async with operated(folder=tmp_path) as (s, admin, told):
        state = await ask(s, "GET", f"{admin}/admin/state")
    assert state["policies"]["canary"]["version"] == "least-tokens"
    assert told == ["least-tokens decides 0.5 of the requests as a canary"]


async def test_a_pushed_bundle_decides_the_next_request(tmp_path: Path) -> None:
    async with operated() as (s, admin, told):
        data = archive.pack(archive.read(export(tmp_path / "bundle")))
        version = (await ask(s, "POST", f"{admin}/admin/policies", data=data))["version"]
        await replica_of(s)
        assert s.metric("policy_decisions_total", version=version, arm="current") == 1
        assert s.metric("policy_deployed", version=version, place="current") == 1
        assert told == [f"{version} decides, in place of jsed"]


async def test_a_drained_replica_gets_no_request_until_it_is_resumed() -> None:
    async with operated() as (s, admin, _):
        await ask(s, "POST", f"{admin}/admin/replicas/r0/drain")
        assert {await replica_of(s) for _ in range(4)} == {"r1"}
        state = await ask(s, "GET", f"{admin}/admin/state")
        assert [replica["status"] for replica in state["replicas"]] == ["draining", "up"]
        await ask(s, "POST", f"{admin}/admin/replicas/r0/resume")
        await ask(s, "POST", f"{admin}/admin/replicas/r1/drain")
        assert await replica_of(s) == "r0"


async def test_a_shadow_sees_what_the_gateway_decides() -> None:
    async with operated() as (s, admin, _):
        await ask(s, "POST", f"{admin}/admin/policies?as=shadow", json={"heuristic": "least-tokens"})
        await replica_of(s)
        assert (await ask(s, "GET", f"{admin}/admin/state"))["policies"]["shadow"]["decisions"] == 1


async def test_health_and_metrics_are_the_gateways() -> None:
    async with operated() as (s, admin, _):
        assert (await ask(s, "GET", f"{admin}/health"))["replicas"] == {"r0": True, "r1": True}
        async with s.client.get(f"{admin}/metrics") as answer:
            assert b"steersman_policy_deployed" in await answer.read()


async def test_the_bundle_that_the_gateway_was_started_with_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steersman.runtime.deployment.watch.BundleWatch.run.__defaults__", (0.0,))
    path = export(tmp_path / "bundle")
    async with operated(path) as (s, _, _):
        changed = asyncio.Event()
        assert s.gateway.scheduler.deployment is not None
        s.gateway.scheduler.deployment.told = lambda _event, _said: changed.set()
        export(path, weights=WEIGHTS + 1)
        async with asyncio.timeout(30):
            await changed.wait()
        assert s.gateway.scheduler.deployment.changes == {"activated": 1}


def test_beyond_loopback_the_admin_api_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEERSMAN_ADMIN_KEY", raising=False)
    with pytest.raises(UserError, match="beyond loopback the admin API needs a key"):
        check_reach(AdminConfig(host="0.0.0.0"))
    check_reach(AdminConfig(host="::1"))
    monkeypatch.setenv("STEERSMAN_ADMIN_KEY", "k")
    check_reach(AdminConfig(host="0.0.0.0"))
