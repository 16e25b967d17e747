"""Watching an answer go by: tokens in a stream of server-sent events, and the usage that it reports."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeGuard

import orjson

_LONGEST_LINE = 4 << 20
# How engines begin an event that tells of a failure, after the status 200 has gone out.
_ERROR = re.compile(rb'\{"(?:error":|object": ?"error")')
_NO_USAGE = re.compile(rb'"usage": ?null')


class Usage(NamedTuple):
    """Token counts as the replica gives them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None


def read_usage(data: Any) -> Usage | None:
    """The usage in a response or a stream's event, or None."""
    usage = data.get("usage") if isinstance(data, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not _is_count(prompt) or not _is_count(completion):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(prompt, completion, cached if _is_count(cached) else None)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**31


def usage_of(body: bytes) -> Usage | None:
    """The usage in a whole response."""
    try:
        return read_usage(orjson.loads(body))
    except ValueError:
        return None


class EventCounter:
    """Counts the tokens of a stream from its bytes, however they are cut.

    An event with text counts as one token. Events before the first text (a role), and those that only end a
    choice or report usage, count as none. Only such events and the first ones are parsed as JSON.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.done = False  # saw `data: [DONE]`
        self.failed = False  # saw an event that tells of an error
        self.usage: Usage | None = None
        self._rest = b""

    def feed(self, chunk: bytes) -> int:
        """More bytes. Returns the tokens in them."""
        before = self.tokens
        if (
            before
            and not self._rest
            and chunk.startswith(b"data:")
            and chunk.endswith(b"}\n\n")
            and b'"usage":' not in chunk
            and b'"delta":{}' not in chunk
            and b"[DONE]" not in chunk
            and b'"error"' not in chunk
        ):  # whole events with text, which most are
            self.tokens += 1 + chunk.count(b"\ndata:")
            return self.tokens - before
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            self._rest = b""
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())
        return self.tokens - before

    @property
    def cut(self) -> bool:
        """Whether the bytes so far end inside a line."""
        return bool(self._rest)

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
        elif _ERROR.match(data):
            self.failed = True
        elif self.tokens and b'"delta":{}' not in data and (b'"usage":' not in data or _NO_USAGE.search(data)):
            self.tokens += 1
        else:
            try:
                event = orjson.loads(data)
            except ValueError:
                return
            self.usage = read_usage(event) or self.usage
            self.tokens += _has_text(event)


def _has_text(event: Any) -> bool:
    choices = event.get("choices") if isinstance(event, dict) else None
    for choice in choices if isinstance(choices, list) else []:
        if not isinstance(choice, dict):
            continue
        if choice.get("text"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(v for k, v in delta.items() if k != "role"):
            return True
    return False
