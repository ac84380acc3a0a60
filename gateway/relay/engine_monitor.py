"""What the gateway watches of its engine: is it up, and what does it report, over the link or in its `/metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from http import HTTPStatus

from engine.link import Ended, GatewayLink, Hello, Message
from gateway.flowcontrol.engine_state import EngineState
from gateway.protocol.errors import EngineLost
from gateway.relay.dispatcher import Dispatcher, now
from gateway.relay.engine_client import EngineClient, Health
from gateway.relay.stock_metrics import StockMetrics
from gateway.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

HEALTH_S = 0.5
METRICS_S = 0.25
# How often the engine is asked what each agent holds, which takes it some milliseconds.
SNAPSHOT_S = 5.0
# Health checks without an answer, one after the other, after which the engine counts as down.
UNSURE_CHECKS = 3
# Seconds that an engine may serve without having reported how much memory it has, before that is a warning.
CAPACITY_S = 10.0


class EngineMonitor:
    """Feeds flow control with what the engine reports."""

    def __init__(self, dispatcher: Dispatcher, client: EngineClient, metrics: Metrics) -> None:
        self._dispatcher, self._client, self._metrics = dispatcher, client, metrics

    @property
    def _engine(self) -> EngineState:
        return self._dispatcher.flow.engine

    async def watch_health(self) -> None:
        """Checks the engine twice a second, and at once when a task was lost."""
        engine, flow, in_doubt = self._engine, self._dispatcher.flow, self._dispatcher.engine_in_doubt
        unsure, up_since_s, warned = 0, time.monotonic(), False
        while True:
            in_doubt.clear()
            health = await self._client.health()
            unsure = unsure + 1 if health is Health.UNSURE else 0
            was_up, was_reporting = engine.up, engine.reporting
            if in_doubt.is_set():
                continue  # a task was lost meanwhile: the answer may be older than the loss
            if health is Health.UP:
                flow.engine_checked(now(), is_up=True)
            elif health is Health.DOWN or unsure >= UNSURE_CHECKS:
                flow.engine_checked(now(), is_up=False)
            else:
                flow.engine_checked(now(), is_up=None)
            if engine.up != was_up:
                logger.info("the engine is %s", "up" if engine.up else "down")
                up_since_s, warned = time.monotonic(), False
            if engine.up and not engine.capacity_tokens and not warned and time.monotonic() - up_since_s > CAPACITY_S:
                logger.warning(
                    "the engine has not reported the size of its KV cache: few tasks are released (--capacity-tokens)"
                )
                warned = True
            if was_reporting and not engine.reporting and engine.up:
                logger.warning("no engine report for 5 s: releasing by predicted memory only")
            self._dispatcher.pump()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_S):
                    await in_doubt.wait()

    async def follow_link(self, address: str) -> None:
        """Takes the reports of the engine's scheduler. Raises `LinkError`."""
        link = GatewayLink(address)
        lost, asked_s = 0, 0.0
        try:
            async for message in link.messages():
                if isinstance(message, Hello):
                    self._dispatcher.link = link.change
                self._take(message, linked=True)
                if isinstance(message, Ended | Hello):
                    continue
                self._metrics.engine.link_reported()
                if time.monotonic() >= asked_s + SNAPSHOT_S:
                    link.ask_for_snapshot()
                    asked_s = time.monotonic()
                if link.resent + link.dropped > lost:
                    self._metrics.engine.link_lost(link.resent + link.dropped - lost)
                    lost = link.resent + link.dropped
        finally:
            self._dispatcher.link = None
            self._dispatcher.flow.link_closed()
            link.close()

    async def poll_metrics(self) -> None:
        """A stock engine has no link: its `/metrics` are read. Raises `ValueError` for what is not vLLM's."""
        stock = StockMetrics()
        while True:
            with contextlib.suppress(EngineLost, TimeoutError):
                status, exposition = await self._client.read("/metrics")
                if status == HTTPStatus.OK:
                    for message in stock.messages(exposition.decode("utf-8", "replace")):
                        self._take(message, linked=False)
            await asyncio.sleep(METRICS_S)

    def _take(self, message: Message, *, linked: bool) -> None:
        effects = self._dispatcher.flow.engine_reports(now(), message, linked=linked)
        self._dispatcher.apply(effects)
        if not isinstance(message, Ended):
            self._dispatcher.pump()
