"""Spans off the wire: OTLP over HTTP, in protobuf.

https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

import math
import zlib
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from .spans import Event, Span

MAX_BODY_BYTES = 8 << 20
"""The largest body, unpacked as well: a few kilobytes of gzip can claim to be gigabytes."""

MAX_TEXT = 4_000
"""Characters of one attribute that are kept."""

_KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
_STATUSES = ("unset", "ok", "error")
_REMOTE = trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK


class BadBody(ValueError):
    """It is no OTLP request; the message says why, for whoever sent it."""


def unpack(body: bytes, encoding: str) -> bytes:
    """A body without its content encoding: gzip, or none.

    Raises:
        BadBody: Another encoding, broken, or too large.
    """
    if encoding == "gzip":
        inflating = zlib.decompressobj(wbits=31)
        try:
            body = inflating.decompress(body, MAX_BODY_BYTES + 1)
        except zlib.error as error:
            raise BadBody("that is not gzip") from error
    elif encoding not in ("", "identity"):
        raise BadBody(f"content encoding {encoding} is not known here")
    if len(body) > MAX_BODY_BYTES:
        raise BadBody("that is too much at once")
    return body


def decode(body: bytes) -> list[Span]:
    """The spans of an `ExportTraceServiceRequest`.

    Raises:
        BadBody: It is none.
    """
    try:
        request = ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise BadBody("that is not OTLP in protobuf") from error
    return list(_spans(request))


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for of_resource in request.resource_spans:
        service, pid = _who(of_resource.resource)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                if len(span.trace_id) == 16 and len(span.span_id) == 8:
                    yield _span(span, service, pid)


def _who(resource: Resource) -> tuple[str, int | None]:
    about = _attributes(resource.attributes)
    pid = about.get("process.pid")
    return str(about.get("service.name", "unknown")), pid if isinstance(pid, int) else None


def _span(span: trace_pb2.Span, service: str, pid: int | None) -> Span:
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        remote=bool(span.flags & _REMOTE),
        name=_short(span.name),
        kind=_word(_KINDS, span.kind),
        service=service,
        pid=pid,
        start_ns=span.start_time_unix_nano,
        end_ns=max(span.end_time_unix_nano, span.start_time_unix_nano),
        status=_word(_STATUSES, span.status.code),
        message=_short(span.status.message) or None,
        attributes=_attributes(span.attributes),
        events=tuple(
            Event(_short(event.name), event.time_unix_nano, _attributes(event.attributes)) for event in span.events
        ),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        size=span.ByteSize(),
    )


def _attributes(pairs: "list[KeyValue] | Any") -> dict[str, Any]:
    return {_short(pair.key): _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return _short(value.string_value)
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    if kind == "bytes_value":
        return _short(value.bytes_value.hex())
    if kind == "double_value" and not math.isfinite(value.double_value):
        return str(value.double_value)  # JSON has no such number
    return getattr(value, kind) if kind else None


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def _word(words: tuple[str, ...], number: int) -> str:
    return words[number] if 0 <= number < len(words) else words[0]
