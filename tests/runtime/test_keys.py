"""API keys: only hashes are stored, the file is its owner's, and is read again when it changes."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
import yaml
from backends import Prefer, serving

from steersman.runtime.config import validate
from steersman.runtime.errors import UserError
from steersman.runtime.gateway.config import GatewayConfig
from steersman.runtime.gateway.keys import PREFIX, Keys, add_key, digest

TENANTS = ("strict", "loose")
BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def touch(path: Path) -> None:
    """A file changed within one tick of its clock has to be seen as changed all the same."""
    later = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(later, later))


def test_a_key_is_long_random_and_never_stored(path: Path) -> None:
    keys = {add_key(path, f"k{i}", "strict") for i in range(3)}
    assert len(keys) == 3
    for key in keys:
        assert key.startswith(PREFIX)
        assert len(key) >= len(PREFIX) + 43  # 256 bits
        assert key not in path.read_text()
        assert key.removeprefix(PREFIX) not in path.read_text()
        assert digest(key) in path.read_text()


def test_the_file_is_its_owners_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        add_key(path, "one", "strict")
        add_key(path, "two", "strict")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_what_somebody_laid_in_its_way_is_not_written_to(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.touch()
    (path.parent / "keys.yaml.part").symlink_to(elsewhere)
    add_key(path, "one", "strict")
    assert elsewhere.read_text() == ""
    assert not path.is_symlink()


def test_a_name_stands_once(path: Path) -> None:
    add_key(path, "one", "strict")
    with pytest.raises(UserError, match="there is a key 'one' already"):
        add_key(path, "one", "loose")


def test_a_key_is_known_by_its_tenant(path: Path) -> None:
    key = add_key(path, "one", "loose")
    keys = Keys(path, TENANTS)
    assert keys.tenant(bearer(key)) == "loose"
    assert keys.tenant(b"bearer  " + key.encode()) == "loose"


@pytest.mark.parametrize(
    "form", ["", "{key}", "Basic {key}", "Bearer", "Bearer {key}x", "Bearer {hash}", "Bearer {key},x"]
)
def test_what_is_not_a_key_is_nobodys(path: Path, form: str) -> None:
    key = add_key(path, "one", "loose")
    assert Keys(path, TENANTS).tenant(form.format(key=key, hash=digest(key)).encode()) is None


def test_a_key_that_was_added_or_taken_out_is_seen_without_a_restart(path: Path) -> None:
    first = add_key(path, "one", "strict")
    keys = Keys(path, TENANTS)
    second = add_key(path, "two", "loose")
    touch(path)
    assert keys.tenant(bearer(second)) is None
    assert keys.refresh() is None
    assert keys.tenant(bearer(second)) == "loose"
    listed = yaml.safe_load(path.read_text())
    listed["keys"] = listed["keys"][1:]
    path.write_text(yaml.safe_dump(listed))
    touch(path)
    keys.refresh()
    assert keys.tenant(bearer(first)) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys: [", "keys.yaml"),
        ("keys: [{name: a, tenant: strict, sha256: abc}]", "sha256"),
        (f"keys: [{{name: a, tenant: strikt, sha256: {'a' * 64}}}]", "did you mean 'strict'?"),
    ],
)
def test_a_broken_file_is_said_once_and_the_old_keys_stay(path: Path, text: str, said: str) -> None:
    key = add_key(path, "one", "strict")
    keys = Keys(path, TENANTS)
    path.write_text(text)
    touch(path)
    assert said in str(keys.refresh())
    assert keys.refresh() is None
    assert keys.tenant(bearer(key)) == "strict"
    with pytest.raises(UserError, match=r"keys\.yaml"):
        Keys(path, TENANTS)


def test_a_key_that_stands_where_its_hash_should_is_not_shown(path: Path) -> None:
    path.write_text(f"keys: [{{name: mine, tenant: strict, sha256: {PREFIX}secret}}]")
    with pytest.raises(UserError, match=r"'keys\.0\.sha256': string should match pattern") as error:
        Keys(path, TENANTS)
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match=r"'admin\.key_sha256': string should match pattern") as error:
        validate(GatewayConfig, {"admin": {"key_sha256": "secret"}}, "gateway.yaml")
    assert "secret" not in str(error.value)


def test_a_file_that_is_gone_is_said_and_the_old_keys_stay(path: Path) -> None:
    key = add_key(path, "one", "strict")
    keys = Keys(path, TENANTS)
    path.unlink()
    assert keys.refresh() is not None
    assert keys.tenant(bearer(key)) == "strict"


async def test_at_the_gateway_a_key_says_who_asks(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = add_key(path, "one", "loose")
    keys = Keys(path, TENANTS)
    async with serving(Prefer(0, 1), keys=keys) as s:

        async def ask(path: str = "/v1/completions", **headers: str) -> tuple[int, str | None]:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            method = "POST" if "completions" in path else "GET"
            async with s.client.request(method, path, json=BODY, headers=named) as response:
                text = await response.text()
                assert key not in text + str(response.headers)
                return response.status, None if response.status < 400 else (await response.json())["error"]["code"]

        assert await ask() == (401, "invalid_api_key")
        assert await ask(Authorization="Bearer wrong-key-123") == (401, "invalid_api_key")
        assert await ask(Authorization=f"Bearer {key}") == (200, None)
        assert await ask(Authorization=f"Bearer {key}", X_Steersman_Tenant="loose") == (200, None)
        assert await ask(Authorization=f"Bearer {key}", X_Steersman_Tenant="strict") == (403, "wrong_tenant")
        assert await ask("/v1/models") == (401, "invalid_api_key")
        assert await ask("/v1/models", Authorization=f"Bearer {key}") == (200, None)
        assert await ask("/metrics") == (404, "not_found")  # it names tenants: the admin's port has it
        assert await ask("/health") == (200, None)
        assert s.metric("requests_total", tenant="loose", outcome="done") == 2
        assert all("Authorization" not in headers for headers in s.backends[0].headers)
        path.write_text("keys: []")
        touch(path)
        assert s.gateway.access.refresh() is None
        assert await ask(Authorization=f"Bearer {key}") == (401, "invalid_api_key")
        assert key not in s.gateway.metrics.text().decode()
    assert key not in caplog.text
    assert "wrong-key-123" not in caplog.text
