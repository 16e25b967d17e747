"""A reload storm: policies pushed, promoted, rolled back and replaced by broken ones while requests are decided."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from backends import serving
from bundles import WEIGHTS, export
from simulated import TENANTS, fleet

from steersman.agents.policies import heuristic
from steersman.runtime import archive
from steersman.runtime.deployment import Release
from steersman.runtime.deployment.deployer import Deployer
from steersman.runtime.deployment.selftest import SelfTest
from steersman.runtime.deployment.store import PolicyStore
from steersman.runtime.errors import UserError
from steersman.runtime.policy import Policy
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Kind, LiveRequest, Stage

OPERATIONS = 120
AT_LEAST = 5000  # decisions


def named(spec: str) -> Policy:
    return heuristic(spec).bind()


class Broken:
    """Passes for a policy, until it is asked."""

    name = "broken"

    def __init__(self, number: int) -> None:
        self.number = number

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if self.number % 3 == 0:
            raise RuntimeError("broken")
        return np.zeros(1) if self.number % 3 == 1 else np.full(len(mask), math.nan)


async def test_no_decision_is_lost_and_each_names_its_version(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "state", named)
    first, _ = store.begin(store.prepare_heuristic("jsed"))
    s = Scheduler(fleet({}, {}, {}), TENANTS, first, named("least-requests"), policy_limit_s=10.0)
    d = s.deployment
    assert d is not None
    d.later = asyncio.get_running_loop().call_soon
    deployer = Deployer(d, store, SelfTest(s))
    bundles = [
        archive.pack(archive.read(export(tmp_path / f"b{i}", weights=WEIGHTS + 0.01 * i, name=f"policy-{i}")))
        for i in range(4)
    ]
    known = {"jsed", "least-tokens", "round-robin", "least-requests", "broken"}
    over = asyncio.Event()
    decided: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()

    async def client(number: int) -> None:
        """Sends requests one after the other until the storm is over: each is served, or shed."""
        rng = np.random.default_rng(number)
        while not over.is_set() or sum(decided.values()) < AT_LEAST:
            request = LiveRequest(int(rng.integers(2)), int(rng.integers(1, 3000)), 50)
            ticket = s.arrive(request)
            expected = d.current.version
            decision = s.decide(ticket)
            decided[decision.version] += 1
            # The policy of this very moment decided, the canary beside it, or the fallback for one of them.
            if decision.fallback is None and decision.arm == "current":
                assert decision.version == expected
            while decision.kind is Kind.HOLD:
                s.held(ticket)
                await asyncio.sleep(0)
                s.resumed(ticket)
                decision = s.decide(ticket)
                decided[decision.version] += 1
            if decision.kind is Kind.DISPATCH:
                s.dispatched(ticket, decision.replica)
                await asyncio.sleep(0)
                s.first_token(ticket)
                await asyncio.sleep(0)
                s.ended(ticket, ok=True, tokens=int(rng.integers(1, 50)))
            else:
                s.shed(ticket)
                await asyncio.sleep(0)
            assert ticket.stage is Stage.OVER
            outcomes[decision.kind.value] += 1

    async def operator() -> None:
        rng = np.random.default_rng(0)
        for number in range(OPERATIONS):
            place = ("current", "shadow", "canary")[int(rng.integers(3))]
            kind = int(rng.integers(7))
            try:
                if kind == 0:
                    known.add((await deployer.push_zip(bundles[number % 4], place, 0.3)).version)
                elif kind == 1:
                    await deployer.push_heuristic(("least-tokens", "round-robin")[number % 2], place, 0.5)
                elif kind == 2:
                    await deployer.push_zip(bundles[0][: int(rng.integers(len(bundles[0])))], place)
                elif kind == 3:
                    await deployer.rollback()
                elif kind == 4:
                    await deployer.promote()
                elif kind == 5:
                    await deployer.activate(next(iter(store.index.policies)), place)
                elif place == "current":  # what no self-test would let pass
                    d.activate(Release(Broken(number), "broken"))
                elif place == "shadow":
                    d.start_shadow(Release(Broken(number), "broken"))
                else:
                    d.start_canary(Release(Broken(number), "broken"), 0.5)
            except UserError:
                pass
            await asyncio.sleep(0)
        over.set()

    await asyncio.gather(operator(), *(client(number) for number in range(8)))
    assert sum(decided.values()) >= AT_LEAST
    assert set(decided) <= known
    assert len(decided) > 5
    assert d.decisions == sum(decided.values())
    # Nothing is left in flight, and what was counted is what happened.
    assert [s.inflight(r) for r in range(3)] == [0, 0, 0]
    assert s.book.fleet["held"][0] == 0
    assert s.book.tenant_views["arrived"].sum() == s.book.tenant_views["ended"].sum() == sum(outcomes.values())
    assert {"activated", "rolled_back", "promoted", "refused", "canary_started", "shadow_started"} <= set(d.changes)


async def test_no_request_to_the_gateway_is_dropped(tmp_path: Path) -> None:
    async with serving(named("jsed")) as gateway:
        s = gateway.gateway.scheduler
        assert s.deployment is not None
        store = PolicyStore(None, named)
        store.begin(store.prepare_heuristic("jsed"))
        deployer = Deployer(s.deployment, store, SelfTest(s))
        data = archive.pack(archive.read(export(tmp_path / "bundle")))
        over = asyncio.Event()

        async def client() -> list[int]:
            statuses = []
            while not over.is_set():
                body = {"model": "m", "prompt": "hello", "max_tokens": 3, "stream": len(statuses) % 2 == 0}
                async with gateway.client.post("/v1/completions", json=body) as response:
                    await response.read()
                    statuses.append(response.status)
            return statuses

        async def operator() -> None:
            for _ in range(20):
                await deployer.push_zip(data, "canary", 0.5)
                await deployer.promote()
                await deployer.push_heuristic("least-tokens", "shadow")
                with pytest.raises(UserError):
                    await deployer.push_zip(data[:-9], "current")
                await deployer.push_heuristic("round-robin", "current")
                await deployer.rollback()
            over.set()

        answered, *_ = await asyncio.gather(asyncio.gather(*(client() for _ in range(8))), operator())
        statuses = Counter(status for part in answered for status in part)
        assert set(statuses) == {200}
        assert s.deployment.decisions == statuses[200]
        assert s.deployment.changes == dict.fromkeys(s.deployment.changes, 20)
