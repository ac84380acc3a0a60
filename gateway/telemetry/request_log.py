"""The request log: one line of JSON for each request, when it has ended.

The event loop only gathers lines; a separate thread encodes and writes them, those of a few milliseconds at a time. So a pipe
without a reader, or a slow disk, delays that thread alone: when too many lines wait for it, further ones are dropped and
counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from gateway.telemetry.request_span import RequestSpan

logger = logging.getLogger(__name__)

STDOUT, NONE = "-", "none"
GATHER_S = 0.005
# Lines that may wait to be written; about 10 MB.
MAX_LINES = 10_000
# Seconds for the last lines, when the gateway stops.
CLOSE_S = 2.0
CHUNK_BYTES = 65536

_encode_lines = msgspec.json.Encoder().encode_lines


class RequestLogError(Exception):
    """The log cannot be written where the settings say."""


class Line(msgspec.Struct, kw_only=True, rename={"agent_class": "class"}):
    """One request. Every line has every field; null stands for what there was not, or is not known."""

    time: datetime | None = None  # of its end
    request_id: str
    trace_id: str | None = None
    endpoint: str
    status: int | None = None  # of the answer to the client
    outcome: str | None = None
    tenant: str | None = None
    agent: str | None = None
    agent_class: str | None = None
    source: str | None = None
    task: str | None = None
    model: str | None = None
    streaming: bool | None = None
    queue_ms: float | None = None
    engine_ms: float | None = None
    overhead_ms: float | None = None  # neither in the queue nor at the engine
    total_ms: float | None = None  # from its arrival to its end
    first_token_ms: float | None = None  # from its arrival to the first bytes of a stream
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    predicted_cost: float | None = None  # the task's own, in KV token·iterations, as is the next
    observed_cost: float | None = None
    finish_tag: float | None = None
    retries: int = 0  # how often it was sent again because the engine had lost it
    error: str | None = None  # the gateway's own code; an error of the engine has none


def line_of(span: RequestSpan) -> Line:
    """Of a request that has ended."""
    task, usage = span.arriving, span.usage
    return Line(
        time=datetime.now(UTC),
        request_id=span.request_id,
        trace_id=span.trace_id,
        endpoint=span.endpoint,
        status=span.status,
        outcome=str(span.outcome),
        tenant=span.tenant,
        agent=None if task is None else task.agent,
        agent_class=None if task is None else task.agent_class,
        source=None if task is None else task.source,
        task=None if task is None else str(task.id),
        model=span.model,
        streaming=span.streaming,
        queue_ms=_ms(span.queue_s),
        engine_ms=_ms(span.engine_s),
        overhead_ms=_ms(span.overhead_s),
        total_ms=_ms(span.total_s),
        first_token_ms=_ms(span.first_token_s),
        prompt_tokens=None if usage is None else usage.prompt_tokens,
        cached_tokens=None if usage is None else usage.cached_tokens,
        completion_tokens=None if usage is None else usage.completion_tokens,
        predicted_cost=_short(span.predicted_cost),
        observed_cost=_short(span.observed_cost),
        finish_tag=_short(span.finish_tag),
        retries=span.retries,
        error=span.error,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6) / 1000  # three digits; round(…, 3) takes longer


def _short(number: float | None) -> float | None:
    return None if number is None else round(number, 1)


class RequestLog:
    """An open file, and the thread that writes to it. Its methods are for the event loop."""

    def __init__(self, descriptor: int, path: Path | None, dropped: Callable[[int], None]) -> None:
        """descriptor: of an open file; the log closes it. path: of the same file, if it may be moved away. dropped: called
        with the number of lines lost, from either thread."""
        self._descriptor, self._path, self._dropped = descriptor, path, dropped
        self._gathered: list[Line] = []
        self._timer: asyncio.TimerHandle | None = None
        self._batches: SimpleQueue[list[Line] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._taken = 0  # lines, counted by the event loop alone
        self._done = 0  # lines, counted by the thread alone
        self._closed = False
        self._reopen = False
        self._torn = False  # the file ends in the middle of a line
        self._failing = False

    def add(self, line: Line) -> None:
        if self._closed or self._taken - self._done >= MAX_LINES:
            self._dropped(1)
            return
        self._taken += 1
        self._gathered.append(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self._hand_over)

    def reopen(self) -> None:
        """Open the file anew before the next line. A file that has been moved away is noticed without it, too."""
        self._reopen = True

    async def close(self) -> None:
        """Returns when everything is written, or after `CLOSE_S`."""
        self._hand_over()
        self._closed = True
        if self._thread is not None:
            self._batches.put(None)
            await asyncio.to_thread(self._thread.join, CLOSE_S)
        if lost := self._taken - self._done:
            logger.warning("the request log could not be written to its end: %d lines are lost", lost)
            self._dropped(lost)
        else:
            os.close(self._descriptor)

    def _hand_over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._gathered:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
            self._thread.start()
        self._batches.put(self._gathered)
        self._gathered = []

    # In the thread

    def _write_all(self) -> None:
        while (lines := self._batches.get()) is not None:
            try:
                lost = self._write(_encode_lines(lines))
            except Exception:
                logger.exception("lines of the request log could not be encoded")
                lost = len(lines)
            if lost:
                self._dropped(lost)
            self._done += len(lines)

    def _write(self, data: bytes) -> int:
        """The number of lines that were not written."""
        self._reopen_if_moved()
        written = 0
        try:
            if self._torn:
                os.write(self._descriptor, b"\n")
                self._torn = False
            while written < len(data):
                try:
                    written += os.write(self._descriptor, data[written : written + CHUNK_BYTES])
                except BlockingIOError:  # another process with the same standard output has made it so
                    self._until_writable()
        except OSError as error:
            self._warn_once(error)
            self._torn = self._torn or (written > 0 and data[written - 1] != ord("\n"))
            return data.count(b"\n", written)
        self._failing = False
        return 0

    def _until_writable(self) -> None:
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLOUT)
        waiting.poll()

    def _reopen_if_moved(self) -> None:
        if self._path is None or not (self._reopen or self._was_moved(self._path)):
            return
        self._reopen = False
        try:
            descriptor = _open(self._path)
        except OSError as error:
            self._warn_once(error)
            return
        os.close(self._descriptor)
        self._descriptor, self._torn = descriptor, False

    def _was_moved(self, path: Path) -> bool:
        with contextlib.suppress(OSError):
            return not os.path.samestat(path.stat(), os.fstat(self._descriptor))
        return True

    def _warn_once(self, error: OSError) -> None:
        if not self._failing:
            logger.warning("the request log cannot be written, and its lines are dropped: %s", error)
        self._failing = True


def open_request_log(target: str, dropped: Callable[[int], None]) -> RequestLog | None:
    """target: `-` for standard output, `none`, or a path. Raises `RequestLogError`."""
    if target == NONE:
        return None
    if target == STDOUT:
        if sys.stdout is None:  # it was closed when we were started: its number may be another file's
            return None
        return RequestLog(os.dup(1), None, dropped)
    path = Path(target).expanduser()
    try:
        return RequestLog(_open(path), path, dropped)
    except OSError as error:
        raise RequestLogError(f"cannot write the request log to {path}: {error.strerror}") from error


def _open(path: Path) -> int:
    # A pipe without a reader is an error, and nothing to wait for.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    os.set_blocking(descriptor, True)
    return descriptor
