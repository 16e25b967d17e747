"""The live runtime on fake backends: an episode in real time whose requests are held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from backends import FakeBackend, fleet_of
from simulated import episode

from steersman.runtime.fleet import Fleet
from steersman.runtime.guard import Reason
from steersman.runtime.observation import COLUMN
from steersman.runtime.outcomes import State
from steersman.runtime.replica._live import LiveRuntime
from steersman.runtime.tenant import Tenant


@asynccontextmanager
async def backends() -> AsyncIterator[Fleet]:
    started = [FakeBackend(), FakeBackend()]
    for backend in started:
        await backend.start()
    yield fleet_of(started)
    for backend in started:
        await backend.stop()


async def test_held_requests_are_decided_anew_in_their_order() -> None:
    def play(fleet: Fleet) -> None:
        requests = episode([0.0, 0.0], [70, 71], [3, 3], tenant=1)  # a pause is 0.25 s
        with LiveRuntime(fleet) as runtime:
            runtime.reset(requests)
            assert runtime.advance()
            seen, ended = [], []
            for action in (runtime.hold, runtime.hold, 0, 1):
                assert runtime.mask.tolist() == [True, True, True, True]
                row = runtime.rows[-1]
                seen.append((int(row[COLUMN["prompt_tokens"]]), int(row[COLUMN["held"]]), row[COLUMN["waited"]] > 0))
                more = runtime.step(action)
                ended += runtime.ended.tolist()
            assert not more
            assert seen == [(70, 0, False), (71, 1, False), (70, 1, True), (71, 0, True)]
            outcomes = runtime.outcomes()
            assert outcomes.state.tolist() == [State.DONE, State.DONE]
            assert outcomes.replica.tolist() == [0, 1]
            assert outcomes.holds.tolist() == [1, 1]
            assert (outcomes.ttft_s > 0.25).all()
            assert sorted(ended) == [0, 1]

    async with backends() as fleet:
        await asyncio.to_thread(play, fleet)


async def test_a_client_that_leaves_while_held_is_counted_when_its_request_is_due() -> None:
    def play(fleet: Fleet) -> None:
        requests = episode([0.0, 0.0], 70, 3, tenant=1)
        requests.table["cancel_s"] = [0.1, 0.0]
        with LiveRuntime(fleet) as runtime:
            runtime.reset(requests)
            assert runtime.advance()
            assert runtime.step(runtime.hold)
            assert not runtime.step(0)
            assert runtime.outcomes().state.tolist() == [State.CANCELLED, State.DONE]
            assert runtime.outcomes().attained[0]
            assert sorted(runtime.ended.tolist()) == [0, 1]

    async with backends() as fleet:
        await asyncio.to_thread(play, fleet)


@pytest.mark.parametrize("candidates", [4, 6])
async def test_who_has_waited_too_long_is_not_held_again(candidates: int) -> None:
    def play(fleet: Fleet) -> None:
        requests = episode([0.0], 70, 3)
        requests = replace(requests, tenants={"one": Tenant(slo={"ttft_s": 0.02, "tpot_s": 0.1})})  # one pause
        with LiveRuntime(fleet, candidates) as runtime:
            runtime.reset(requests)
            assert runtime.advance()
            assert runtime.mask[runtime.hold]
            assert runtime.step(runtime.hold)
            assert not runtime.mask[runtime.hold]
            assert runtime.reasons[runtime.hold] == Reason.WAITED
            assert not runtime.step(runtime.hold)
            assert runtime.outcomes().state.tolist() == [State.SHED]

    async with backends() as fleet:
        await asyncio.to_thread(play, fleet)
