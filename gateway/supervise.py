"""The tasks that run beside the requests: is the engine there, what does it report, which agents have ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus

from engine.link import Ended, GatewayLink, Hello
from gateway.flowcontrol.fairqueue import TaskId
from gateway.parts import Parts
from gateway.protocol.errors import EngineLost
from gateway.relay.engine_client import Health
from gateway.tenancy.keys import Keys, KeysError, stamp_of
from gateway.tenancy.tenants import Tenants

logger = logging.getLogger(__name__)

HEALTH_S = 0.5
METRICS_S = 0.25
SWEEP_S = 1.0
RETRY_S = 2.0
# How soon a key that was added or revoked counts.
KEYS_S = 2.0
# How often the engine is asked what each agent holds, which takes it some milliseconds.
SNAPSHOT_S = 5.0
# Health checks without an answer, one after the other, after which the engine counts as down.
UNSURE_CHECKS = 3
# Seconds that an engine may serve without having said how much memory it has, before that is a warning.
CAPACITY_S = 10.0


async def keep_running(watch: Callable[[], Awaitable[None]]) -> None:
    """A watch that fails says so and starts again: the gateway must not go on blind."""
    while True:
        try:
            await watch()
        except Exception as error:
            logger.error("%s; it starts again in %g s", error or type(error).__name__, RETRY_S, exc_info=True)
        await asyncio.sleep(RETRY_S)


async def watch_health(parts: Parts) -> None:
    """Ask the engine how it is: twice a second, and at once when a task was lost."""
    engine = parts.engine
    unsure, up_since_s, warned = 0, time.monotonic(), False
    while True:
        parts.suspect.clear()
        health = await parts.client.health()
        unsure = unsure + 1 if health is Health.UNSURE else 0
        was_up = engine.up
        if parts.suspect.is_set():
            continue  # a task was lost while we asked: the answer may be older than the loss
        if health is Health.UP:
            engine.answered()
        elif health is Health.DOWN or unsure >= UNSURE_CHECKS:
            engine.lost()
        if engine.up != was_up:
            logger.info("the engine is %s", "up" if engine.up else "down")
            up_since_s, warned = time.monotonic(), False
        if engine.up and not engine.capacity_tokens and not warned and time.monotonic() - up_since_s > CAPACITY_S:
            logger.warning(
                "the engine has not said how much KV cache it has; few tasks are released (--capacity-tokens)"
            )
            warned = True
        was_reporting = engine.reporting
        engine.silent(time.monotonic())
        if was_reporting and not engine.reporting:
            logger.warning("the engine's reports have ceased: its clock stands still for us")
        parts.dispatcher.engine_changed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEALTH_S):
                await parts.suspect.wait()


async def follow_link(parts: Parts, address: str) -> None:
    """Hear what the engine's scheduler reports. Raises `LinkError`."""
    link = GatewayLink(address)
    lost, asked_s = 0, 0.0
    try:
        async for message in link.messages():
            if isinstance(message, Ended):
                parts.engine.hear(message, time.monotonic())
                for task in message.costs.keys() & parts.feedback.awaited.keys():
                    parts.feedback.held(TaskId(task), parts.engine.held_by(task) or 0.0)
                continue
            with _hearing(parts):
                parts.engine.hear(message, time.monotonic())
            if isinstance(message, Hello):
                parts.dispatcher.tell = link.change
                continue
            parts.metrics.engine.link_reported()
            if time.monotonic() >= asked_s + SNAPSHOT_S:
                link.ask_for_snapshot()
                asked_s = time.monotonic()
            if link.resent + link.dropped > lost:
                parts.metrics.engine.link_lost(link.resent + link.dropped - lost)
                lost = link.resent + link.dropped
    finally:
        parts.dispatcher.tell = None
        link.close()


async def poll_metrics(parts: Parts) -> None:
    """A stock engine has no link: read its `/metrics`. Raises `ValueError` for what is not vLLM's."""
    while True:
        with contextlib.suppress(EngineLost, TimeoutError):
            status, exposition = await parts.client.read("/metrics")
            if status == HTTPStatus.OK:
                with _hearing(parts):
                    parts.engine.read_metrics(exposition.decode("utf-8", "replace"), time.monotonic())
        await asyncio.sleep(METRICS_S)


async def sweep_agents(parts: Parts) -> None:
    while True:
        await asyncio.sleep(min(SWEEP_S, parts.settings.agent_idle_s / 4))
        parts.feedback.sweep(parts.settings.agent_idle_s)


async def watch_keys(tenants: Tenants) -> None:
    """A file of keys that has changed counts from now on; one that cannot be used is refused, and the old keys stay."""
    refused = None
    while True:
        await asyncio.sleep(KEYS_S)
        keys = tenants.keys
        if (path := keys.path) is None:
            continue
        now = path, stamp_of(path)
        if now in (refused, (path, keys.stamp)):
            continue
        try:
            new = await asyncio.to_thread(Keys.load, path)
            if tenants.keys is keys:  # else a reload has come between
                tenants.replace(new, tenants.settings)
                logger.info("the keys have changed: %d, of %d tenants", len(list(new)), len(new.tenants))
        except KeysError as error:
            refused = now
            logger.error("the keys that there were still count: %s", error)


@contextlib.contextmanager
def _hearing(parts: Parts) -> Iterator[None]:
    """The engine's view is changed in here; then the dispatcher looks at it. Not if it raises."""
    yield
    parts.dispatcher.engine_spoke()
