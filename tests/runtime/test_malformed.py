"""Ten thousand malformed requests over connections that are used again: answered in the API's form, or cut off."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import gc
import json
import os
import random
import termios
from collections import Counter

import pytest
from backends import Prefer, Served, serving
from wire import Answers

from steersman.runtime.gateway.access import GatewayTenant
from steersman.runtime.gateway.http.protocol import ServerProtocol
from steersman.runtime.gateway.http.server import HttpLimits

REQUESTS, CLIENTS = 10_000, 20
ANSWERED = (200, 400, 404, 405, 408, 413, 415, 417, 429, 431, 501, 505)  # 501, 505: what of HTTP is not spoken
TOKENS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b":",
        b",",
        b";",
        b"\xff",
        b'"',
        b"{",
        b"}",
        b"[",
        b"\\",
        b"1",
        b"-1",
        b"1e9",
    ),
    *(b"9" * 30, b"\r\n\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"HTTP/1.0", b"HTTP/2.0", b"GET "),
    *(b"0\r\n\r\n", b"ffffffff\r\n", b"null", b"true", b"NaN", b"\xed\xa0\x80", b"a" * 5000, b"X: y\r\n" * 60),
]


def _valid(rng: random.Random) -> bytes:
    """A request that is good."""
    if rng.random() < 0.1:
        return b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % rng.choice([b"/v1/models", b"/health", b"/metrics", b"/no"])
    asked: dict[str, object] = {"model": "m", "max_tokens": rng.randrange(1, 50)}
    path = rng.choice([b"/v1/completions", b"/v1/chat/completions"])
    if path == b"/v1/completions":
        asked["prompt"] = rng.choice(["hello", ["a", "b"], [1, 2, 3], "x" * 700])
    else:
        asked["messages"] = [{"role": "user", "content": rng.choice(["hi", [{"type": "text", "text": "hi"}]])}]
    asked["stream"] = rng.random() < 0.5
    body = json.dumps(asked).encode()
    lines = b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nX-Request-Id: r1\r\n" % path
    if rng.random() < 0.3:
        lines += b"X-Steersman-Tenant: a\r\nX-Steersman-Priority: 1\r\nX-Steersman-Deadline-Ms: 60000\r\n"
    if rng.random() < 0.3:
        cut = rng.randrange(1, len(body))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:cut], body[cut:]))
        return lines + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    return lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def malformed(rng: random.Random) -> bytes:
    """A request with one to three things changed in it."""
    data = bytearray(_valid(rng))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = rng.choice(TOKENS)
            case 2:
                del data[at : at + rng.choice([1, 1, 2, 8, 40])]
            case 3:
                lines = bytes(data).split(b"\r\n")
                i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
                lines[i], lines[j] = lines[j], lines[i]
                data[:] = b"\r\n".join(lines)
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 60)]
            case 5:
                data[at : at + 4] = rng.choice(TOKENS)
        data = data or bytearray(b"\r")
    return bytes(data)


class Worker:
    """A client that sends malformed requests, one after another, on a connection for as long as it lasts."""

    def __init__(self, served: Served, counts: Counter[int | str]) -> None:
        self.served, self.counts = served, counts
        self.writer: asyncio.StreamWriter | None = None
        self.reader: asyncio.StreamReader
        self.protocol: ServerProtocol
        self.reused = 0

    async def connect(self) -> asyncio.StreamWriter:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.served.port)
        mine = self.writer.get_extra_info("sockname")
        while True:
            for protocol in self.served.server.connections:
                if protocol.transport is not None and protocol.transport.get_extra_info("peername") == mine:
                    self.protocol = protocol
                    return self.writer
            await asyncio.sleep(0)

    async def ask(self, request: bytes) -> None:
        if self.writer is None:
            await self.connect()
        else:
            self.reused += 1
        assert self.writer is not None
        self.writer.write(request)
        answers = Answers()
        closed = False
        reading = asyncio.create_task(self.reader.read(1 << 20))
        while not closed and (answers.inside or not answers.all or self.protocol.current is not None):
            await asyncio.wait([reading], timeout=0 if self._waits() else 0.05)
            if reading.done():
                data = b""
                with contextlib.suppress(ConnectionError):
                    data = reading.result()
                closed = not data
                answers.feed(data)
                reading = asyncio.create_task(self.reader.read(1 << 20))
            elif self._waits():  # for more of the request, which never comes
                self.protocol.check(self.protocol.server.loop.time() + 1e4)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await reading
        for answer in answers.all:
            self.counts[answer.status] += 1
            if answer.status >= 400:
                assert answer.error["message"]
        if closed:
            self.counts["until closed" if answers.inside else "closed"] += 1
        if closed or self.protocol.transport is None or self.protocol._refused or self.protocol.transport.is_closing():
            self.writer.close()
            with contextlib.suppress(ConnectionError):
                await self.writer.wait_closed()
            self.writer = None

    def _waits(self) -> bool:
        """Whether the server has read all that was sent, and is at nothing."""
        protocol = self.protocol
        if protocol.transport is None or protocol.current is not None or protocol._refused:
            return False
        assert self.writer is not None
        if self.writer.transport.get_write_buffer_size():  # type: ignore[attr-defined]
            return False
        unread = array.array("i", [0])
        fcntl.ioctl(protocol.transport.get_extra_info("socket").fileno(), termios.FIONREAD, unread)
        return not unread[0]

    async def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            with contextlib.suppress(ConnectionError):
                await self.writer.wait_closed()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc, to count descriptors")
async def test_ten_thousand_malformed_requests(caplog: pytest.LogCaptureFixture) -> None:
    tenants = {"a": GatewayTenant.model_validate({"slo": {"ttft_s": 60.0, "tpot_s": 1.0}})}
    limits = HttpLimits(head_bytes=4096, header_fields=50, body_bytes=4096)
    async with serving(Prefer(0, 1), tenants=tenants, limits=limits) as s:
        counts: Counter[int | str] = Counter()
        workers = [Worker(s, counts) for _ in range(CLIENTS)]

        async def work(worker: Worker, number: int, share: int) -> None:
            rng = random.Random(number)
            for _ in range(share):
                await worker.ask(malformed(rng))

        async with asyncio.timeout(300):
            await asyncio.gather(*(work(worker, i, 20) for i, worker in enumerate(workers)))
            before = descriptors()
            share = REQUESTS // CLIENTS - 20
            await asyncio.gather(*(work(worker, CLIENTS + i, share) for i, worker in enumerate(workers)))
            for worker in workers:
                await worker.close()
            while s.server.connections:
                await asyncio.sleep(0.002)
        await s.idle()
        print({k: counts[k] for k in sorted(counts, key=str)}, "reused", sum(w.reused for w in workers))
        assert set(counts) <= {*ANSWERED, "closed", "until closed"}
        assert counts[200] > 500
        assert descriptors() <= before
        # What follows is served, and nothing has drifted.
        assert [s.gateway.scheduler.inflight(r) for r in range(2)] == [0, 0]
        assert s.gateway.limiter.total == 0
        async with s.client.post(
            "/v1/completions", json={"model": "m", "prompt": "hello", "max_tokens": 3}
        ) as response:
            assert response.status == 200
    assert not [record for record in caplog.records if record.name.startswith("steersman")]
