"""What scheduling needs of a body: prompt length, prefix identity, limits. No prompt text is kept."""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

import numpy as np
import orjson

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.ticket import NO_KEYS

BLOCK_BYTES = 256  # of canonical prompt text, for one prefix block
BLOCK_TOKENS = 64  # what that stands for before anything was learnt
# Bounds that no prompt of use reaches: one body must not hold up the others for seconds, or grow to gigabytes.
_VALUES = 2_000_000  # of a body, about
_PARTS = 32_768  # messages, and parts of their contents
_BLOCKS = 16_384  # that are told apart: a million tokens
_ANSWERS = 1024  # to one prompt, that count against limits
_KEY = secrets.randbits(62)  # identities mean nothing outside this process


class Call(NamedTuple):
    """A completion request as scheduling sees it."""

    model: str | None
    stream: bool
    max_tokens: int  # 0: not stated
    prompt_bytes: int  # length of the canonical prompt
    exact_tokens: int | None  # for prompts that come as token ids
    keys: np.ndarray  # int64: identities of the prompt's full blocks
    answers: int = 1  # of up to max_tokens each


def read_call(body: bytes, embeds: bool = False) -> Call:
    """The request in a body of /v1/completions or /v1/chat/completions, or (`embeds`) of /v1/embeddings.

    An embedding counts as a prompt with one token of output.

    Raises:
        ApiError: 400, with what is wrong and in which field.
    """
    if len(body) > _VALUES and body.count(b",") + body.count(b"[") + body.count(b"{") > _VALUES:
        raise ApiError(400, f"the body holds more than {_VALUES} values", code="invalid_json")
    try:
        data = orjson.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(data).__name__}")
    get = data.get
    if (model := get("model")) is not None and type(model) is not str:
        raise _not("model", "str or null", model)
    name = "max_completion_tokens"
    if (limit := get(name)) is None:
        name = "max_tokens"
        limit = get(name)
    if limit is not None and type(limit) is not int:  # what comes from JSON has no subclasses
        raise _not(name, "int or null", limit)
    if limit is not None and not 0 <= limit < 2**31:
        raise ApiError(400, f"max_tokens must be a positive number, not {limit}", param="max_tokens")
    exact = None
    if embeds:
        if "input" not in data:
            raise ApiError(400, "the body needs 'input'", param="input")
        exact, text = _prompt(data["input"])
        return Call(model, False, 1, len(text), exact, prefix_keys(text))
    if "messages" in data:
        messages = data["messages"]
        if type(messages) is not list:
            raise _not("messages", "list", messages)
        text = _canonical(data, messages)
    elif "prompt" in data:
        exact, text = _prompt(data["prompt"])
    else:
        raise ApiError(400, "the body needs 'messages' or 'prompt'", param="messages")
    if (stream := get("stream")) is not None and type(stream) is not bool:
        raise _not("stream", "bool or null", stream)
    return Call(model, stream is True, limit or 0, len(text), exact, prefix_keys(text), _answers(data))


def _answers(data: dict[str, Any]) -> int:
    """How many answers a replica would write: `n` or `best_of` for each prompt. Odd values are its to refuse."""
    n, best_of, prompt = data.get("n"), data.get("best_of"), data.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else 1
    if n is None and best_of is None:
        return prompts
    return min(_ANSWERS, max([1, *(value for value in (n, best_of) if type(value) is int)])) * prompts


def prefix_keys(text: bytes) -> np.ndarray:
    """int64 identities of the full blocks of `text`: equal where all text up to a block's end is equal.

    Each is Python's hash (SipHash, keyed anew by each process) of a block and the identity before it; the first one of
    a secret of our own, for who has switched that key off.
    """
    count = min(_BLOCKS, len(text) // BLOCK_BYTES)
    if not count:
        return NO_KEYS
    keys, before = [], _KEY
    for end in range(BLOCK_BYTES, (count + 1) * BLOCK_BYTES, BLOCK_BYTES):
        before = hash((before, text[end - BLOCK_BYTES : end]))
        keys.append(before)
    return np.array(keys, np.int64)


def _not(name: str, wanted: str, value: Any) -> ApiError:
    return ApiError(400, f"{name!r} must be {wanted}, not {type(value).__name__}", param=name)


def _prompt(prompt: Any) -> tuple[int | None, bytes]:
    """The exact length of a prompt of token ids, or None, and its canonical text."""
    if isinstance(prompt, list) and set(map(type, prompt)) == {int}:
        try:
            return len(prompt), (np.asarray(prompt, np.int64) & 0xFFFFFFFF).astype(np.uint32).tobytes()
        except OverflowError:
            raise ApiError(400, "a token id is out of range", param="prompt") from None
    if isinstance(prompt, list) and len(prompt) > _PARTS:
        raise ApiError(400, f"the prompt has more than {_PARTS} parts", param="prompt")
    text = "\x01".join(p if isinstance(p, str) else _json(p) for p in _as_list(prompt))
    return None, text.encode(errors="surrogatepass")


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _canonical(data: dict[str, Any], messages: list[Any]) -> bytes:
    """A chat in the order in which templates write it: tools, then each message's role and content."""
    parts = [_json(data["tools"])] if data.get("tools") else []
    count = len(messages)
    _few(count)
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ApiError(400, f"messages[{i}] must be an object", param="messages")
        role, content = message.get("role"), message.get("content")
        if type(content) is str and type(role) is str and len(message) == 2:  # which most are
            parts.append(f"{role}\x01{content}")
        else:
            count += len(content) if isinstance(content, list) else 0
            _few(count)
            parts.append(_message(message, role, content))
    return "\x02".join(parts).encode(errors="surrogatepass")


def _few(count: int) -> None:
    if count > _PARTS:
        raise ApiError(400, f"the messages have more than {_PARTS} parts", param="messages")


def _message(message: dict[str, Any], role: Any, content: Any) -> str:
    parts = [p.get("text", p) if isinstance(p, dict) else p for p in _as_list(content) if p is not None]
    rest = {k: v for k, v in message.items() if k not in ("role", "content")}
    if rest:
        parts.append(rest)
    text = "\x01".join(p if isinstance(p, str) else _json(p) for p in parts)
    return f"{role if isinstance(role, str) else _json(role)}\x01{text}"


class TokenEstimate:
    """Prompt tokens from bytes, `tokens = fixed + slope · bytes`, learnt from the usage that replicas report.

    A decaying least-squares line: the fixed part is the chat template's, the slope the tokenizer's. Two
    constant observations (an empty prompt, and 4,096 bytes as 1,024 tokens) keep it sane until others are
    seen, and where all prompts have one length.
    """

    MEMORY = 0.98
    PRIOR = ((0.0, 0.0), (4096.0, 1024.0))

    def __init__(self) -> None:
        self.fixed, self.slope = 0.0, BLOCK_TOKENS / BLOCK_BYTES
        self._n = self._x = self._y = self._xx = self._xy = 0.0  # n, Σx, Σy, Σxx, Σxy of what was observed
        (x, y), (u, v) = self.PRIOR
        self._prior = (2.0, x + u, y + v, x * x + u * u, x * y + u * v)

    def learn(self, prompt_bytes: int, prompt_tokens: int) -> None:
        """A replica counted `prompt_tokens` for a prompt."""
        keep, prior = self.MEMORY, self._prior
        self._n = keep * self._n + 1.0
        self._x = keep * self._x + prompt_bytes
        self._y = keep * self._y + prompt_tokens
        self._xx = keep * self._xx + prompt_bytes * prompt_bytes
        self._xy = keep * self._xy + prompt_bytes * prompt_tokens
        n, x, y, xx, xy = (
            self._n + prior[0],
            self._x + prior[1],
            self._y + prior[2],
            self._xx + prior[3],
            self._xy + prior[4],
        )
        self.slope = min(2.0, max(0.05, (n * xy - x * y) / (n * xx - x * x)))
        self.fixed = max(0.0, (y - self.slope * x) / n)

    def tokens(self, prompt_bytes: int) -> int:
        return max(1, round(self.fixed + self.slope * prompt_bytes))

    @property
    def block_tokens(self) -> int:
        """Tokens that one prefix block stands for."""
        return max(1, round(self.slope * BLOCK_BYTES))
