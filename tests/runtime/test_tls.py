"""TLS at the gateway: certificates that are renewed under way, and those that are wrong."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
from certificates import make, needs_openssl, touch
from wire import Echo, answers_in, in_tasks

from steersman.runtime.errors import UserError
from steersman.runtime.gateway.http.server import Server
from steersman.runtime.tls import Tls, TlsConfig

pytestmark = needs_openssl


def tls(certificate: Path, key: Path) -> Tls:
    return Tls(TlsConfig(certificate=certificate, key=key))


async def ask(port: int, version: ssl.TLSVersion | None = None) -> tuple[bytes, int]:
    """The certificate that a server shows, and the status of its answer."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if version is not None:
        context.minimum_version = context.maximum_version = version
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        (answer,) = answers_in(await reader.read())
        shown = writer.get_extra_info("ssl_object").getpeercert(True)
        return shown, answer.status
    finally:
        writer.close()


def shown_by(certificate: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.read_text())


async def test_a_renewed_certificate_holds_for_the_next_connection(tmp_path: Path) -> None:
    certificate, key = make(tmp_path)
    secured = tls(certificate, key)
    server = Server(in_tasks(Echo()))
    await server.start(host="127.0.0.1", port=0, ssl=secured.context)
    try:
        first = shown_by(certificate)
        assert await ask(server.port) == (first, 200)
        make(tmp_path)
        touch(certificate, key)
        assert await ask(server.port) == (first, 200)
        assert secured.refresh() is None
        assert shown_by(certificate) != first
        assert await ask(server.port) == (shown_by(certificate), 200)
        key.write_text("nonsense")
        touch(key)
        second = shown_by(certificate)
        assert "are not a certificate and its key" in str(secured.refresh())
        assert secured.refresh() is None  # said once
        assert await ask(server.port) == (second, 200)
    finally:
        await server.stop()


async def test_a_refused_request_is_told_why_over_tls(tmp_path: Path) -> None:
    server = Server(in_tasks(Echo()))
    await server.start(host="127.0.0.1", port=0, ssl=tls(*make(tmp_path)).context)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
        writer.write(b"nonsense\r\n\r\n")
        assert [answer.status for answer in answers_in(await reader.read())] == [400]
        writer.close()
        async with asyncio.timeout(10):
            while server.connections:
                await asyncio.sleep(0.002)
    finally:
        await server.stop()


async def test_old_versions_are_not_spoken(tmp_path: Path) -> None:
    secured = tls(*make(tmp_path))
    assert secured.context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert secured.context.verify_mode is ssl.CERT_NONE  # clients show keys, not certificates


def test_a_pair_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    certificate, _ = make(tmp_path)
    _, key = make(tmp_path / "other")
    with pytest.raises(UserError, match=r"cert\.pem and .*key\.pem are not a certificate and its key"):
        tls(certificate, key)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tls: .* cannot be read: No such file"):
        tls(tmp_path / "a.pem", tmp_path / "b.pem")


def test_a_key_with_a_password_is_refused_instead_of_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are not a certificate and its key"):
        tls(*make(tmp_path, password="hidden"))


def test_files_that_go_away_leave_what_was_read(tmp_path: Path) -> None:
    certificate, key = make(tmp_path)
    secured = tls(certificate, key)
    key.unlink()
    assert "cannot be read" in str(secured.refresh())
    assert secured.refresh() is None
