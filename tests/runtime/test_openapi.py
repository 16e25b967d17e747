"""The gateway keeps to docs/openapi.yaml, whatever is asked: cases drawn from the description itself."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import schemathesis
import yaml
from backends import Prefer, Served, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from steersman.runtime.gateway.keys import Keys, add_key

DESCRIPTION = Path(__file__).parents[2] / "docs" / "openapi.yaml"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
schema = schemathesis.openapi.from_path(str(DESCRIPTION))
OPERATIONS = [result.ok() for result in schema.get_all_operations()]
# What takes nothing cannot be asked wrongly.
DRAWN = [(o, mode) for o in OPERATIONS for mode in GenerationMode if o.method == "post" or mode.is_positive]
SOME = settings(
    deadline=None, max_examples=120, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


class Running:
    """A gateway with keys, on a loop of its own."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.url = ""
        self.served: Served
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    async def _run(self) -> None:
        async with serving(Prefer(0, 1), keys=self.keys) as self.served:
            self.url = f"http://127.0.0.1:{self.served.port}"
            self._ready.set()
            await self._stop.wait()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    return path, add_key(path, "test", "strict")


@pytest.fixture(scope="module")
def gateway(key_file: tuple[Path, str]) -> Iterator[Running]:
    running = Running(Keys(key_file[0], ("strict", "loose")))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def _make_known(case: schemathesis.Case) -> None:
    """Which models, tenants, promises, regions and classes there are is no part of the description."""
    headers = case.headers or {}
    for name, value in (("X-Steersman-Tenant", "strict"), ("X-Steersman-Regions", "default")):
        if name in headers:
            headers[name] = value
    for name in ("X-Steersman-SLO", "X-Steersman-Data-Class"):
        headers.pop(name, None)
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "m"


@pytest.mark.parametrize(("operation", "mode"), DRAWN, ids=lambda drawn: getattr(drawn, "label", drawn))
def test_answers_are_those_that_the_description_promises(
    operation: schemathesis.APIOperation,
    mode: GenerationMode,
    gateway: Running,
    key_file: tuple[Path, str],
    session: requests.Session,
) -> None:
    statuses: Counter[int] = Counter()

    @SOME
    @given(operation.as_strategy(generation_mode=mode), st.integers(0, 9))
    def ask(case: schemathesis.Case, one_of_ten: int) -> None:
        headers = {} if one_of_ten == 9 else {"Authorization": f"Bearer {key_file[1]}"}
        if mode.is_positive:
            _make_known(case)
        response = case.call(gateway.url, session=session, headers=headers)
        # A deadline of a millisecond may pass: that is an error of the server's only by its number.
        checks = [check for check in CHECKS if check is not not_a_server_error or response.status_code != 504]
        case.validate_response(response, checks=checks)
        statuses[response.status_code] += 1

    ask()
    print(operation.label, mode.value, dict(statuses))
    if mode.is_positive and operation.path != "/metrics":
        assert statuses[200]


def test_the_gateway_serves_what_is_described_and_nothing_else() -> None:
    described = set(yaml.safe_load(DESCRIPTION.read_text())["paths"])
    assert described == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/health",
        "/metrics",
    }
