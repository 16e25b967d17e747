"""Ports, taken before anything is started."""

from __future__ import annotations

import errno
import socket

from steersman.runtime.errors import UserError


def listen(host: str, port: int, option: str) -> socket.socket:
    """A bound socket, so that a port in use costs nothing.

    Raises:
        UserError: it is in use, or `host` no address of this machine; `option` names another one.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"cannot listen on {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # a second server on the port is refused here, not when requests come
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} on {host} is in use; choose another one with {option}") from None
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener
