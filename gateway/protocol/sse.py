"""Server-sent events on their way through: looked at only where the usage may be."""

from __future__ import annotations

import re

from gateway.protocol.dialects import Dialect
from gateway.protocol.errors import EngineLost
from gateway.protocol.usage import Usage, UsageReports

# The largest event. It is held until it is whole: the last one of a response holds all of its text.
MAX_EVENT_BYTES = 2**26
_END = b"\n\n"
_DATA = re.compile(rb"(?:\A|\n)data: ?")
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class UsageFilter:
    """Reads the usage from a stream, since the gateway always asks the engine for it, and withholds the event that carries
    nothing else from a client that did not ask. Only whole events leave; most leave as the very bytes that came."""

    def __init__(self, dialect: Dialect, *, show: bool) -> None:
        self.events = 0  # with a token
        self.done = False  # the event that ends the stream has come
        self.failed = False  # that event was an error
        self._reports = UsageReports()
        self._ends, self._counts = dialect.ends.search, dialect.counts
        self._show = show or not dialect.hides_usage
        self._rest: list[bytes] = []
        self._rest_bytes = 0

    @property
    def usage(self) -> Usage | None:
        return self._reports.usage

    def feed(self, chunk: bytes) -> bytes:
        """What may be passed on now. Raises `EngineLost` for an event that does not end."""
        if not self._ends_one(chunk):
            self._hold(chunk)
            return b""
        data = b"".join([*self._rest, chunk]) if self._rest else chunk
        end = data.rfind(_END) + len(_END)
        if data.endswith(b"\n\n\n", 0, end):  # of an odd number, the last is the next event's
            end -= (end - len(data[:end].rstrip(b"\n"))) % 2
        self._rest, self._rest_bytes = [], 0
        self._hold(data[end:])
        whole = data[:end]
        self.events += whole.count(self._counts)
        if not self.done and (ends := self._ends(whole)) is not None:
            self.done, self.failed = True, ends.lastgroup == "error"
        return whole if not _USAGE.search(whole) else self._filter(whole)

    def _ends_one(self, chunk: bytes) -> bool:
        cut = bool(self._rest) and chunk.startswith(b"\n") and self._rest[-1].endswith(b"\n")
        return cut or _END in chunk

    def _hold(self, part: bytes) -> None:
        if part:
            self._rest.append(part)
            self._rest_bytes += len(part)
            if self._rest_bytes > MAX_EVENT_BYTES:
                raise EngineLost("an event of the engine's answer does not end")

    def _filter(self, whole: bytes) -> bytes:
        shown = []
        for event in whole.split(_END)[:-1]:
            has_usage = _USAGE.search(event) is not None and self._reports.add(_data(event))
            if not has_usage or self._show or not _NO_CHOICES.search(event):
                shown.append(event + _END)
        return b"".join(shown)


def _data(event: bytes) -> bytes:
    found = _DATA.search(event)
    return event[found.end() :] if found else event
