"""What the gateway logs, and how."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from backends import Prefer, Served, serving
from hypothesis import given
from hypothesis import strategies as st

from steersman.runtime import log
from steersman.runtime.gateway.access_log import AccessLog
from steersman.runtime.log import LogConfig, line, logging_to, named, tell

PATH = "/v1/completions"
BODY = {"model": "m", "prompt": "a secret word", "max_tokens": 3}
JSON, TEXT = LogConfig(format="json"), LogConfig()


def logged(config: LogConfig, event: str, sentence: str, **fields: object) -> str:
    stream = io.StringIO()
    with logging_to(stream, config):
        tell(event, sentence, **fields)
    return stream.getvalue()


def test_a_line_of_json_says_when_what_and_about_whom() -> None:
    told = json.loads(logged(JSON, "replica_status", "replica r0 is down", replica="r0", status="down"))
    assert datetime.fromisoformat(told.pop("time")).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert told == {
        "level": "info",
        "event": "replica_status",
        "message": "replica r0 is down",
        "replica": "r0",
        "status": "down",
    }


def test_a_line_of_text_is_the_sentence_as_it_is() -> None:
    assert logged(TEXT, "replica_status", "replica a[/b] %s is up", replica="a") == "replica a[/b] %s is up\n"


def test_an_event_without_a_sentence_is_its_fields() -> None:
    assert logged(TEXT, "request", "", status=200, ttft_s=0.25) == "request status=200 ttft_s=0.25\n"


@given(st.text(), st.text())
def test_whatever_is_told_is_one_object_on_one_line(sentence: str, value: str) -> None:
    text = line(JSON, "odd", sentence, value=value)
    assert "\n" not in text
    assert json.loads(text)["value"] == value


def test_a_traceback_is_part_of_its_line() -> None:
    stream = io.StringIO()
    with logging_to(stream, JSON):
        try:
            raise ValueError("no such thing")
        except ValueError:
            logging.getLogger("steersman.gateway").exception(
                "request %s failed", "q1", extra=named("request_failed", {})
            )
    told = json.loads(stream.getvalue())
    assert (told["level"], told["event"], told["message"]) == ("error", "request_failed", "request q1 failed")
    assert told["exception"].endswith("ValueError: no such thing")


def test_what_other_libraries_log_has_the_same_form() -> None:
    stream = io.StringIO()
    with logging_to(stream, JSON):
        logging.getLogger("asyncio").error("a task failed")
    assert json.loads(stream.getvalue())["event"] == "error"


class Broken(io.StringIO):
    """What nobody can write to."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, _text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_a_gateway_that_cannot_tell_goes_on(error: OSError) -> None:
    with logging_to(Broken(error), TEXT):
        tell("replica_status", "replica r0 is down")


class Stuck(io.StringIO):
    """Somebody reads it, but not yet."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.read = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        self.read.wait()
        return super().write(text)


def test_who_tells_never_waits_for_who_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "WAITING", 2)
    stream = Stuck()
    with logging_to(stream, TEXT):
        tell("first", "first")
        stream.reached.wait()
        for i in range(5):
            tell("more", f"line {i}")
        stream.read.set()
    told = stream.getvalue().splitlines()
    assert told[:3] == ["first", "line 0", "line 1"]
    assert told[3:] == ["3 lines of the log were dropped: they are not read as fast as they come"]


# The access log


class Told(logging.Handler):
    """The requests that were logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.fields)  # type: ignore[attr-defined]


@pytest.fixture
def told() -> Iterator[list[dict[str, Any]]]:
    handler, logger = Told(), logging.getLogger("steersman.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)


def access_log(s: Served) -> None:
    s.server.on_over = AccessLog(s.gateway.metrics.tenants, s.gateway.pool.names, s.gateway.scheduler).over


async def test_a_request_is_one_line(told: list[dict[str, Any]]) -> None:
    async with serving(Prefer(0), 1) as s:
        access_log(s)
        async with s.client.post(PATH, json={**BODY, "stream": True}, headers={"X-Request-Id": "q1"}) as response:
            await response.read()
        await s.idle()
    [told_of] = told
    assert {name: told_of[name] for name in ("request_id", "method", "path", "status", "tenant", "replica")} == {
        "request_id": "q1",
        "method": "POST",
        "path": PATH,
        "status": 200,
        "tenant": "strict",
        "replica": "r0",
    }
    assert (told_of["outcome"], told_of["tokens"], told_of["attempts"]) == ("done", 3, 1)
    assert 0 < told_of["ttft_s"] <= told_of["e2e_s"] <= told_of["duration_s"]


async def test_a_refused_request_says_why(told: list[dict[str, Any]]) -> None:
    async with serving(Prefer(0), 1) as s:
        access_log(s)
        async with s.client.post(PATH, json={**BODY, "model": "other"}) as response:
            assert response.status == 404
    [told_of] = told
    assert (told_of["status"], told_of["reason"]) == (404, "model_not_found")
    assert "outcome" not in told_of


async def test_a_request_that_no_replica_served_has_failed(told: list[dict[str, Any]]) -> None:
    async with serving(Prefer(0), 1) as s:
        access_log(s)
        s.backends[0].status = 500
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 502
    [told_of] = told
    assert (told_of["status"], told_of["reason"], told_of["outcome"]) == (502, "replica_failed", "failed")


async def test_requests_that_were_sent_ahead_are_a_line_each(told: list[dict[str, Any]]) -> None:
    body = json.dumps(BODY).encode()
    ask = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (PATH.encode(), len(body), body)
    async with serving(Prefer(0), 1) as s:
        access_log(s)
        reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(ask + ask + ask.replace(b"Host", b"Connection: close\r\nHost"))
        await reader.read()
        writer.close()
    assert [(line["status"], line["outcome"]) for line in told] == [(200, "done")] * 3


@pytest.mark.parametrize(
    ("deadline", "status", "outcome"), [({}, 0, "cancelled"), ({"X-Steersman-Deadline-Ms": "20"}, 504, "late")]
)
async def test_a_request_that_ends_before_its_answer_is_one_line(
    deadline: dict[str, str], status: int, outcome: str, told: list[dict[str, Any]]
) -> None:
    async with serving(Prefer(0), 1) as s:
        access_log(s)
        s.backends[0].hold = asyncio.Event()
        asking = asyncio.create_task(s.client.post(PATH, json=BODY, headers=deadline))
        await s.backends[0].asked.wait()
        if deadline:
            (await asking).close()
        asking.cancel()
        await s.idle()
    assert [(line["status"], line["outcome"]) for line in told] == [(status, outcome)]


async def test_a_request_that_was_tried_again_is_one_line(told: list[dict[str, Any]]) -> None:
    async with serving(Prefer(0, 1)) as s:
        access_log(s)
        s.backends[0].status = 500
        async with s.client.post(PATH, json=BODY) as response:
            await response.read()
        await s.idle()
    assert [(line["status"], line["replica"], line["attempts"]) for line in told] == [(200, "r1", 2)]


async def test_neither_keys_nor_queries_nor_prompts_are_logged(told: list[dict[str, Any]]) -> None:
    async with serving(Prefer(0), 1) as s:
        access_log(s)
        headers = {"Authorization": "Bearer sk-secret"}
        async with s.client.post(f"{PATH}?api_key=sk-secret", json=BODY, headers=headers) as response:
            await response.read()
        async with s.client.get("/v1/secrets?key=sk-secret", headers=headers) as response:
            await response.read()
        await s.idle()
    assert len(told) == 2
    assert "secret word" not in str(told)
    assert "sk-secret" not in str(told)


async def test_looks_at_health_and_metrics_are_not_logged(told: list[dict[str, Any]]) -> None:
    async with serving(Prefer(0), 1) as s:
        access_log(s)
        for path in ("/health", "/metrics"):
            async with s.client.get(path) as response:
                await response.read()
    assert told == []
