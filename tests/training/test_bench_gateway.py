"""`steersman bench gateway` measures what it says; how fast anything is, no test says."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from steersman.agents.policies import serving
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.tenant import Tenant
from steersman.runtime.ticket import Kind, LiveRequest
from steersman.training.bench.gateway import measure, processes, targets
from steersman.training.bench.gateway.child import free_port, mock, server
from steersman.training.bench.gateway.load import PATH, quantile
from steersman.training.bench.show import gateway_tables

STAT = "{pid} (a) (b c) S {parent} 1 1 0 -1 4194304 101 0 0 0 {utime} {stime} {cutime} {cstime} 20 0 1 0 1182048\n"
KEYS = {"name", "added_p50_ms", "p99_ms", "requests_per_s", "cpu_us_per_request"}
KEYS |= {"stream_added_ms", "stream_max_gap_ms", "cpu_us_per_stream"}


def stat(pid: int, parent: int) -> str:
    return STAT.format(pid=pid, parent=parent, utime=7, stime=5, cutime=3, cstime=1)


def test_a_process_may_have_any_name() -> None:
    assert processes.parse_stat(stat(12, 3)) == processes.Stat(parent=3, own_ticks=12, ended_ticks=4)


def test_a_tree_has_all_descendants_and_nobody_else(tmp_path: Path) -> None:
    for pid, parent in ((10, 1), (11, 10), (12, 11), (13, 1), (9, 12)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(stat(pid, parent))
    (tmp_path / "14").mkdir()  # has ended meanwhile
    assert set(processes.tree([10, 99], tmp_path)) == {10, 11, 12, 9}


def test_processor_time_is_that_of_the_process() -> None:
    before_s = time.process_time()
    assert processes.cpu_s([os.getpid()]) >= before_s > 0
    assert processes.cpu_s([]) == 0


@pytest.fixture(scope="module")
def backend() -> Iterator[int]:
    with mock() as (port, _):
        yield port


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_mock_streams_as_many_events_as_asked_for(backend: int, path: str) -> None:
    body = {"prompt": "gap_ms=0 hello", "max_tokens": 5, "stream": True}
    events = ask(backend, path, body).removesuffix(b"\n\n").split(b"\n\n")
    *words, usage, done = [event.removeprefix(b"data: ") for event in events]
    assert len(words) == 5
    assert json.loads(usage)["usage"]["completion_tokens"] == 5
    assert done == b"[DONE]"


def test_the_mock_answers_whole(backend: int) -> None:
    answer = json.loads(ask(backend, PATH, {"messages": [], "max_tokens": 5}))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/get_server_info", "/get_model_info"])
def test_the_mock_has_what_routers_ask_of_a_worker(backend: int, path: str) -> None:
    ask(backend, path)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Of a very short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "IDLE_S", 0.05)
        patch.setattr(measure, "WARM_UP_S", 0.05)
        patch.setattr(measure, "HOLD_GAP_MS", 40.0)
        found, absent = measure.bench("jsed", only=["steersman", "bytes"], seconds=0.1, rounds=1, streams=10)
    assert absent == []
    return found


def test_the_figures_have_the_promised_form(figures: dict[str, Any]) -> None:
    assert set(figures) == {"targets"}
    assert [target["name"] for target in figures["targets"]] == ["direct", "bytes", "steersman"]
    for target in json.loads(json.dumps(figures))["targets"]:
        assert set(target) >= KEYS
        assert all(isinstance(target[key], float) for key in KEYS - {"name"})


def test_every_request_was_answered_and_every_stream_held(figures: dict[str, Any]) -> None:
    for target in figures["targets"]:
        assert target["errors"] == target["held_errors"] == 0
        assert target["held_streams"] == 10
        assert target["cpu_us_per_request"] > 0
        assert target["rss_last_mib"] > 0


def test_direct_adds_nothing_to_itself(figures: dict[str, Any]) -> None:
    direct = figures["targets"][0]
    assert (direct["added_p50_ms"], direct["stream_added_ms"], direct["of_direct"]) == (0, 0, 1)


def test_the_tables_have_a_row_for_each_target(figures: dict[str, Any]) -> None:
    assert [table.row_count for table in gateway_tables(figures)] == [3, 3]


def test_the_default_policy_takes_a_replica_whatever_happens(tmp_path: Path) -> None:
    policy = serving(str(measure.random_bundle(tmp_path / "bundle")))
    fleet = Fleet.model_validate(targets.fleet_of([1, 2]))
    tenants = {"all": Tenant.model_validate({"slo": {"ttft_s": 0.1, "tpot_s": 0.001}})}
    scheduler = Scheduler(fleet, tenants, policy, policy, policy_limit_s=1.0)
    for _ in range(1000):
        ticket = scheduler.arrive(LiveRequest(0, 1000, 100))
        decision = scheduler.decide(ticket)
        assert decision.kind is Kind.DISPATCH
        scheduler.dispatched(ticket, decision.replica)
    assert not scheduler.fallbacks
    assert set(scheduler.book.views["inflight"]) == {500}


def test_envoy_is_told_every_backend() -> None:
    config = yaml.safe_load(yaml.safe_dump(targets.envoy_config(1, [2, 3])))
    endpoints = config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert [e["endpoint"]["address"]["socket_address"]["port_value"] for e in endpoints] == [2, 3]


def test_envoy_asks_the_picker_on_its_port() -> None:
    config = targets.behind_config(1, 2)["static_resources"]
    assert config["listeners"][0]["address"]["socket_address"]["port_value"] == 1
    addresses = [c["load_assignment"]["endpoints"] for c in config["clusters"] if "load_assignment" in c]
    assert addresses == [[{"lb_endpoints": [{"endpoint": {"address": targets._address(2)}}]}]]


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(UserError, match="nginx"):
        targets.find(["nginx"], "jsed", None, [])


def test_peers_must_be_a_python(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-python"):
        targets.find(["envoy"], "jsed", tmp_path / "no-python", [])


def test_a_peer_that_is_not_there_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nprint('{{}}')\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found, absent = targets.find(targets.NAMES, "jsed", None, [])
    assert [target.name for target in found] == ["direct", "bytes", "steersman"]
    assert [sentence.partition(" ")[0] for sentence in absent] == list(targets.NAMES[3:])


def test_a_server_that_ends_at_its_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no worker is there'); raise SystemExit(3)"]
    with (
        pytest.raises(UserError, match="code 3: no worker is there"),
        server("router", command, free_port(), tmp_path / "log"),
    ):
        pass


def test_a_quantile_is_one_of_the_values() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]
    assert quantile([], 0.5) == 0
