"""Other settings while the gateway serves: they are read anew, and take the old ones' place as a whole or not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from gateway.check import Checked
from gateway.config.problems import Wrong
from gateway.config.settings import GatewaySettings, Live
from gateway.flowcontrol import Options
from gateway.flowcontrol.concurrency import ConcurrencyLimit
from gateway.flowcontrol.fairqueue import POLICIES, ReleaseLimits
from gateway.relay.dispatcher import Dispatcher
from gateway.telemetry.logs import set_log_level
from gateway.telemetry.metrics import ReloadOutcome
from gateway.telemetry.request_span import Observer
from gateway.tenancy.keys import KeysError
from gateway.tenancy.tenants import Tenants

logger = logging.getLogger(__name__)

Check = Callable[[], Checked[Any]]


def flow_options(settings: GatewaySettings) -> Options:
    """The part of the settings that flow control follows."""
    return Options(
        limits=ReleaseLimits(beta=settings.beta, engine_waiting=settings.max_engine_waiting),
        max_queue_s=settings.max_queue_s,
        agent_idle_s=settings.agent_idle_s,
        keep_kv=settings.keep_kv,
    )


class Reloader:
    """Reads the settings anew when asked, and puts them in the place of those that hold."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tenants: Tenants,
        bodies: ConcurrencyLimit,
        observer: Observer,
        live: Live,
        begun: Checked[Any],
        check: Check,
    ) -> None:
        """begun: what the gateway was started with. check: reads it anew; it may block."""
        self._dispatcher, self._tenants, self._bodies = dispatcher, tenants, bodies
        self._observer, self._live, self._check = observer, live, check
        self._given: GatewaySettings = begun.settings
        self._asked = False
        self._running: asyncio.Task[None] | None = None

    def ask(self) -> None:
        """Reads the settings soon, and opens the request log's file anew at once. If they are being read already, they are read
        once more, since they may have changed meanwhile."""
        self._observer.reopen()
        self._asked = True
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._asked:
            self._asked = False
            try:
                self._take(await asyncio.to_thread(self._check))
            except Wrong as wrong:
                self._refuse(wrong)
            except Exception:
                logger.exception("the settings could not be read")
                self._observer.metrics.process.reloaded(ReloadOutcome.REFUSED)

    def _take(self, checked: Checked[Any]) -> None:
        """Raises `Wrong`; then nothing has changed."""
        new, old = checked.settings, self._given
        changed = [name for name in type(old).model_fields if getattr(new, name) != getattr(old, name)]
        fixed = [name for name in changed if name not in reloadable(type(old))]
        if fixed:
            why = "cannot change while the gateway serves: it needs a restart"
            raise Wrong(checked.reading.problem((name,), why) for name in fixed)
        try:
            self._tenants.replace(checked.keys, new.tenants)
        except KeysError as error:
            raise Wrong([checked.reading.problem(("keys",), str(error))]) from error
        held = self._live.settings
        self._apply(held, held.model_copy(update={name: getattr(new, name) for name in changed}))
        self._given = new
        self._observer.metrics.process.reloaded(ReloadOutcome.APPLIED)
        logger.info(
            "settings reloaded: %s", ", ".join(_change(name, old, new) for name in changed) or "none has changed"
        )
        for note in checked.notes:
            logger.info("%s", note)

    def _apply(self, old: GatewaySettings, new: GatewaySettings) -> None:
        """What is read when it is needed follows `live`; the rest is set here."""
        self._live.settings = new
        flow = self._dispatcher.flow
        flow.engine.declared_capacity_tokens = new.capacity_tokens
        flow.engine.declared_max_num_seqs = new.max_in_flight
        flow.quotas.max_waiting, flow.quotas.max_waiting_bytes = new.max_waiting, new.max_waiting_bytes
        self._dispatcher.set_limits(self._tenants.limits)
        self._bodies.limit = new.max_held_bytes
        policy = POLICIES[new.policy]() if new.policy != old.policy else None
        self._dispatcher.change(flow_options(new), policy)
        if new.log_level != old.log_level:
            set_log_level(new.log_level)

    def _refuse(self, wrong: Wrong) -> None:
        self._observer.metrics.process.reloaded(ReloadOutcome.REFUSED)
        logger.error("settings not reloaded, nothing has changed:")
        for problem in wrong.problems:
            logger.error("%s", problem)


def reloadable(settings: type[GatewaySettings]) -> set[str]:
    """Names of the settings that can change while the gateway serves."""
    extras = {name: field.json_schema_extra for name, field in settings.model_fields.items()}
    return {name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("reload")}


def _change(name: str, old: GatewaySettings, new: GatewaySettings) -> str:
    before, after = getattr(old, name), getattr(new, name)
    return name if isinstance(after, Mapping) else f"{name} {before} → {after}"
