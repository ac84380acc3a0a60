"""What every request needs, put together once in `app`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gateway.accuracy import Accuracy
from gateway.background import Background
from gateway.capacity import EngineView
from gateway.engine_client import EngineClient
from gateway.fairness import FairQueue
from gateway.feedback import Feedback
from gateway.identify import Roots
from gateway.intake import BodyBudget
from gateway.learning.serving import Learning
from gateway.metrics import Metrics
from gateway.observer import Observer
from gateway.release import Dispatcher
from gateway.settings import GatewaySettings, Live
from gateway.state import Journal
from gateway.tenants import Tenants
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
    bodies: BodyBudget
    gathered: BodyBudget
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
