"""A collector of traces: takes OTLP over HTTP on a real socket, and keeps the spans."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.wire.scripted_engine import Send, push, serving_asgi, start


@dataclass(frozen=True)
class Told:
    """Ids in hexadecimal; times in nanoseconds since 1970."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    begin_ns: int
    end_ns: int
    failed: bool
    state: str
    attributes: dict[str, Any]
    events: list[str]


@dataclass
class Collector:
    """status: with which it answers. headers: of what was sent."""

    status: int = 200
    spans: list[Told] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        data, more = b"", True
        while more:
            message = await receive()
            data += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.headers.append(headers)
        if self.status == 200:
            assert scope["path"] == "/v1/traces"
            self._take(gzip.decompress(data) if headers.get("content-encoding") == "gzip" else data)
        await start(send, b"application/x-protobuf", self.status)
        await push(send, b"", more=False)

    def _take(self, data: bytes) -> None:
        request = ExportTraceServiceRequest()
        request.ParseFromString(data)
        for of_resource in request.resource_spans:
            resource = _attributes(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                self.spans += [_told(span, resource["service.name"]) for span in of_scope.spans]

    def named(self, name: str) -> list[Told]:
        return [span for span in self.spans if span.name == name]

    def below(self, parent: Told) -> list[Told]:
        """In the order in which they began."""
        return sorted((span for span in self.spans if span.parent_id == parent.span_id), key=lambda span: span.begin_ns)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Collector]:
        async with serving_asgi(self) as url:
            self.url = url
            yield self


def _told(span: Span, service: str) -> Told:
    return Told(
        span.name,
        service,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        span.trace_state,
        _attributes(span.attributes),
        [event.name for event in span.events],
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
