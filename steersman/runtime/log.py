"""The gateway's log: one line an event on standard error, as a sentence or as a JSON object.

A thread writes the lines, so that no request waits for a slow disk or for who reads the pipe.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO

import orjson

from steersman.runtime.config import Model

WAITING = 10_000  # lines that wait to be written; of more, the newest are dropped
_PAUSE_S = 0.02  # between two times that lines are written
_CLOSE_S = 1.0  # that the last lines may take when the gateway ends
_log = logging.getLogger("steersman.gateway")


class LogConfig(Model):
    """What is logged, and how."""

    format: Literal["text", "json"] = "text"
    access: bool = False  # a line for each request


def tell(event: str, sentence: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an event: its name for programs, a sentence for people, and what else is known of it."""
    _log.log(level, "%s", sentence, extra=named(event, fields))


def named(event: str, fields: Mapping[str, object]) -> dict[str, object]:
    """What gives a line of the standard library's loggers its event and fields: `log.error(…, extra=named(…))`."""
    return {"event": event, "fields": fields}


class TextFormat(logging.Formatter):
    """A sentence; of what has none, the event and its fields; after it the traceback, if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if text:
            return text
        fields = getattr(record, "fields", {})
        return " ".join([getattr(record, "event", ""), *(f"{k}={_plain(v)}" for k, v in fields.items())])


class JsonFormat(logging.Formatter):
    """An object: time (UTC, ISO 8601), level, event, message, the event's fields, and a traceback as `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        failed = record.levelno >= logging.ERROR
        told: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "error" if failed else "log"),
        }
        if message := record.getMessage():
            told["message"] = message
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(told, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def line(config: LogConfig, event: str, sentence: str, level: int = logging.INFO, **fields: object) -> str:
    """The line of an event."""
    record = logging.LogRecord(_log.name, level, __file__, 0, sentence, None, None)
    record.__dict__.update(named(event, fields))
    return _format(config).format(record)


def _format(config: LogConfig) -> logging.Formatter:
    return JsonFormat() if config.format == "json" else TextFormat()


class Lines(logging.Handler):
    """Writes lines to `stream` in a thread. What cannot be written is lost, and serving goes on."""

    def __init__(self, stream: TextIO, config: LogConfig) -> None:
        super().__init__()
        self.setFormatter(_format(config))
        self._config = config
        self._stream = stream
        self._lines: deque[str] = deque()
        self._dropped = 0  # lines, since the last one that says so
        self._some, self._ends = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Put a line among those that wait."""
        if len(self._lines) >= WAITING:
            self._dropped += 1
            return
        try:
            self._lines.append(self.format(record))
        except Exception:
            self.handleError(record)
        if not self._some.is_set():
            self._some.set()

    def close(self) -> None:
        """Write what waits, but not for long; nothing is written afterwards."""
        self._ends.set()
        self._some.set()
        self._thread.join(_CLOSE_S)
        super().close()

    def _run(self) -> None:
        ends = False
        while not ends:
            self._some.wait()
            self._some.clear()
            ends = self._ends.is_set()
            self._write()
            self._ends.wait(_PAUSE_S)  # waking up for each line takes longer than all else about it

    def _write(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            said = f"{dropped} lines of the log were dropped: they are not read as fast as they come"
            lines.append(line(self._config, "lines_dropped", said, logging.WARNING, lines=dropped))
        if lines:
            with contextlib.suppress(OSError, ValueError):  # a full disk, or a reader that has left
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()


@contextlib.contextmanager
def logging_to(stream: TextIO, config: LogConfig) -> Iterator[None]:
    """Let everything that is logged in this process go to `stream`, one line an event."""
    root, ours = logging.getLogger(), logging.getLogger("steersman")
    handler, before = Lines(stream, config), ours.level
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(before)
        root.removeHandler(handler)
        handler.close()


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
