"""A model's other name in a body: put in place, and nothing else changes."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.runtime.gateway.prompt import read_call
from steersman.runtime.gateway.rename import renamed

SPACE = st.sampled_from(["", " ", "\n", "\t  ", "\r\n"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NAMES = st.sampled_from(["model", "prompt", "models", "Model", "mode"]) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=20)
KEYS = [
    *(json.dumps(key) for key in ("model", "models", "prompt", "a\\")),
    r'"mod\u0065l"',
    r'"\u006Dodel"',
    r'"mo\"del"',
]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, str]:
    """A body, and the same with every name of the model, or null in its place, replaced by "theirs"."""
    before, after = [], []
    for _ in range(draw(st.integers(0, 5))):
        key = draw(st.sampled_from(KEYS))
        value = json.dumps(draw(VALUES), ensure_ascii=draw(st.booleans()))
        if json.loads(key) == "model":
            value = json.dumps(draw(st.none() | st.text()))
        spaces = [draw(SPACE) for _ in range(4)]
        other = '"theirs"' if json.loads(key) == "model" else value
        for pieces, shown in ((before, value), (after, other)):
            pieces.append(f"{spaces[0]}{key}{spaces[1]}:{spaces[2]}{shown}{spaces[3]}")
    ends = draw(SPACE), draw(SPACE)
    prompt = draw(SPACE) + '"messages": []'
    before.append(prompt)
    after.append(prompt)
    return tuple(ends[0] + "{" + ",".join(pieces) + "}" + ends[1] for pieces in (before, after))  # type: ignore[return-value]


def ask(body: str) -> bytes:
    data = body.encode(errors="surrogatepass")
    return renamed(data, read_call(data), "theirs")


@given(bodies())
def test_every_byte_but_the_name_stays(pair: tuple[str, str]) -> None:
    body, expected = pair
    try:
        orjson.loads(body)
    except ValueError:  # lone surrogates
        return
    if json.loads(body).get("model") == "theirs":
        assert ask(body) == body.encode()
    elif "model" in json.loads(body):
        assert ask(body) == expected.encode()
    else:
        assert orjson.loads(ask(body)) == {**orjson.loads(body), "model": "theirs"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"model": "m", "prompt": "x"}', '{"model": "theirs", "prompt": "x"}'),
        ('{"prompt": "x"}', '{"model": "theirs", "prompt": "x"}'),
        ('{"model": "a", "model": "m", "prompt": 1.0}', '{"model": "theirs", "model": "theirs", "prompt": 1.0}'),
        ('{"prompt": "x", "m": {"model": "a"}}', '{"model": "theirs", "prompt": "x", "m": {"model": "a"}}'),
        ('{"prompt": "model", "model": null}', '{"prompt": "model", "model": "theirs"}'),
        (r'{"prompt": "\"model\": \"a\"", "model": "m"}', r'{"prompt": "\"model\": \"a\"", "model": "theirs"}'),
    ],
)
def test_it_is_the_bodys_own_model_that_is_named(body: str, expected: str) -> None:
    assert ask(body) == expected.encode()


def test_a_replica_that_knows_it_by_the_same_name_gets_the_same_object() -> None:
    body = b'{"model": "m", "prompt": "x"}'
    assert renamed(body, read_call(body), "m") is body
    assert renamed(body, read_call(body), None) is body
