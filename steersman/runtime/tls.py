"""TLS for clients, with certificates that may be renewed under way."""

from __future__ import annotations

import ssl
from pathlib import Path

from steersman.runtime.changes import Changes
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
        self._changes = Changes(config.certificate, config.key)
        self.context = context_of(config, where)

    def refresh(self) -> str | None:
        """Read the files again if they have changed. Returns what is wrong with them; then the old ones stay."""
        if not self._changes.any():
            return None
        try:
            context_of(self._config, self._where)  # a pair that does not fit must not touch the one in use
            _load(self.context, self._config, self._where)
        except UserError as error:
            return str(error)
        return None


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
