"""Certificates for tests, made by the openssl command."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="needs the openssl command, to make certificates")


def make(folder: Path, name: str = "localhost", *, password: str | None = None) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, over those that `folder` may hold."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    lock = ["-nodes"] if password is None else ["-passout", f"pass:{password}"]
    subprocess.run(
        [
            str(OPENSSL),
            *["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"],
            *lock,
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def touch(*paths: Path) -> None:
    """As if the files had been written a moment later."""
    for path in paths:
        later = path.stat().st_mtime_ns + 1_000_000
        os.utime(path, ns=(later, later))
