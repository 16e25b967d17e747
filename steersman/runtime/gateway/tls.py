"""TLS for clients, with certificates that may be renewed under way."""

from __future__ import annotations

import ssl
from pathlib import Path

from steersman.runtime.config import Model
from steersman.runtime.errors import UserError


class TlsConfig(Model):
    """Where the certificate is."""

    certificate: Path
    key: Path


class Tls:
    """A server's TLS. `context` stays the same object: what is read anew holds for connections made from then on."""

    def __init__(self, config: TlsConfig) -> None:
        """
        Raises:
            UserError: the files cannot be read, or do not fit together.
        """
        self._config = config
        self._stamp = self._now()
        self.context = _context(config)

    def refresh(self) -> str | None:
        """Read the files again if they have changed. Returns what is wrong with them; then the old ones stay."""
        stamp = self._now()
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            _context(self._config)  # a pair that does not fit must not touch the one in use
            _load(self.context, self._config)
        except UserError as error:
            return str(error)
        return None

    def _now(self) -> tuple[int, ...]:
        stamps: list[int] = []
        for path in (self._config.certificate, self._config.key):
            try:
                stat = path.stat()
            except OSError:
                stamps += (0, 0)
            else:
                stamps += (stat.st_mtime_ns, stat.st_size)
        return tuple(stamps)


def _context(config: TlsConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, config)
    return context


def _load(context: ssl.SSLContext, config: TlsConfig) -> None:
    try:
        # Without a password given, OpenSSL would ask for that of an encrypted key on the terminal, and wait.
        context.load_cert_chain(config.certificate, config.key, password=b"")
    except ssl.SSLError as error:
        reason = error.reason or error
        raise UserError(
            f"tls: {config.certificate} and {config.key} are not a certificate and its key: {reason}"
        ) from None
    except OSError as error:
        raise UserError(f"tls: {error.filename or config.certificate} cannot be read: {error.strerror}") from None
