"""The loops that run beside the requests: they are started again when they fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from gateway.config.settings import Live
from gateway.relay.dispatcher import Dispatcher
from gateway.tenancy.keys import Keys, KeysError, stamp_of
from gateway.tenancy.tenants import Tenants

logger = logging.getLogger(__name__)

SWEEP_S = 1.0
RETRY_S = 2.0
# How soon a key that was added or revoked counts.
KEYS_S = 2.0


async def keep_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Logs the error of a loop that fails, and starts it again: the gateway must not go on blind."""
    while True:
        try:
            await loop()
        except Exception as error:
            logger.error("%s; it starts again in %g s", str(error) or type(error).__name__, RETRY_S, exc_info=True)
        await asyncio.sleep(RETRY_S)


async def sweep_agents(dispatcher: Dispatcher, live: Live) -> None:
    """Ends the agents that have been idle for too long."""
    while True:
        await asyncio.sleep(min(SWEEP_S, live.settings.agent_idle_s / 4))
        dispatcher.sweep()


async def watch_keys(tenants: Tenants, dispatcher: Dispatcher) -> None:
    """A file of keys that has changed counts from now on; one that cannot be used is refused, and the old keys stay."""
    refused = None
    while True:
        await asyncio.sleep(KEYS_S)
        keys = tenants.keys
        if (path := keys.path) is None:
            continue
        stamp = path, stamp_of(path)
        if stamp in (refused, (path, keys.stamp)):
            continue
        try:
            new = await asyncio.to_thread(Keys.load, path)
            if tenants.keys is keys:  # else a reload has come between
                tenants.replace(new, tenants.settings)
                dispatcher.set_limits(tenants.limits)
                logger.info("the keys have changed: %d, of %d tenants", len(list(new)), len(new.tenants))
        except KeysError as error:
            refused = stamp
            logger.error("the keys have not changed: %s", error)
