"""The audit log, and the rule that it proves."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from backends import Prefer, serving

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway import app
from steersman.runtime.gateway.access import GatewayTenant
from steersman.runtime.gateway.audit import Audit, AuditConfig, check
from steersman.runtime.ticket import Kind

BASE = {"profile": "llama-3.1-8b-h100-bf16", "model": "m", "kv_tokens": 20000, "max_model_len": 4000}
FLEET = Fleet.model_validate(
    {
        "description": "For tests.",
        "replicas": [
            {**BASE, "name": "us", "region": "us"},
            {**BASE, "name": "eu", "region": "eu", "data_classes": ["pii"]},
        ],
    }
)
BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}


def audit_of(path: Path, **config: Any) -> Audit:
    return Audit(AuditConfig(file=path, **config), FLEET)


def write(log: Audit, count: int) -> None:
    mask = FLEET.zone_mask(["eu"], "pii")
    for i in range(count):
        log.decided(b"id-%d" % i, "bank", mask, "pii", Kind.DISPATCH, 1, "jsed")


def test_a_log_checks_and_says_where_data_went(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = audit_of(path)
    write(log, 3)
    log.flush()
    assert check([path]) == (3, 3, 0)
    line = json.loads(path.read_text().splitlines()[0])
    assert (line["replica"], line["region"], line["kept"]) == ("eu", "eu", True)


def test_a_log_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for _ in range(2):
        log = audit_of(path)
        write(log, 2)
        log.flush()
    assert check([path]).lines == 4


@pytest.mark.parametrize("damage", ["change", "remove", "insert"])
def test_a_changed_log_is_found_out(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "audit.jsonl"
    log = audit_of(path)
    write(log, 4)
    log.flush()
    lines = path.read_text().splitlines(keepends=True)
    if damage == "change":
        lines[1] = lines[1].replace('"eu"', '"us"')
    elif damage == "remove":
        del lines[1]
    else:
        lines.insert(1, lines[2])
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=r"line [23]: does not follow"):
        check([path])


def test_files_that_were_rotated_are_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = audit_of(path, rotate_mib=0.0005)
    for _ in range(12):
        write(log, 2)
        log.flush()
    files = sorted(tmp_path.glob("audit.jsonl*"))  # as a shell sorts them
    assert [file.name for file in files][:3] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.10"]
    assert check(files).lines == 24


def test_a_log_goes_on_where_only_closed_files_are_left(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in (1, 2):
        log = audit_of(path)
        write(log, 2)
        log.flush()
        path.rename(tmp_path / f"audit.jsonl.{number}")
    assert check([*tmp_path.iterdir()]).lines == 4


def test_what_is_decided_while_the_disk_is_written_is_written_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = audit_of(path)
    write(log, 2)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _handle: write(log, 1))
        log.flush()
    assert check([path]).lines == 2
    log.flush()
    assert check([path]).lines == 3


def test_a_full_disk_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = audit_of(path)
    write(log, 2)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        log.flush()
    assert (log.failed, log.waiting, path.read_bytes()) == (1, 2, b"")
    write(log, 1)
    log.flush()
    assert (log.waiting, check([path]).lines) == (0, 3)


async def test_a_request_with_a_rule_is_logged_and_goes_only_where_it_may(tmp_path: Path) -> None:
    tenants = {"bank": GatewayTenant.model_validate({"slo": {"ttft_s": 1, "tpot_s": 1}, "data_class": "pii"})}
    path = tmp_path / "audit.jsonl"
    log = audit_of(path)
    async with serving(Prefer(0, 1), fleet=FLEET, tenants=tenants, audit=log) as s:
        async with s.client.post("/v1/completions", json=BODY) as response:
            assert response.headers["X-Steersman-Replica"] == "eu"
        s.backends[1].status = 500
        async with s.client.post("/v1/completions", json=BODY) as response:
            assert response.status == 502
        assert not s.backends[0].bodies
    log.flush()
    assert check([path]) == (3, 2, 0)


async def test_what_cannot_be_recorded_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "AUDIT_LINES", 1)
    tenants = {"bank": GatewayTenant.model_validate({"slo": {"ttft_s": 1, "tpot_s": 1}, "data_class": "pii"})}
    log = audit_of(tmp_path / "audit.jsonl")
    async with serving(Prefer(1, 0), fleet=FLEET, tenants=tenants, audit=log) as s:
        statuses = []
        for _ in range(3):
            async with s.client.post("/v1/completions", json=BODY) as response:
                statuses.append(response.status)
        assert statuses == [200, 200, 503]
        log.flush()
        async with s.client.post("/v1/completions", json=BODY) as response:
            assert response.status == 200
