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

    def __init__(self, config: TlsConfig, where: str = "tls") -> None:
        """where: the key of the gateway's file, for messages.

        Raises:
            UserError: the files cannot be read, or do not fit together.
        """
        self._config, self._where = config, where
        self._stamp = stamp_of(config)
        self.context = context_of(config, where)

    def refresh(self) -> str | None:
        """Read the files again if they have changed. Returns what is wrong with them; then the old ones stay."""
        stamp = stamp_of(self._config)
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            context_of(self._config, self._where)  # a pair that does not fit must not touch the one in use
            _load(self.context, self._config, self._where)
        except UserError as error:
            return str(error)
        return None


def stamp_of(config: TlsConfig) -> tuple[int, ...]:
    """What changes when somebody writes the files: time and size of each."""
    stamps: list[int] = []
    for path in (config.certificate, config.key):
        try:
            stat = path.stat()
        except OSError:
            stamps += (0, 0)
        else:
            stamps += (stat.st_mtime_ns, stat.st_size)
    return tuple(stamps)


def context_of(config: TlsConfig, where: str) -> ssl.SSLContext:
    """A server's context with the certificate as it is now. `where` and errors as of `Tls`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, config, where)
    return context


def _load(context: ssl.SSLContext, config: TlsConfig, where: str) -> None:
    try:
        # Without a password given, OpenSSL would ask for that of an encrypted key on the terminal, and wait.
        context.load_cert_chain(config.certificate, config.key, password=b"")
    except ssl.SSLError as error:
        reason = error.reason or error
        raise UserError(
            f"{where}: {config.certificate} and {config.key} are not a certificate and its key: {reason}"
        ) from None
    except OSError as error:
        raise UserError(f"{where}: {error.filename or config.certificate} cannot be read: {error.strerror}") from None
