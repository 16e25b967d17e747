"""A body in a replica's own words: the model's name is put in place, and every other byte stays."""

from __future__ import annotations

import re

import orjson

from steersman.runtime.gateway.prompt import Call

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# Of JSON that is known to be valid, all that tells how deep a place is: whole strings and brackets.
_MARKS = re.compile(_STRING + rb"|[{}\[\]]", re.DOTALL)
_VALUE = re.compile(rb"\s*+:\s*+(" + _STRING + rb"|null)", re.DOTALL)
_KEY = b'"model"'
_ESCAPE = rb"\u006"  # how each letter of the key may begin instead

_LONGEST = len("model") * len("\\u0000") + 2  # bytes of the key, in whatever way it is written


def renamed(body: bytes, call: Call, served_model: str | None) -> bytes:
    """The body of `call`, which is a valid JSON object, for a replica on which the model may have another name."""
    if served_model is None or served_model == call.model:
        return body
    name = orjson.dumps(served_model)
    pieces: list[bytes] = []
    end = 0
    for start, stop in _models(body, call.model is not None):
        pieces += (body[end:start], name)
        end = stop
    if pieces:
        return b"".join((*pieces, body[end:]))
    brace = body.index(b"{") + 1  # it names no model
    comma = b"" if body[brace:].lstrip().startswith(b"}") else b", "
    return b'%b"model": %b%b%b' % (body[:brace], name, comma, body[brace:])


def _models(body: bytes, named: bool) -> list[tuple[int, int]]:
    """Where the values of the key "model" are that are a name or null. It may stand twice: who reads it chooses.

    named: it is there, with a name.
    """
    if named and body.count(_KEY) == 1 and _ESCAPE not in body:  # as nearly always: then it is this one
        value = _VALUE.match(body, body.index(_KEY) + len(_KEY))
        assert value is not None
        return [value.span(1)]
    found: list[tuple[int, int]] = []
    depth = 0
    for mark in _MARKS.finditer(body):
        text = mark[0]
        if text in b"{[":
            depth += 1
        elif text in b"}]":
            depth -= 1
        elif depth == 1 and _is_model(text) and (value := _VALUE.match(body, mark.end())):
            found.append(value.span(1))
    return found


def _is_model(key: bytes) -> bool:
    return key == _KEY or (b"\\" in key and len(key) <= _LONGEST and orjson.loads(key) == "model")
