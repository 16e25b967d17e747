"""The gRPC port: a stream a request, and the health service that proxies and Kubernetes ask."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc

from steersman.runtime.errors import UserError
from steersman.runtime.gateway.app import Gateway, Phase
from steersman.runtime.gateway.ext_proc import messages
from steersman.runtime.gateway.ext_proc.certificate import Certificate
from steersman.runtime.gateway.ext_proc.config import ExtProcConfig
from steersman.runtime.gateway.ext_proc.endpoints import Endpoints
from steersman.runtime.gateway.ext_proc.picker import Picker
from steersman.runtime.gateway.ext_proc.session import Session
from steersman.runtime.log import named

_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"  # grpc.health.v1.HealthCheckResponse
MOST_WAITING = 100_000  # streams that came and were not looked at yet: as many as Envoy's configuration lets through
_SLACK_BYTES = 1 << 20  # of a message, for what stands around a body
_log = logging.getLogger("steersman.gateway")


class PickerServer:
    """An endpoint picker in front of the same scheduler as the gateway's own port.

    Make, `start` and `stop` it in one event loop.
    """

    def __init__(self, config: ExtProcConfig, body_bytes: int) -> None:
        """Take the port, so that one in use costs nothing; nobody is answered before `start`.

        Raises:
            UserError: the port is in use, or the certificate cannot be read.
        """
        self._config = config
        self._body_bytes = body_bytes
        self._picker: Picker | None = None
        self._gateway: Gateway | None = None
        self._chores: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # else a second server on the port goes unnoticed
                ("grpc.max_receive_message_length", body_bytes + _SLACK_BYTES),
                ("grpc.max_send_message_length", body_bytes + _SLACK_BYTES),
                # Of more than 1,000 that come at once gRPC would drop some at random: how many may wait is for the
                # guard and the limits of tenants to say.
                ("grpc.server.max_pending_requests", MOST_WAITING),
                ("grpc.server.max_pending_requests_hard_limit", MOST_WAITING),
            ]
        )
        # Bytes in and out: most answers were made before.
        process = grpc.stream_stream_rpc_method_handler(self._process)
        check = grpc.unary_unary_rpc_method_handler(self._check)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(messages.SERVICE, {messages.METHOD: process}),
                grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),
            )
        )
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.port}"
        try:
            if config.tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, Certificate(config.tls).credentials)
        except RuntimeError:
            raise UserError(
                f"ext_proc: cannot listen on {address}: it is in use, or no address of this machine; "
                "choose another one with --set ext_proc.port=PORT"
            ) from None

    async def start(self, gateway: Gateway) -> None:
        """Answer from now on.

        Raises:
            UserError: a replica is nowhere that Envoy could send to.
        """
        endpoints = Endpoints(gateway.pool)
        await endpoints.refresh()
        self._gateway = gateway
        self._picker = Picker(gateway, endpoints, self._config, self._body_bytes)
        self._chores = asyncio.create_task(self._resolve(endpoints))
        await self._server.start()

    async def stop(self) -> None:
        """End every stream now. Safe at any time."""
        if self._chores is not None:
            self._chores.cancel()
        await self._server.stop(None)

    async def _resolve(self, endpoints: Endpoints) -> None:
        while True:
            await asyncio.sleep(self._config.resolve_s)
            with contextlib.suppress(UserError):  # a new URL that is not resolved yet: `Endpoints.of` says so
                await endpoints.refresh()

    async def _process(self, _requests: Any, context: Any) -> None:
        assert self._picker is not None
        session = Session(self._picker, context.write)
        read, send, parse = context.read, session.send, messages.ProcessingRequest.FromString
        try:
            while not session.refused and (data := await read()) is not grpc.aio.EOF:
                for answer in await session.take(parse(data)):
                    await send(answer)
        except Exception:
            if not context.done():  # else the client left while it was answered
                _log.exception("a request that Envoy carries failed", extra=named("request_failed", {}))
                await send(session.broken())
        finally:
            session.close()

    async def _check(self, data: bytes, context: Any) -> bytes:
        service = messages.HealthCheckRequest.FromString(data).service
        if service == "liveness":
            return _SERVING
        if service not in ("", "readiness", messages.SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {service!r} here")
        gateway = self._gateway
        ready = (
            gateway is not None
            and gateway.phase is Phase.SERVING
            and bool((gateway.scheduler.replicas["up"] != 0).any())
        )
        return _SERVING if ready else _NOT_SERVING
