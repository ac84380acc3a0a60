"""The tasks that run beside the requests: is the engine there, what does it report, which agents have ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from engine.link import LinkError, LinkSubscriber, Report
from gateway.engine_client import EngineUnreachable
from gateway.relay import Parts

logger = logging.getLogger(__name__)

HEALTH_S = 0.5
METRICS_S = 0.25
SWEEP_S = 1.0


async def watch_health(parts: Parts) -> None:
    """Ask the engine how it is: twice a second, and at once when a task was lost."""
    while True:
        parts.suspect.clear()
        healthy = await parts.client.is_healthy()
        if healthy != parts.engine.up:
            logger.info("the engine is %s", "up" if healthy else "down")
        if healthy:
            parts.engine.answered()
        else:
            parts.engine.lost()
        parts.engine.silent(time.monotonic())
        parts.dispatcher.engine_changed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEALTH_S):
                await parts.suspect.wait()


async def follow_link(parts: Parts, address: str) -> None:
    """Hear what the engine's scheduler reports."""
    link = LinkSubscriber(address)
    try:
        async for message in link.messages():
            if isinstance(message, Report):
                parts.metrics.link_reported()
            _heard(parts, lambda message=message: parts.engine.hear(message, time.monotonic()))  # type: ignore[misc]
    except LinkError as error:
        logger.error("the link is closed, and the engine's reports are not heard: %s", error)
        parts.engine.reporting = False
    finally:
        link.close()


async def poll_metrics(parts: Parts) -> None:
    """A stock engine has no link: read its `/metrics`."""
    while True:
        with contextlib.suppress(EngineUnreachable):
            exposition = (await parts.client.get("/metrics")).text
            _heard(parts, lambda exposition=exposition: parts.engine.read_metrics(exposition, time.monotonic()))  # type: ignore[misc]
        await asyncio.sleep(METRICS_S)


async def sweep_agents(parts: Parts, idle_s: float) -> None:
    while True:
        await asyncio.sleep(min(SWEEP_S, idle_s / 4))
        parts.feedback.sweep(idle_s)


def _heard(parts: Parts, take: Callable[[], None]) -> None:
    engine = parts.engine
    preempted, restarts = engine.preempted, engine.restarts
    take()
    if engine.preempted > preempted:
        parts.metrics.preempted(engine.preempted - preempted)
    if engine.restarts > restarts:
        parts.metrics.engine_restarted()
    parts.dispatcher.engine_changed()
