"""The gateway as a process: uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from gateway.app import create_app
from gateway.check import Checked
from gateway.parts import Parts
from gateway.reload import Check, Reloader
from gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

BACKLOG = 2048


class GatewayServer(uvicorn.Server):
    """On SIGTERM or SIGINT: takes nothing new, hands back what waits, gives what is in flight its time, then ends."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._cut_off = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the process that we are a part of: uvicorn would raise them again and end it."""
        yield

    def cut_off(self) -> None:
        """Do not wait for what is in flight."""
        self._cut_off.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        parts: Parts = self.config.app.state.parts  # type: ignore[union-attr]  # the FastAPI app that we made
        dispatcher = parts.dispatcher
        logger.info("shutting down: %d waiting, %d in flight", dispatcher.queue.waiting, dispatcher.queue.in_flight)
        drained = asyncio.create_task(dispatcher.drain(parts.settings.drain_s))
        cut_off = asyncio.create_task(self._cut_off.wait())
        await asyncio.wait((drained, cut_off), return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        cut_off.cancel()
        if dispatcher.queue.in_flight:
            logger.warning("%d tasks in flight are cut off", dispatcher.queue.in_flight)
        await super().shutdown(sockets)


class PortTaken(Exception):
    """The address cannot be listened on."""


class RunningGateway:
    """A gateway that listens at `url`; `served` ends when it has stopped."""

    def __init__(self, server: GatewayServer, url: str, served: asyncio.Task[None]) -> None:
        self.url = url
        self.parts: Parts = server.config.app.state.parts  # type: ignore[union-attr]  # the FastAPI app that we made
        self.served = served
        self._server = server

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT stop the gateway; the second one does not wait for what is in flight."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop_soon)

    def reload_on_hangup(self, begun: Checked[Any], check: Check) -> None:
        """SIGHUP has the settings read anew. Where it says that our terminal is gone, it stops the gateway."""
        reloader = Reloader(self.parts, begun, check)
        ours = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()  # it is ignored under nohup

        def hung_up() -> None:
            if ours and not _has_terminal():
                self._stop_soon()
            else:
                reloader.ask()

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up)

    async def stop(self) -> None:
        """Returns when it has stopped."""
        self._server.should_exit = True
        await self.served

    def _stop_soon(self) -> None:
        if self._server.should_exit:
            self._server.cut_off()
        self._server.should_exit = True


async def start_gateway(settings: GatewaySettings) -> RunningGateway:
    """Listen at once. Tasks are served from the moment that the engine answers. Raises `PortTaken`, and what
    `create_app` raises."""
    try:
        listening = socket.create_server((settings.host, settings.port), backlog=BACKLOG)
    except OSError as error:
        raise PortTaken(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
    # Handed down to connections. uvloop sees to it too; asyncio's own loop does not, and answers would wait 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        app = await create_app(settings)
    except Exception:
        listening.close()
        raise
    _collect_seldom()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=75,
    )
    server = GatewayServer(config)
    url = f"http://{settings.host}:{listening.getsockname()[1]}"
    served = asyncio.create_task(server.serve([listening]))
    return RunningGateway(server, url, served)


def _collect_seldom() -> None:
    """Python's cyclic collector would look at everything that lives, several times a second under load. What is here now stays,
    and requests leave hardly a cycle behind."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)


def _has_terminal() -> bool:
    """Whether there is a terminal that this process belongs to."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
