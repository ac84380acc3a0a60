"""What a start finds in the state store: finished agents to learn from, live agents to put back, and today's use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

from gateway.flowcontrol.quotas import DAY_S
from gateway.flowcontrol.records import HOUR_S, Step
from gateway.learning.outcomes import Outcomes
from gateway.relay.dispatcher import Dispatcher, now
from gateway.state import Journal

logger = logging.getLogger(__name__)

# Agents that are learned from again at a start: as many as the ladder can make something of.
RECALLED = 2000
# Agents that are learned from in a row: then other tasks of the event loop get a turn.
IN_A_ROW = 50


class Restart:
    """Reads the store at a start, or as soon as it can be read; and writes live agents anew to one that has lost them."""

    def __init__(self, dispatcher: Dispatcher, journal: Journal, outcomes: Outcomes) -> None:
        self._dispatcher, self._journal, self._outcomes = dispatcher, journal, outcomes

    async def recall(self) -> None:
        """Raises `StateError`."""
        store, now_s = self._journal.store, int(time.time())
        used = await store.usage(now_s - now_s % DAY_S, now_s + HOUR_S)
        agents, living = await store.newest(RECALLED), await store.agents()
        for number, agent in enumerate(agents):
            self._outcomes.learn(agent)
            if number % IN_A_ROW == IN_A_ROW - 1:
                await asyncio.sleep(0)
        logger.info("learned from %d agents that the state store had kept", len(agents))
        ours = [record for record in living if record.journal not in self._journal.live_journals]
        newest = {record.id: record.run for record in sorted(ours, key=lambda record: record.last_end_at)}
        for record in sorted(ours, key=lambda record: record.arrived_at):
            why, effects = self._dispatcher.flow.restore(now(), record, newest=newest[record.id] == record.run)
            if why is not None:
                logger.info("agent %r is not put back, and has ended: %s", record.id, why)
            self._dispatcher.apply(effects)
        logger.info("put %d agents back that had not ended", len(ours))
        self._dispatcher.flow.restore_use(now(), used)

    def rewrite(self) -> Iterator[Step]:
        """The steps of the agents that live. Others may be served between two of them."""
        flow = self._dispatcher.flow
        for agent in list(flow.agents):
            yield from flow.lives.rewrite(agent)
