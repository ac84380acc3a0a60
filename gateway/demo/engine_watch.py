"""Listens to the engine's reports during a run: was it really the memory that was short?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from engine.link import GatewayLink, Hello, Message, Report
from gateway.demo.report import EngineFigures


class EngineWatch:
    """What the engine reported since the watch began.

    outstanding: how many tasks have been sent and have not ended; those that do not run are waiting.
    """

    def __init__(self, outstanding: Callable[[], int] = lambda: 0) -> None:
        self.outstanding = outstanding
        self._total_blocks = 0
        self._first: Report | None = None
        self._last: Report | None = None
        self._waiting_iterations = 0
        self._usage = self._running = 0.0

    def receive(self, message: Message) -> None:
        if isinstance(message, Hello):
            self._total_blocks = message.total_blocks
        if not isinstance(message, Report):
            return
        # A report stands for the iterations since the one before: under load the engine drops some.
        iterations = message.iteration - self._last.iteration if self._last is not None else 0
        if self._total_blocks and message.running and self.outstanding() > message.running:
            self._waiting_iterations += iterations
            self._usage += iterations * self._held(message)
            self._running += iterations * message.running
        self._first = self._first or message
        self._last = message

    def describe(self) -> str:
        """The engine's last report, in a line."""
        if self._last is None or not self._last.running or not self._total_blocks:
            return ""
        return f"KV cache {self._held(self._last):.0%}, {self._last.running} running"

    def figures(self) -> EngineFigures | None:
        """None when nothing was received. The means are NaN when no task ever waited."""
        if self._first is None or self._last is None:
            return None
        waiting = self._waiting_iterations
        iterations = self._last.iteration - self._first.iteration
        return EngineFigures(
            preemptions=self._last.preempted - self._first.preempted,
            iterations=iterations,
            mean_kv_usage=self._usage / waiting if waiting else float("nan"),
            mean_running=self._running / waiting if waiting else float("nan"),
            waiting_share=waiting / iterations if iterations else 0.0,
        )

    def _held(self, report: Report) -> float:
        return 1 - report.free_blocks / self._total_blocks


@contextlib.asynccontextmanager
async def watching(address: str) -> AsyncIterator[EngineWatch]:
    """A watch on the engine's link while the body runs. Raises `LinkError` for an engine of another protocol."""
    watch, link = EngineWatch(), GatewayLink(address)

    async def listen() -> None:
        async for message in link.messages():
            watch.receive(message)

    listening = asyncio.create_task(listen())
    try:
        yield watch
    finally:
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        link.close()
