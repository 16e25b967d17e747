"""The connections to one replica, kept and used again."""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

from steersman.runtime.gateway.http.client import Broken, Connection

# Servers of the field close idle connections after 5 s: they are given up before.
KEEP_S = 4.0
CONNECT_S = 3.0


class Upstream:
    """The connections to one replica at `url` (scheme, host, port, and what stands before `/v1`)."""

    def __init__(self, url: str, connect_timeout_s: float = CONNECT_S) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, url
        self.host, secure = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if secure else 80)
        self.prefix = parts.path.rstrip("/").encode()
        name = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = (name if parts.port is None else f"{name}:{parts.port}").encode()
        self.connect_timeout_s = connect_timeout_s
        self._ssl = ssl.create_default_context() if secure else None
        self._idle: list[Connection] = []
        self.open: set[Connection] = set()

    def idle(self) -> Connection | None:
        """A connection that was used before and may carry another request, or None."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def connect(self) -> Connection:
        """A new connection.

        Raises:
            Broken: it cannot be reached.
        """
        made = Connection(self)
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                await self._make(made)
        except TimeoutError:
            raise Broken("no connection in time") from None
        except ssl.SSLCertVerificationError as error:
            raise Broken(f"no secure connection: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise Broken(f"no secure connection: {error.reason or error}") from None
        except OSError:
            raise Broken("no connection") from None
        return made

    async def _make(self, connection: Connection) -> None:
        try:
            await connection.loop.create_connection(
                lambda: connection, self.host, self.port, ssl=self._ssl, server_hostname=None
            )
        except BaseException:
            # uvloop closes a connection that nobody waits for any more, but tells its protocol nothing.
            connection.abort()
            self.open.discard(connection)
            raise

    def release(self, connection: Connection) -> None:
        """A connection whose answer ended may carry another request."""
        self._idle.append(connection)

    def sweep(self, now: float, read_timeout_s: float) -> None:
        """Close what has been idle too long, and break off what has been silent too long. Call once a second."""
        for connection in list(self.open):
            connection.check(now, read_timeout_s)
        kept: list[Connection] = []
        for connection in self._idle:
            if connection.usable and now - connection.idle_since < KEEP_S:
                kept.append(connection)
            else:
                connection.close()
        self._idle = kept

    def close(self) -> None:
        """Close all connections; answers on them break off."""
        self._idle.clear()
        for connection in list(self.open):
            connection.break_off("its connections were closed")
