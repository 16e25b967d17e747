"""Answers to Envoy, serialized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.ext_proc import messages

NAMESPACE = "envoy.lb"
DESTINATION = "x-gateway-destination-endpoint"
_CHUNK_BYTES = 64 << 10  # of a body that is given back: what the protocol recommends


def picking(part: str, endpoints: str, headers: Mapping[str, str]) -> Any:
    """The message that sends a request on, as answer to `part` of it: by a header, and the same in metadata.

    endpoints: separated by commas, best first; headers: the replica's own.
    """
    answer = messages.ProcessingResponse()
    mutation = getattr(answer, part).response.header_mutation
    mutation.remove_headers.append("authorization")  # what a client shows here is not the replica's
    messages.set_header(mutation, DESTINATION, endpoints.encode())
    messages.set_header(mutation, "accept-encoding", b"identity")  # tokens are counted
    for name, value in headers.items():
        messages.set_header(mutation, name.lower(), value.encode("latin-1"))
    outer = answer.dynamic_metadata.fields.add(key=NAMESPACE)
    inner = outer.value.struct_value.fields.add(key=DESTINATION)
    inner.value.string_value = endpoints
    return answer


def named(replica: str, shown: bool) -> bytes:
    """The answer to the head of a response: the client is told which replica it comes from.

    shown: the proxy goes on to show the body.
    """
    answer = messages.ProcessingResponse()
    if not shown:
        answer.mode_override.response_body_mode = messages.NONE
        answer.mode_override.SetInParent()
    messages.set_header(answer.response_headers.response.header_mutation, "x-steersman-replica", replica.encode())
    return bytes(answer.SerializeToString())


def given_back(part: str, body: bytes, ends: bool) -> list[bytes]:
    """The answers that let a body go on, where the proxy has handed it over."""
    answers = []
    for start in range(0, max(1, len(body)), _CHUNK_BYTES):
        answer = messages.ProcessingResponse()
        piece = getattr(answer, part).response.body_mutation.streamed_response
        piece.body = body[start : start + _CHUNK_BYTES]
        piece.end_of_stream = ends and start + _CHUNK_BYTES >= len(body)
        answers.append(answer.SerializeToString())
    return answers


def refusal(error: ApiError) -> bytes:
    """The answer that ends a request with an error in the API's form."""
    return immediate(error.status, error.body(), error.headers, error.code or "error")


def immediate(status: int, body: bytes, headers: Mapping[str, str] | None = None, details: str = "") -> bytes:
    """The answer that ends a request with a response made here."""
    answer = messages.ProcessingResponse()
    made = answer.immediate_response
    made.status.code, made.body, made.details = status, body, details
    for name, value in {"content-type": "application/json", **(headers or {})}.items():
        messages.set_header(made.headers, name.lower(), value.encode("latin-1", "replace"))
    return bytes(answer.SerializeToString())
