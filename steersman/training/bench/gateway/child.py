"""Processes that a benchmark starts, and ends whatever happens."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steersman.runtime.errors import UserError
from steersman.training.bench.gateway import load
from steersman.training.bench.gateway.mock import MODEL

START_S = 120.0  # the first start after an installation compiles
STOP_S = 10.0
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Are you there?"}], "max_tokens": 1}


@contextmanager
def server(name: str, command: Sequence[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that has answered a completion on `port`.

    Raises:
        UserError: it ended instead, or took more than `START_S`; names the last line of its output, which is in `log`.
    """
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"{name}: {command[0]} cannot be run: {error.strerror}") from None
    try:
        deadline_s = time.monotonic() + START_S
        while not _answers(port):
            if process.poll() is not None:
                raise UserError(f"{name} ended at its start with code {process.returncode}: {_last_line(log)}")
            if time.monotonic() > deadline_s:
                raise UserError(f"{name} answered no completion within {START_S:g} s: {_last_line(log)}")
            time.sleep(0.05)
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a group of its own, in kindness first."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def mock() -> Iterator[tuple[int, int]]:
    """A mock backend: its port and process."""
    command = [sys.executable, "-m", "steersman.training.bench.gateway.mock"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield int(process.stdout.readline()), process.pid
    finally:
        stop(process)
        process.stdin.close()
        process.stdout.close()


def measured(job: load.Job | load.Hold) -> dict[str, float]:
    """What a load generator in a process of its own saw."""
    command = [sys.executable, "-m", "steersman.training.bench.gateway.load", job.model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        figures: dict[str, float] = json.loads(process.stdout.read() or "{}")
    finally:
        stop(process)
        process.stdout.close()
    if process.returncode:
        raise RuntimeError("the load generator failed")
    return figures


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30.0)
    try:
        connection.request("POST", load.PATH, json.dumps(REQUEST), {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if any(c.isalnum() for c in line)]
    return lines[-1].strip(" │") if lines else "it printed nothing"  # typer draws a box around its errors
