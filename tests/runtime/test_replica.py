"""Replicas without an engine: options, metrics, errors that name what is wrong."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from aiohttp import web
from backends import FakeBackend, fleet_of
from simulated import TENANTS

from steersman.runtime import plugins
from steersman.runtime.configs import config_files
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, load_fleet
from steersman.runtime.replica import KIND, Scraped
from steersman.runtime.replica._health import HealthConfig
from steersman.runtime.replica._metrics import parse, slots_use
from steersman.runtime.replica._pool import Pool
from steersman.runtime.replica._text import prompt_text
from steersman.runtime.scheduler import Scheduler


def fleet(backend: dict[str, object] | None, **options: object) -> Fleet:
    group = {
        "name": "r",
        "profile": "smollm2-q8_0",
        "kv_tokens": 4096,
        "max_model_len": 512,
        "max_num_seqs": 8,
    }
    return Fleet.model_validate({"description": "", "replicas": [{**group, **options, "backend": backend}]})


def test_backends_are_found_by_name() -> None:
    assert plugins.names(KIND) == ["embedded", "openai"]


def test_the_shipped_fleets_with_backends_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    opened = 0
    for path in config_files("fleets"):
        fleet = load_fleet(path)
        if fleet.replicas[0].backend is not None:
            opened += len(Pool(fleet).replicas)
    assert opened >= 4


@pytest.mark.parametrize(
    ("backend", "options", "said"),
    [
        (None, {}, "replica 'r': the fleet file gives no backend"),
        ({"kind": "opnai"}, {}, "did you mean 'openai'?"),
        ({"kind": "openai"}, {}, "'url' is required"),
        ({"kind": "openai", "options": {"url": "localhost:8000"}}, {}, "must start with http://"),
        (
            {"kind": "openai", "options": {"url": "http://x", "api_key": "k"}},
            {},
            "did you mean 'api_key_env'?",
        ),
        (
            {"kind": "openai", "options": {"url": "http://x", "api_key_env": "NOT_SET_HERE"}},
            {},
            "NOT_SET_HERE",
        ),
        ({"kind": "embedded", "options": {"weights": "q9"}}, {}, "'weights'"),
        ({"kind": "embedded"}, {"max_model_len": 1024}, "512 tokens each, less than max_model_len 1024"),
    ],
)
def test_wrong_backends_are_told_in_one_sentence(
    backend: dict[str, object] | None, options: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError) as caught:
        Pool(fleet(backend, **options))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def key_of(pool: Pool) -> str:
    return pool.replicas[0].headers["Authorization"]


def test_a_key_may_end_with_the_line_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_KEY", "sk-1\n")
    backend = {"kind": "openai", "options": {"url": "http://x", "api_key_env": "BACKEND_KEY"}}
    assert key_of(Pool(fleet(backend))) == "Bearer sk-1"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("BACKEND_KEY", "sk-1\nsk-2", "it has odd characters"), ("sk-1", "", "names the environment variable")],
)
def test_a_wrong_key_is_not_shown(name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_KEY", value)
    with pytest.raises(UserError, match=said) as caught:
        Pool(fleet({"kind": "openai", "options": {"url": "http://x", "api_key_env": name}}))
    assert "sk-" not in str(caught.value)


async def test_a_backend_that_is_not_there_is_told_with_its_address() -> None:
    backend = FakeBackend()
    await backend.start()
    await backend.stop()
    pool = Pool(fleet_of([backend], start_timeout_s=0.01))
    with pytest.raises(UserError, match=f"replica 'r0': {backend.url} does not answer"):
        await pool.start()


async def test_a_supplier_is_asked_for_what_it_has_and_no_more_often_than_needed() -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=200 if request.path == "/v1/models" else 404)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    served = fleet({"kind": "openai", "options": {"url": url}})
    pool = Pool(served, HealthConfig(scrape_s=0.5, recheck_s=7.0))
    try:
        await pool.start()
        assert asked == ["/health", "/v1/models"]
        asked.clear()
        assert await pool._look(0, Scheduler(served, TENANTS))
        assert asked == ["/metrics", "/v1/models"]
        assert pool._pause_s(0) == 7.0
    finally:
        await pool.stop()
        await runner.cleanup()


async def test_when_one_replica_does_not_start_the_others_are_stopped() -> None:
    backends = [FakeBackend(), FakeBackend()]
    for backend in backends:
        await backend.start()
    await backends[1].stop()
    pool = Pool(fleet_of(backends, start_timeout_s=0.01))
    stopped = asyncio.Event()
    original = pool.replicas[0].stop

    async def stop() -> None:
        stopped.set()
        await original()

    pool.replicas[0].stop = stop  # type: ignore[method-assign]
    with pytest.raises(UserError):
        await pool.start()
    assert stopped.is_set()
    await backends[0].stop()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "# HELP x\nvllm:num_requests_running 3\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 0.5\n",
            Scraped(3, 1, 0.5),
        ),
        (
            'vllm:num_requests_running{engine="0",model_name="a b"} 1.0\n'
            'vllm:num_requests_running{engine="1",model_name="a b"} 2.0\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.4\n',
            Scraped(3, 0, pytest.approx(0.3)),  # type: ignore[arg-type]
        ),
        ("llamacpp:requests_processing 2\nllamacpp:requests_deferred 4\n", Scraped(2, 4, 0)),
        (
            "sglang:num_running_reqs{} 2\nsglang:num_queue_reqs{} 1\nsglang:token_usage{} 0.1\n",
            Scraped(2, 1, 0.1),
        ),
        ("vllm:num_requests_running nonsense\n", None),
        ("something_else 1\n", None),
        ("", None),
    ],
)
def test_metrics_of_known_engines_are_read_and_others_are_none(text: str, expected: Scraped | None) -> None:
    assert parse(text) == expected


def test_slots_give_the_share_of_kv_memory_of_running_requests() -> None:
    idle = {"n_ctx": 100, "is_processing": False, "n_prompt_tokens": 90}
    busy = {"n_ctx": 100, "is_processing": True, "n_prompt_tokens": 30, "next_token": [{"n_decoded": 20}]}
    assert slots_use(json.dumps([idle, busy])) == 0.25
    with pytest.raises(ValueError, match="unknown slots"):
        slots_use('{"error": 1}')


def test_equal_blocks_give_equal_text_and_different_ones_do_not() -> None:
    one = prompt_text(np.array([1, 2]), 64, 150, own=0, salt="a").split()
    two = prompt_text(np.array([1, 3]), 64, 150, own=1, salt="a").split()
    assert len(one) == len(two) == 150
    assert one[:64] == two[:64]
    assert one[64:] != two[64:]
    assert prompt_text(np.array([1, 2]), 64, 150, own=0, salt="b").split() != one
