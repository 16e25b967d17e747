"""The admin API over HTTP, and the commands that speak to it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from bundles import WEIGHTS, export
from rich.console import Console
from simulated import TENANTS, fleet
from typer.testing import CliRunner

from steersman.agents.policies import heuristic
from steersman.cli import app as cli
from steersman.runtime import archive
from steersman.runtime.admin import top
from steersman.runtime.admin.api import AdminState, admin_app
from steersman.runtime.admin.client import AdminClient
from steersman.runtime.admin.config import KEY_ENV, AdminConfig
from steersman.runtime.deployment.deployer import Deployer
from steersman.runtime.deployment.selftest import SelfTest
from steersman.runtime.deployment.store import PolicyStore
from steersman.runtime.errors import UserError
from steersman.runtime.policy import Policy
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import LiveRequest

KEY = "s3cret-admin-key"
REQUEST = LiveRequest(tenant=0, prompt_tokens=1000, max_tokens=100)


def named(spec: str) -> Policy:
    return heuristic(spec).bind()


class FakePool:
    """Replicas that can be drained."""

    names = ("r0", "r1")

    def __init__(self) -> None:
        self.draining = [False, False]

    def drain(self, index: int, draining: bool) -> None:
        self.draining[index] = draining

    def status(self, index: int) -> str:
        return "draining" if self.draining[index] else "up"


class Admin:
    """A running admin API, and ways to ask it."""

    def __init__(self, state: AdminState, url: str, session: aiohttp.ClientSession) -> None:
        self.state = state
        self.url = url
        self.session = session

    @property
    def deployer(self) -> Deployer:
        return self.state.deployer

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        async with self.session.request(method, self.url + path, **options) as answer:
            return answer.status, await answer.json()

    async def client(self, call: Callable[[AdminClient], Any], key: str | None = None) -> Any:
        """What `call` gives for a client, which blocks: in a thread."""
        return await asyncio.to_thread(call, AdminClient(self.url, key))

    async def command(self, *words: str, key: str = "") -> tuple[int, str]:
        """The exit code and the output of `steersman WORDS`; of a user's mistake its sentence."""
        environment = {"STEERSMAN_ADMIN": self.url, "STEERSMAN_ADMIN_KEY": key}
        result = await asyncio.to_thread(CliRunner().invoke, cli, list(words), env=environment)
        if isinstance(result.exception, UserError):
            return 2, str(result.exception)
        return result.exit_code, result.output


@asynccontextmanager
async def admin(key: str = "") -> AsyncIterator[Admin]:
    store = PolicyStore(None, named)
    first, _ = store.begin(store.prepare_heuristic("jsed"))
    scheduler = Scheduler(fleet({}, {}), TENANTS, first, named("least-requests"), policy_limit_s=10.0)
    assert scheduler.deployment is not None
    state = AdminState(
        Deployer(scheduler.deployment, store, SelfTest(scheduler)),
        scheduler,
        FakePool(),
        metrics=lambda: b"steersman_up 1\n",
        health=lambda: {"status": "ok"},
        key_sha256=hashlib.sha256(key.encode()).hexdigest() if key else "",
    )
    runner = web.AppRunner(admin_app(state))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Admin(state, f"http://127.0.0.1:{runner.addresses[0][1]}", session)
    finally:
        await runner.cleanup()


def zipped(path: Path, seed: int = 0) -> bytes:
    return archive.pack(archive.read(export(path / f"bundle-{seed}", weights=WEIGHTS + 0.01 * seed)))


# Who may


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic " + KEY, "Bearer", "Bearer \udcff"])
async def test_without_the_right_key_nothing_is_told_or_done(header: str | None) -> None:
    async with admin(KEY) as a:
        headers = (
            {} if header is None else {"Authorization": header.encode("utf-8", "surrogateescape").decode("latin1")}
        )
        for method, path in (("GET", "/admin/state"), ("POST", "/admin/policies/rollback"), ("GET", "/admin/nothing")):
            status, answer = await a.ask(method, path, headers=headers)
            assert (status, list(answer)) == (401, ["error"])
            assert "the admin key is missing or wrong" in answer["error"]


async def test_the_right_key_opens() -> None:
    async with admin(KEY) as a:
        status, answer = await a.ask("GET", "/admin/state", headers={"Authorization": f"Bearer {KEY}"})
        assert status == 200
        assert answer["policies"]["current"] == "jsed"
        assert KEY not in json.dumps(answer)


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example:8081"}])
async def test_without_a_key_no_web_page_may_ask(headers: dict[str, str]) -> None:
    async with admin() as a:
        status, answer = await a.ask("POST", "/admin/policies/rollback", headers=headers)
        assert status == 403
        assert "without an admin key the admin API answers on loopback only" in answer["error"]


async def test_health_and_metrics_need_no_key() -> None:
    async with admin(KEY) as a:
        assert await a.ask("GET", "/health") == (200, {"status": "ok"})
        async with a.session.get(a.url + "/metrics") as answer:
            assert await answer.read() == b"steersman_up 1\n"
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")


# Policies


async def test_a_bundle_is_pushed_as_a_canary_promoted_and_rolled_back(tmp_path: Path) -> None:
    async with admin() as a:
        status, answer = await a.ask("POST", "/admin/policies?as=canary&share=0.3", data=zipped(tmp_path))
        version = answer["version"]
        assert status == 200
        assert answer["sentence"] == f"{version} decides 0.3 of the requests as a canary"
        assert (await a.ask("POST", "/admin/policies/promote"))[0] == 200
        _, listed = await a.ask("GET", "/admin/policies")
        assert [(p["version"], p["places"]) for p in listed["policies"]] == [
            (version, ["current"]),
            ("jsed", ["previous"]),
        ]
        assert (await a.ask("POST", "/admin/policies/rollback"))[1]["version"] == "jsed"


async def test_a_heuristic_is_pushed_by_name_and_activated_by_version() -> None:
    async with admin() as a:
        body = {"heuristic": "jsed?decode_weight=0.5"}
        assert (await a.ask("POST", "/admin/policies?as=shadow", json=body))[0] == 200
        assert (await a.ask("DELETE", "/admin/policies/shadow"))[0] == 200
        status, answer = await a.ask("POST", "/admin/policies/jsed%3Fdecode_weight=0.5/activate?as=current")
        assert (status, answer["version"]) == (200, "jsed?decode_weight=0.5")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "/admin/policies", b"no zip", 400, "the pushed bundle: not a bundle's zip"),
        ("POST", "/admin/policies?as=curent", b"", 400, "did you mean 'current'?"),
        ("POST", "/admin/policies?share=0.1", b"", 400, "only a canary has a share"),
        ("POST", "/admin/policies?as=canary&share=much", b"", 400, "share must be a number"),
        ("POST", "/admin/policies?as=canary&share=2", {"heuristic": "jsed"}, 400, "at most 1, got 2"),
        ("POST", "/admin/policies", {"heuristic": "jsd"}, 400, "did you mean 'jsed'?"),
        ("POST", "/admin/policies", {"heuristic": 1}, 400, 'must be {"heuristic": "NAME"}'),
        ("POST", "/admin/policies", ["x"], 400, 'must be {"heuristic": "NAME"}'),
        ("POST", "/admin/policies", {"heuristic": "x" * 70_000}, 413, "a JSON body may have 65536 bytes"),
        ("POST", "/admin/policies/rollback", b"", 400, "nothing to roll back to"),
        ("POST", "/admin/policies/promote", b"", 400, "no canary to promote"),
        ("POST", "/admin/policies/jsd/activate", b"", 400, "there is no policy 'jsd'"),
        ("DELETE", "/admin/policies/canary", None, 400, "there is no canary"),
        ("DELETE", "/admin/policies/current", None, 404, "is not served here"),
        ("GET", "/admin/policies/rollback", None, 404, "is not served here"),
        ("POST", "/admin/replicas/r7/drain", b"", 404, "there is no replica 'r7'"),
    ],
)
async def test_what_cannot_be_done_is_said_in_one_sentence(
    method: str, path: str, body: object, status: int, said: str
) -> None:
    async with admin() as a:
        given = {"data": body} if isinstance(body, bytes) else {} if body is None else {"json": body}
        got, answer = await a.ask(method, path, **given)
        assert (got, list(answer)) == (status, ["error"])
        assert said in answer["error"]
        assert "\n" not in answer["error"]
        assert a.deployer.deployment.current.version == "jsed"


async def test_a_body_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LARGEST", 1 << 20)
    async with admin() as a:
        status, answer = await a.ask("POST", "/admin/policies", data=io.BytesIO(bytes((1 << 20) + 1)))
        assert (status, answer) == (413, {"error": "the body is larger than 1 MiB"})


# State


async def test_the_state_tells_of_replicas_tenants_and_policies() -> None:
    async with admin() as a:
        s = a.state.scheduler
        tickets = [s.arrive(REQUEST) for _ in range(3)]
        for ticket in tickets:
            s.decide(ticket)
            s.dispatched(ticket, 0)
        s.first_token(tickets[0])
        s.ended(tickets[0], ok=True)
        s.scraped(0, 2, 1, 0.25)
        _, state = await a.ask("GET", "/admin/state")
        first, second = state["replicas"]
        assert first.pop("metrics_age_s") < 60
        assert first == {
            "name": "r0",
            "status": "up",
            "inflight": 2,
            "running": 2,
            "waiting": 1,
            "kv_use": 0.25,
        }
        assert (second["inflight"], second["metrics_age_s"], second["running"]) == (0, None, None)
        strict = state["tenants"][0]
        assert {key: strict[key] for key in ("name", "inflight", "arrived", "ended")} == {
            "name": "strict",
            "inflight": 2,
            "arrived": 3,
            "ended": 1,
        }
        assert state["policies"]["decisions"] == 3


async def test_a_replica_is_drained_and_resumed() -> None:
    async with admin() as a:
        status, answer = await a.ask("POST", "/admin/replicas/r1/drain")
        assert (status, answer["sentence"]) == (200, "r1 gets no new requests; 0 are in flight there")
        assert (await a.ask("GET", "/admin/state"))[1]["replicas"][1]["status"] == "draining"
        await a.ask("POST", "/admin/replicas/r1/resume")
        assert (await a.ask("GET", "/admin/state"))[1]["replicas"][1]["status"] == "up"


# Commands


async def test_policies_are_pushed_listed_and_rolled_back_by_command(tmp_path: Path) -> None:
    export(tmp_path / "run" / "bundle")
    async with admin(KEY) as a:
        code, said = await a.command(
            "policy", "push", str(tmp_path / "run"), "--as", "canary", "--share", "0.2", key=KEY
        )
        version = said.split()[0]
        assert (code, said) == (0, f"{version} decides 0.2 of the requests as a canary\n")
        assert (await a.command("policy", "promote", key=KEY))[0] == 0
        _, listed = await a.command("policy", "list", key=KEY)
        assert [line.split()[:2] for line in listed.splitlines()[1:]] == [[version, "current"], ["jsed", "previous"]]
        assert await a.command("policy", "rollback", key=KEY) == (
            0,
            f"jsed decides again, {version} was rolled back\n",
        )
        assert (await a.command("policy", "push", version, "--as", "shadow", key=KEY))[0] == 0
        assert await a.command("policy", "stop", "shadow", key=KEY) == (0, f"the shadow {version} was stopped\n")
        assert (await a.command("policy", "push", "least-tokens", key=KEY))[0] == 0
        assert a.deployer.deployment.current.version == "least-tokens"
        assert (await a.command("replica", "drain", "r0", key=KEY))[0] == 0
        assert (await a.command("replica", "resume", "r0", key=KEY))[0] == 0


async def test_a_wrong_key_is_one_sentence() -> None:
    async with admin(KEY) as a:
        assert await a.command("policy", "rollback", key="no") == (
            2,
            f"{a.url}: the admin key is missing or wrong; set STEERSMAN_ADMIN_KEY",
        )


async def test_the_gateways_own_sentence_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK")
    async with admin() as a:
        assert "there is no policy 'jsd'" in (await a.command("policy", "push", "jsd"))[1]
        assert "broken.zip: not a bundle's zip" in (await a.command("policy", "push", str(tmp_path / "broken.zip")))[1]
        assert "cannot be stopped" in (await a.command("policy", "stop", "current"))[1]


async def test_a_gateway_that_does_not_answer_is_one_sentence(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    with pytest.raises(UserError, match=r"no gateway answers there \(Connection refused\)"):
        await asyncio.to_thread(AdminClient(url, None).state)


async def test_another_server_is_named_as_such() -> None:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_get("/{path:.*}", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        with pytest.raises(UserError, match="answers, but not as an admin API does"):
            await asyncio.to_thread(AdminClient(f"http://127.0.0.1:{runner.addresses[0][1]}", None).state)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("url", ["localhost:8081", "file:///etc/passwd", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="expected a URL such as"):
        AdminClient(url, None)


async def test_the_admin_key_may_end_with_the_line_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY + "\n")
    assert AdminConfig().key_digest() == hashlib.sha256(KEY.encode()).hexdigest()
    async with admin() as a:
        assert (await asyncio.to_thread(AdminClient(a.url, KEY + "\n").state))["held"] == 0


def test_an_admin_key_that_no_header_can_hold_is_not_shown() -> None:
    with pytest.raises(UserError, match="it has odd characters") as caught:
        AdminClient("http://127.0.0.1:8081", f"{KEY}\n{KEY}")
    assert KEY not in str(caught.value)


# Top


async def test_one_page_shows_replicas_tenants_and_policies() -> None:
    async with admin() as a:
        s = a.state.scheduler
        await a.deployer.push_heuristic("least-tokens", "shadow")
        await a.deployer.push_heuristic("round-robin", "canary", 0.5)
        for _ in range(10):
            ticket = s.arrive(REQUEST)
            s.dispatched(ticket, s.decide(ticket).replica)
            s.first_token(ticket)
            s.ended(ticket, ok=True)
        code, page = await a.command("top", "--once")
        assert code == 0
        for part in ("0 in flight", "current  jsed", "shadow   least-tokens", "canary   round-robin", "r1", "strict"):
            assert part in page


async def test_rates_are_since_the_page_before() -> None:
    async with admin() as a:
        _, before = await a.ask("GET", "/admin/state")
        for _ in range(10):
            a.state.scheduler.decide(a.state.scheduler.arrive(REQUEST))
        _, after = await a.ask("GET", "/admin/state")
        console = Console(width=120, file=io.StringIO())
        console.print(top.page(after, before, 2.0))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "5.0 decisions/s" in text
        strict = next(line for line in text.splitlines() if line.startswith("strict"))
        assert strict.split()[5:8] == ["0", "5.0", "0.0"]


async def test_pages_go_on_while_the_gateway_does_not_answer() -> None:
    async with admin() as a:
        _, state = await a.ask("GET", "/admin/state")
    answers: list[object] = [state, UserError("no gateway answers there"), state, KeyboardInterrupt()]

    def ask() -> dict[str, Any]:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return dict(state)

    console = Console(width=120, file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        top.show(console, ask, every_s=0.0)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "no gateway answers there" in shown
    assert not answers
