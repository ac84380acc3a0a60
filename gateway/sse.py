"""Server-sent events on their way through: looked at only where the usage may be."""

from __future__ import annotations

import re

from gateway.dialects import Dialect
from gateway.usage import Usage, parse_usage

_END = b"\n\n"
_DATA = re.compile(rb"(?:\A|\n)data: ?")
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class UsageFilter:
    """Watches a stream for the usage, which the engine is always asked for, and withholds the event that carries nothing
    else from a client that did not ask. Only whole events leave; most leave as the very bytes that came."""

    def __init__(self, dialect: Dialect, *, show: bool) -> None:
        self.usage: Usage | None = None
        self.events = 0
        self.done = False  # the stream has said that it is over
        self._ends = dialect.ends.search
        self._show = show or not dialect.hides_usage
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
        self.done = self.done or self._ends(whole) is not None
        return whole if not _USAGE.search(whole) else self._filter(whole)

    def _filter(self, whole: bytes) -> bytes:
        shown = []
        for event in whole.split(_END)[:-1]:
            usage = parse_usage(_data(event)) if _USAGE.search(event) else None
            self.usage = usage or self.usage
            if usage is None or self._show or not _NO_CHOICES.search(event):
                shown.append(event + _END)
        return b"".join(shown)


def _data(event: bytes) -> bytes:
    found = _DATA.search(event)
    return event[found.end() :] if found else event
