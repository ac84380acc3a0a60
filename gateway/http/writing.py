"""Makes the ASGI messages of an answer."""

from __future__ import annotations

from starlette.types import Message, Send

from gateway.protocol.dialects import Dialect, error_answer
from gateway.protocol.errors import GatewayError

Headers = list[tuple[bytes, bytes]]


def ascii_headers(headers: dict[str, str]) -> Headers:
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]


def start(status: int, content_type: str, headers: Headers, length: int | None = None) -> Message:
    sent = [(b"content-type", content_type.encode("latin-1")), *headers]
    if length is not None:
        sent.append((b"content-length", b"%d" % length))
    return {"type": "http.response.start", "status": status, "headers": sent}


def body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def send_error(error: GatewayError, dialect: Dialect, send: Send, headers: Headers | None = None) -> None:
    """Send an error as the whole answer. `headers` come before the error's own."""
    status, own, data = error_answer(error, dialect)
    sent = [*(headers or []), *ascii_headers(own)]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send(body(data, more=False))
