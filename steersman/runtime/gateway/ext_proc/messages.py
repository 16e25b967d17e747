"""The messages of Envoy's external processing protocol, as far as an endpoint picker reads and writes them.

Numbers and types are those of envoy/service/ext_proc/v3/external_processor.proto and of what it imports; fields that
are not listed are skipped when read. They are declared here, in a pool of their own, because the distribution of
Envoy's whole API, xds-protos, installs files over those of googleapis-common-protos and opentelemetry-proto, which
others use. A map is written as what it is on the wire: a repeated entry of key and value.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD = "Process"
# BodySendMode
NONE, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX_STREAMED = range(5)

_PACKAGE = "steersman.ext_proc"
_SCALARS = {"bool": 8, "string": 9, "bytes": 12, "uint32": 13, "int32": 5, "double": 1}
# Message → fields: "name": (number, type). `type*`: repeated; `type|group`: of the oneof `group`.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "HeaderValue": {"key": (1, "string"), "value": (2, "string"), "raw_value": (3, "bytes")},
    "HeaderMap": {"headers": (1, "HeaderValue*")},
    # append_action 2: OVERWRITE_IF_EXISTS_OR_ADD
    "HeaderValueOption": {"header": (1, "HeaderValue"), "append_action": (3, "int32")},
    "HeaderMutation": {"set_headers": (1, "HeaderValueOption*"), "remove_headers": (2, "string*")},
    # google.protobuf.Struct
    "Value": {
        "number_value": (2, "double|kind"),
        "string_value": (3, "string|kind"),
        "struct_value": (5, "Struct|kind"),
        "list_value": (6, "ListValue|kind"),
    },
    "ListValue": {"values": (1, "Value*")},
    "Field": {"key": (1, "string"), "value": (2, "Value")},
    "Struct": {"fields": (1, "Field*")},
    "NamedStruct": {"key": (1, "string"), "value": (2, "Struct")},
    "Metadata": {"filter_metadata": (1, "NamedStruct*")},
    # From Envoy
    "HttpHeaders": {"headers": (1, "HeaderMap"), "end_of_stream": (3, "bool")},
    "HttpBody": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    "HttpTrailers": {"trailers": (1, "HeaderMap")},
    "ProtocolConfiguration": {"request_body_mode": (1, "int32"), "response_body_mode": (2, "int32")},
    "ProcessingRequest": {
        "request_headers": (2, "HttpHeaders|request"),
        "response_headers": (3, "HttpHeaders|request"),
        "request_body": (4, "HttpBody|request"),
        "response_body": (5, "HttpBody|request"),
        "request_trailers": (6, "HttpTrailers|request"),
        "response_trailers": (7, "HttpTrailers|request"),
        "metadata_context": (8, "Metadata"),
        "attributes": (9, "NamedStruct*"),
        "observability_mode": (10, "bool"),
        "protocol_config": (11, "ProtocolConfiguration"),
    },
    # To Envoy
    "StreamedBodyResponse": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    "BodyMutation": {"body": (1, "bytes|mutation"), "streamed_response": (3, "StreamedBodyResponse|mutation")},
    "CommonResponse": {"header_mutation": (2, "HeaderMutation"), "body_mutation": (3, "BodyMutation")},
    "PartResponse": {"response": (1, "CommonResponse")},  # HeadersResponse and BodyResponse
    "TrailersResponse": {"header_mutation": (1, "HeaderMutation")},
    "HttpStatus": {"code": (1, "int32")},
    "ImmediateResponse": {
        "status": (1, "HttpStatus"),
        "headers": (2, "HeaderMutation"),
        "body": (3, "bytes"),
        "details": (5, "string"),
    },
    "ProcessingMode": {"response_body_mode": (4, "int32")},
    "ProcessingResponse": {
        "request_headers": (1, "PartResponse|response"),
        "response_headers": (2, "PartResponse|response"),
        "request_body": (3, "PartResponse|response"),
        "response_body": (4, "PartResponse|response"),
        "request_trailers": (5, "TrailersResponse|response"),
        "response_trailers": (6, "TrailersResponse|response"),
        "immediate_response": (7, "ImmediateResponse|response"),
        "dynamic_metadata": (8, "Struct"),
        "mode_override": (9, "ProcessingMode"),
    },
    "HealthCheckRequest": {"service": (1, "string")},  # of grpc.health.v1
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="steersman/ext_proc.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        groups: list[str] = []
        for field_name, (number, kind) in fields.items():
            kind, _, group = kind.partition("|")
            plain = kind.removesuffix("*")
            field = message.field.add(name=field_name, number=number, label=3 if kind.endswith("*") else 1)
            field.type = _SCALARS.get(plain, 11)
            if plain not in _SCALARS:
                field.type_name = f".{_PACKAGE}.{plain}"
            if group:
                if group not in groups:
                    groups.append(group)
                    message.oneof_decl.add(name=group)
                field.oneof_index = groups.index(group)
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


ProcessingRequest = _class("ProcessingRequest")
ProcessingResponse = _class("ProcessingResponse")
HealthCheckRequest = _class("HealthCheckRequest")


def headers_of(message: Any) -> dict[bytes, bytes]:
    """The fields of an HttpHeaders: names in lower case; one that came more than once is joined by commas."""
    found: dict[bytes, bytes] = {}
    for header in message.headers.headers:
        name = header.key.encode()
        value = header.raw_value or header.value.encode()
        found[name] = value if name not in found else found[name] + b", " + value
    return found


def text_of(fields: Any, name: str) -> str | None:
    """A text in a Struct, or None."""
    for field in fields.fields:
        if field.key == name and field.value.WhichOneof("kind") == "string_value":
            return str(field.value.string_value)
    return None


def texts_of(fields: Any, name: str) -> list[str] | None:
    """A list of texts in a Struct; one text counts as a list with commas. None: it is not there."""
    for field in fields.fields:
        if field.key != name:
            continue
        if field.value.WhichOneof("kind") == "string_value":
            return [text.strip() for text in field.value.string_value.split(",") if text.strip()]
        return [value.string_value for value in field.value.list_value.values]
    return None


def set_header(mutation: Any, name: str, value: bytes) -> None:
    """Let a HeaderMutation give a header this value, in place of any that it has."""
    option = mutation.set_headers.add(append_action=2)
    option.header.key, option.header.raw_value = name, value


def _serialized(part: str) -> bytes:
    message = ProcessingResponse()
    getattr(message, part).SetInParent()
    return bytes(message.SerializeToString())


# Go on, nothing is changed: by the part of the request or response that it answers.
CONTINUE = {
    part: _serialized(part)
    for part in (
        "request_headers",
        "request_body",
        "request_trailers",
        "response_headers",
        "response_body",
        "response_trailers",
    )
}
