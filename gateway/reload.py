"""Other settings while the gateway serves: they are read anew, and take the old ones' place as a whole or not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from gateway.check import Checked
from gateway.config.problems import Wrong
from gateway.config.settings import GatewaySettings
from gateway.flowcontrol.fairqueue import POLICIES
from gateway.parts import Parts
from gateway.telemetry.logs import set_log_level
from gateway.telemetry.metrics import ReloadOutcome
from gateway.tenancy.keys import KeysError

logger = logging.getLogger(__name__)

Check = Callable[[], Checked[Any]]


def apply(parts: Parts, old: GatewaySettings, new: GatewaySettings) -> None:
    """Put settings in the place of those that hold. What is looked at when it is needed needs no more than that."""
    parts.live.settings = new
    parts.engine.declared_capacity_tokens = new.capacity_tokens
    parts.engine.declared_max_num_seqs = new.max_in_flight
    parts.tenants.max_waiting, parts.tenants.max_waiting_bytes = new.max_waiting, new.max_waiting_bytes
    parts.bodies.limit_bytes = new.max_held_bytes
    policy = POLICIES[new.policy]() if new.policy != old.policy else None
    parts.dispatcher.change(policy, beta=new.beta, engine_waiting=new.max_engine_waiting)
    if new.log_level != old.log_level:
        set_log_level(new.log_level)


class Reloader:
    """begun: what the gateway was started with. check: reads it anew; it may block."""

    def __init__(self, parts: Parts, begun: Checked[Any], check: Check) -> None:
        self._parts, self._check = parts, check
        self._given: GatewaySettings = begun.settings
        self._asked = False
        self._running: asyncio.Task[None] | None = None

    def ask(self) -> None:
        """Soon; the request log's file is opened anew at once. Who asks while the settings are being read has them read once
        more, since they may have changed meanwhile."""
        self._parts.observer.reopen()
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
                self._parts.metrics.process.reloaded(ReloadOutcome.REFUSED)

    def _take(self, checked: Checked[Any]) -> None:
        """Raises `Wrong`; then nothing has changed."""
        new, old = checked.settings, self._given
        changed = [name for name in type(old).model_fields if getattr(new, name) != getattr(old, name)]
        fixed = [name for name in changed if name not in reloadable(type(old))]
        if fixed:
            why = "cannot change while the gateway serves: it needs a restart"
            raise Wrong(checked.reading.problem((name,), why) for name in fixed)
        try:
            self._parts.tenants.replace(checked.keys, new.tenants)
        except KeysError as error:
            raise Wrong([checked.reading.problem(("keys",), str(error))]) from error
        now = self._parts.settings
        apply(self._parts, now, now.model_copy(update={name: getattr(new, name) for name in changed}))
        self._given = new
        self._parts.metrics.process.reloaded(ReloadOutcome.APPLIED)
        logger.info(
            "settings reloaded: %s", ", ".join(_change(name, old, new) for name in changed) or "none has changed"
        )
        for note in checked.notes:
            logger.info("%s", note)

    def _refuse(self, wrong: Wrong) -> None:
        self._parts.metrics.process.reloaded(ReloadOutcome.REFUSED)
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
