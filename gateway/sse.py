"""Server-sent events on their way through: looked at only where the usage may be."""

from __future__ import annotations

import re

from gateway.errors import GatewayError
from gateway.usage import Usage, parse_usage

DONE = b"data: [DONE]\n\n"
_DATA, _END = b"data: ", b"\n\n"
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class UsageFilter:
    """Watches a stream for the usage, which the engine is always asked for, and withholds the event that carries nothing
    else from a client that did not ask. Only whole events leave; most leave as the very bytes that came."""

    def __init__(self, *, show: bool) -> None:
        self.usage: Usage | None = None
        self.events = 0
        self.done = False  # the stream has said that it is over
        self._show = show
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """What may be passed on now."""
        data = self._rest + chunk if self._rest else chunk
        end = data.rfind(_END) + len(_END)
        if end < len(_END):
            self._rest = data
            return b""
        self._rest, whole = data[end:], data[:end]
        self.events += whole.count(_END)
        self.done = whole.endswith(DONE)
        return whole if not _USAGE.search(whole) else self._filter(whole)

    def _filter(self, whole: bytes) -> bytes:
        shown = []
        for event in whole.split(_END)[:-1]:
            usage = parse_usage(event.removeprefix(_DATA)) if _USAGE.search(event) else None
            self.usage = usage or self.usage
            if usage is None or self._show or not _NO_CHOICES.search(event):
                shown.append(event + _END)
        return b"".join(shown)


def begins_with_error(data: bytes) -> bool:
    return data.startswith(b'data: {"error"')


def error_event(error: GatewayError) -> bytes:
    """How a stream ends that fails after its first byte."""
    return _DATA + error.body() + _END + DONE
