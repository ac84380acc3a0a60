"""The request log: one line of JSON for each request, when it has ended.

The event loop only gathers lines; a thread of its own encodes and writes them, a few milliseconds' worth at a time. So a pipe
that nobody reads, or a disk that is slow, holds up that thread alone: when too many lines wait for it, further ones are
dropped and counted.
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
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue

import msgspec

logger = logging.getLogger(__name__)

STDOUT, NONE = "-", "none"
GATHER_S = 0.005
# Of lines that wait to be written; about 10 MB.
MAX_LINES = 10_000
# For what is left at the end.
CLOSE_S = 2.0
CHUNK_BYTES = 65536

_encode_lines = msgspec.json.Encoder().encode_lines


class RequestLogError(Exception):
    """The log cannot be written where the settings say."""


class Line(msgspec.Struct, kw_only=True, rename={"agent_class": "class"}):
    """One request. Every line has every field; null is what there was not, or what nobody knows.

    time: of its end. status: what the client was answered. Times in milliseconds: in the queue, at the engine, neither of
    both, from arrival to end, and to the first bytes of a stream. Costs are the task's own, in KV token·iterations. retries:
    how often it was sent again because the engine had lost it. error: the gateway's own code; what the engine refuses has
    none.
    """

    time: datetime | None = None
    request_id: str
    trace_id: str | None = None
    endpoint: str
    status: int | None = None
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
    overhead_ms: float | None = None
    total_ms: float | None = None
    first_token_ms: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    predicted_cost: float | None = None
    observed_cost: float | None = None
    finish_tag: float | None = None
    retries: int = 0
    error: str | None = None


class RequestLog:
    """descriptor: of an open file, which is ours from now on. path: whose file it is, if it may be moved away. dropped: told of
    lines that are lost, also from another thread. Call all but that in the event loop."""

    def __init__(self, descriptor: int, path: Path | None, dropped: Callable[[int], None]) -> None:
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
        """Before the next line. Without it, a file that has been moved away is noticed all the same."""
        self._reopen = True

    async def close(self) -> None:
        """Returns when everything is written, or the time for it is over."""
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
        self._look_after_file()
        written = 0
        try:
            if self._torn:
                os.write(self._descriptor, b"\n")
                self._torn = False
            while written < len(data):
                try:
                    written += os.write(self._descriptor, data[written : written + CHUNK_BYTES])
                except BlockingIOError:  # somebody with the same standard output wants it so
                    self._until_writable()
        except OSError as error:
            self._say_failing(error)
            self._torn = self._torn or (written > 0 and data[written - 1] != ord("\n"))
            return data.count(b"\n", written)
        self._failing = False
        return 0

    def _until_writable(self) -> None:
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLOUT)
        waiting.poll()

    def _look_after_file(self) -> None:
        if self._path is None or not (self._reopen or self._was_moved(self._path)):
            return
        self._reopen = False
        try:
            descriptor = _open(self._path)
        except OSError as error:
            self._say_failing(error)
            return
        os.close(self._descriptor)
        self._descriptor, self._torn = descriptor, False

    def _was_moved(self, path: Path) -> bool:
        with contextlib.suppress(OSError):
            return not os.path.samestat(path.stat(), os.fstat(self._descriptor))
        return True

    def _say_failing(self, error: OSError) -> None:
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
