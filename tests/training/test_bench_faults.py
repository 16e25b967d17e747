"""`steersman bench faults` says what became of every request; the gateway's part is in tests/runtime."""

from __future__ import annotations

import http.client
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from steersman.runtime.errors import UserError
from steersman.training.bench.faults import measure, scenarios
from steersman.training.bench.faults.asked import Asked, Fate
from steersman.training.bench.faults.backend import FAULTS
from steersman.training.bench.gateway.child import stop
from steersman.training.bench.gateway.load import PATH
from steersman.training.bench.show import fault_notes, fault_table, soak_table

STREAM = b'data: {"choices": []}\n\ndata: [DONE]\n\n'
WHOLE = b'{"choices": []}'


def asked(
    *, stream: bool = False, status: int = 200, body: bytes = WHOLE, problem: str = "", retry_after: bool = False
) -> Asked:
    one = Asked(stream)
    one.status, one.retry_after = status, retry_after
    one.body += body
    one.end(problem)
    return one


def error(code: str) -> bytes:
    return json.dumps({"error": {"code": code}}).encode()


@pytest.mark.parametrize(
    ("one", "fate"),
    [
        (asked(), Fate.ANSWERED),
        (asked(stream=True, body=STREAM), Fate.ANSWERED),
        (asked(stream=True, body=STREAM[:-4]), Fate.CUT),
        (asked(stream=True, body=b'data: {"error": {}}\n\ndata: [DONE]\n\n'), Fate.CUT),
        (asked(body=WHOLE[:-1]), Fate.CUT),
        (asked(body=b"", problem="the connection broke"), Fate.LOST),
        (asked(status=0, body=b"", problem="no connection"), Fate.LOST),
        (asked(status=503, body=error("shed"), retry_after=True), Fate.REFUSED),
        (asked(status=503, body=error("shed")), Fate.LOST),
        (asked(status=503, body=error("no_replica"), retry_after=True), Fate.LOST),
        (asked(status=502, body=error("replica_failed")), Fate.LOST),
        (asked(status=400, body=error("mock")), Fate.LOST),
    ],
)
def test_the_fate_of_a_request(one: Asked, fate: Fate) -> None:
    assert one.fate() is fate


def test_an_answer_that_is_expected_is_one() -> None:
    assert asked(status=400, body=error("mock")).fate(expected=(200, 400)) is Fate.ANSWERED


def test_a_refusal_is_no_loss_where_no_replica_could_serve() -> None:
    assert asked(status=503, body=error("no_replica"), retry_after=True).fate(may_refuse=True) is Fate.REFUSED
    assert asked(status=502, body=error("replica_failed")).fate(may_refuse=True) is Fate.REFUSED
    assert asked(status=500, body=error("internal_error")).fate(may_refuse=True) is Fate.LOST


def test_a_gateway_that_was_told_to_end_takes_no_connections() -> None:
    one = asked(status=0, body=b"", problem="no connection")
    assert one.fate(closed_s=one.asked_s - 1.0) is Fate.REFUSED
    assert one.fate(closed_s=one.asked_s + 1.0) is Fate.LOST


@contextmanager
def backend(fault: str) -> Iterator[int]:
    command = [sys.executable, "-m", "steersman.training.bench.faults.backend", "0"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        process.stdin.write(fault.encode() + b"\n")
        process.stdin.flush()
        yield port
    finally:
        stop(process)
        process.stdin.close()
        process.stdout.close()


def ask(port: int) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", PATH, json.dumps({"messages": [], "max_tokens": 2, "stream": True}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(("fault", "status"), [("", 200), ("no-done", 200), ("500", 500), ("400", 400), ("429", 429)])
def test_a_backend_shows_the_fault_that_it_is_told(fault: str, status: int) -> None:
    with backend(fault) as port:
        found, body = ask(port)
        while fault and b"[DONE]" in body:  # it has not heard yet
            found, body = ask(port)
        assert found == status
        assert (b"[DONE]" in body) is (not fault)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Of one short scenario."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BEFORE_S", 0.2)
        patch.setattr(scenarios, "RAMP_S", 0.2)
        return measure.bench(only=["reset"], seconds=0.5)


def test_no_request_is_lost_when_a_replica_resets_its_connections(figures: dict[str, Any]) -> None:
    (row,) = json.loads(json.dumps(figures))["scenarios"]
    assert row["wrong"] == []
    assert row["sent"] == row["answered"] > 0
    assert row["retried"] > 0
    assert row["out_s"] is not None
    assert row["back_s"] is not None


def test_the_table_has_a_row_for_each_scenario(figures: dict[str, Any]) -> None:
    assert fault_table(figures).row_count == 1


def test_what_went_wrong_is_said_in_sentences() -> None:
    row = {"name": "kill", "notes": ["it died"], "wrong": ["lost: 2x status 502"]}
    told = fault_notes({"scenarios": [row], "soak": [], "skipped": ["kill-openai"]})
    assert told == [
        "kill: it died",
        "WRONG in kill: lost: 2x status 502",
        "kill-openai was not played: the package openai is not installed",
    ]


def test_growth_is_that_of_the_second_half() -> None:
    peaks = [50.0 * (t % 10 > 0) for t in range(100)]
    samples = [(float(t), 100.0 + max(0, t - 50) + peak, 20 + int(peak)) for t, peak in enumerate(peaks)]
    slopes = measure._slopes(samples)
    assert slopes["memory_slope_mib_per_hour"] == pytest.approx(3600.0)
    assert slopes["descriptors_slope_per_hour"] == pytest.approx(0.0, abs=1e-6)
    row = dict.fromkeys(("sent", "answered", "retried", "refused", "cut", "lost", "inflight_after"), 0)
    row |= {"descriptors_before": 1, "descriptors_after": 1}
    soaked = {**row, **slopes, "seconds": 10.0, "worst_s": math.nan}
    assert soak_table({"machine": "", "policy": "jsed", "soak": [soaked]}).row_count == 13


def test_an_unknown_scenario_is_named() -> None:
    with pytest.raises(UserError, match="quake"):
        measure.bench(only=["quake"])


def test_every_fault_of_the_backend_is_played() -> None:
    played = {"500": "5xx", "400": "4xx"}
    assert {played.get(fault, fault) for fault in FAULTS} <= set(scenarios.SCENARIOS)
