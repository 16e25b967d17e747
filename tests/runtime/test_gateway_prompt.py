"""What the gateway learns from bodies and answers."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.prompt import TokenEstimate, read_call
from steersman.runtime.replica._stream import EventCounter, Usage


def chat(*contents: object, **fields: object) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({"messages": messages, **fields}).encode()


def status_of(body: bytes) -> int:
    try:
        read_call(body)
    except ApiError as error:
        return error.status
    return 200


def test_equal_prefixes_give_equal_keys_and_what_follows_a_difference_none() -> None:
    shared = "s" * 1000
    a, b = read_call(chat(shared, "x" * 600)), read_call(chat(shared, "y" * 600))
    same = a.keys == b.keys
    assert same[:3].all()
    assert not same[4:].any()


def test_a_growing_conversation_keeps_its_keys() -> None:
    first = read_call(chat("a" * 700))
    second = read_call(chat("a" * 700, "b" * 700))
    assert (second.keys[: len(first.keys)] == first.keys).all()
    assert len(second.keys) > len(first.keys)


def test_prompts_of_token_ids_have_exact_lengths() -> None:
    call = read_call(json.dumps({"prompt": list(range(130))}).encode())
    assert (call.exact_tokens, len(call.keys)) == (130, 2)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, 0),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": None}, 0),
    ],
)
def test_the_limit_on_the_output(fields: dict[str, object], limit: int) -> None:
    assert read_call(chat("x", **fields)).max_tokens == limit


def test_contents_in_parts_tools_and_other_fields_are_read() -> None:
    call = read_call(
        chat([{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": "u"}}], tools=[{}])
    )
    assert call.prompt_bytes > len("hello")


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    assert status_of(body) in (200, 400)


@given(
    st.dictionaries(
        st.sampled_from(["messages", "prompt", "model", "stream", "max_tokens", "tools"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["role", "content", "text"]), x),
            max_leaves=8,
        ),
    )
)
def test_any_fields_are_read_or_refused(data: dict[str, object]) -> None:
    assert status_of(json.dumps(data).encode()) in (200, 400)


def test_token_estimates_start_at_four_bytes_and_learn_template_and_tokenizer() -> None:
    estimate = TokenEstimate()
    assert estimate.tokens(4000) == pytest.approx(1000, rel=0.01)
    for i in range(300):
        n = 200 + 37 * i % 8000
        estimate.learn(n, round(30 + n / 5))
    assert estimate.tokens(5000) == pytest.approx(1030, rel=0.02)
    assert estimate.tokens(0) == pytest.approx(30, abs=5)
    assert estimate.block_tokens == pytest.approx(51, abs=1)


def test_short_prompts_alone_do_not_spoil_the_estimate_of_long_ones() -> None:
    estimate = TokenEstimate()
    for _ in range(300):
        estimate.learn(50, 45)
    assert estimate.tokens(50) == pytest.approx(45, abs=3)
    assert 900 < estimate.tokens(4000) < 1200


STREAM = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":null},"finish_reason":null}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    b": a comment\n\n"
    b'data: {"choices":[{"delta":{"content":"b"},"finish_reason":null}]}\r\n\r\n'
    b'data: {"choices":[{"finish_reason":"stop","index":0,"delta":{}}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(STREAM))))
def test_tokens_are_counted_however_the_stream_is_cut(cuts: list[int]) -> None:
    counter = EventCounter()
    places = [0, *sorted(cuts), len(STREAM)]
    fed = sum(counter.feed(STREAM[a:b]) for a, b in itertools.pairwise(places))
    assert (fed, counter.tokens, counter.done, counter.cut) == (2, 2, True, False)
    assert counter.usage == Usage(9, 2, 4)


@given(st.lists(st.binary(max_size=60)))
def test_any_bytes_can_be_counted(chunks: list[bytes]) -> None:
    counter = EventCounter()
    for chunk in chunks:
        counter.feed(b"data: " + chunk + b"\n\n")
    assert counter.tokens <= len(chunks) * 60
