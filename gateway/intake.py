"""What comes in from a client: headers, and a body of bounded size."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive, Scope

from gateway.errors import BodyTooLarge


class ClientGone(Exception):
    """The client left before its request was here."""


def headers_of(scope: Scope) -> dict[str, str]:
    """By lower-case name; of several with one name the first."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}


async def read_body(receive: Receive, headers: Mapping[str, str], limit_bytes: int) -> bytes:
    """Raises `BodyTooLarge` before more than the limit has been read, and `ClientGone`."""
    declared = headers.get("content-length", "")
    if len(declared) > 20 or (declared.isdecimal() and int(declared) > limit_bytes):
        raise _too_large(limit_bytes)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        if not message.get("more_body", False):
            return chunk if not chunks else b"".join([*chunks, chunk])
        chunks.append(chunk)


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit_bytes} bytes")
