"""What every request needs, put together once in `app`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gateway.config.settings import GatewaySettings, Live
from gateway.flowcontrol.concurrency import ConcurrencyLimit
from gateway.flowcontrol.engine_state import EngineView
from gateway.flowcontrol.fairqueue import FairQueue
from gateway.flowcontrol.feedback import Feedback
from gateway.learning.accuracy import Accuracy
from gateway.learning.serving import Learning
from gateway.protocol.identify import Roots
from gateway.relay.dispatcher import Dispatcher
from gateway.relay.engine_client import EngineClient
from gateway.relay.responses import Background
from gateway.state import Journal
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.request_span import Observer
from gateway.tenancy.tenants import Tenants
from predictor.types import Predictor


@dataclass(frozen=True, slots=True)
class Parts:
    """bodies, gathered: of requests, and of large answers. suspect: set by who lost a task, so that the watch asks the engine
    at once."""

    queue: FairQueue
    dispatcher: Dispatcher
    engine: EngineView
    client: EngineClient
    tenants: Tenants
    predictor: Predictor
    feedback: Feedback
    journal: Journal
    metrics: Metrics
    observer: Observer
    accuracy: Accuracy
    learning: Learning
    roots: Roots
    bodies: ConcurrencyLimit
    gathered: ConcurrencyLimit
    background: Background
    suspect: asyncio.Event
    live: Live

    @property
    def settings(self) -> GatewaySettings:
        """Those that hold now."""
        return self.live.settings

    def engine_lost_a_task(self) -> None:
        """Nothing is released until the engine has answered again."""
        self.engine.suspect = True
        self.suspect.set()
