"""TLS of the gRPC port, with a certificate that may be renewed under way."""

from __future__ import annotations

import logging

import grpc

from steersman.runtime.changes import Changes
from steersman.runtime.errors import UserError
from steersman.runtime.log import tell
from steersman.runtime.tls import TlsConfig, context_of

_WHERE = "ext_proc.tls"


class Certificate:
    """`credentials` for the port: files that have changed hold for connections made from then on."""

    def __init__(self, config: TlsConfig) -> None:
        """
        Raises:
            UserError: the files cannot be read, or do not fit together.
        """
        self._config = config
        self._changes = Changes(config.certificate, config.key)
        # gRPC asks at every handshake, in a thread of its own.
        self.credentials = grpc.dynamic_ssl_server_credentials(self._read(), self.renewed)

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is to be shown from now on, or None: as before, also where the new files are no good."""
        if not self._changes.any():
            return None
        try:
            return self._read()
        except UserError as error:
            tell("file_not_read", f"{error}; what was read before stays in use", logging.WARNING)
            return None

    def _read(self) -> grpc.ServerCertificateConfiguration:
        context_of(self._config, _WHERE)  # gRPC itself would say nothing of a pair that does not fit
        try:
            pair = self._config.key.read_bytes(), self._config.certificate.read_bytes()
        except OSError as error:
            raise UserError(f"{_WHERE}: {error.filename} cannot be read: {error.strerror}") from None
        return grpc.ssl_server_certificate_configuration([pair])
