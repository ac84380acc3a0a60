"""The gateway as a process: uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn

from gateway.app import Gateway, create_app
from gateway.check import Checked
from gateway.config.settings import GatewaySettings
from gateway.http import uvicorn_facts
from gateway.http.client_connection import ClientConnection
from gateway.http.connections import ConnectionLimits, Connections
from gateway.reload import Check, Reloader
from gateway.supervise import keep_running

logger = logging.getLogger(__name__)

# As many as connect in one burst; the kernel takes the smaller of this and net.core.somaxconn.
BACKLOG = 4096
# Open files that are not clients' connections: those to the engine, the state, what is imported.
OWN_FILES = 1024
# Seconds for answers to leave after the drain.
LEAVE_S = 2
POLL_S = 0.05


class GatewayServer(uvicorn.Server):
    """On SIGTERM or SIGINT: takes nothing new, serves what it has accepted within a limit, hands back the rest, then ends."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections
        self._app: Gateway = config.app  # type: ignore[assignment]  # the one that we made
        self._cut_off = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the process that we are a part of: uvicorn would raise them again and end it."""
        yield

    def stop(self) -> None:
        """Begin to end, at once: uvicorn looks at its flag now and then only."""
        self.should_exit = True
        self._app.dispatcher.begin_drain(self._app.live.settings.drain_s)
        self._connections.drain()

    def cut_off(self) -> None:
        """Do not wait for what is left."""
        self._cut_off.set()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        sweeping = asyncio.create_task(keep_running(self._connections.watch))
        try:
            await super().serve(sockets)
        finally:
            sweeping.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        dispatcher = self._app.dispatcher
        queue = dispatcher.flow.queue
        logger.info("shutting down: %d waiting, %d in flight", queue.waiting, queue.in_flight)
        cut_off = asyncio.create_task(self._cut_off.wait())
        await self._drained_or(cut_off, self._app.live.settings.drain_s)
        cut_off.cancel()
        if queue.waiting:
            logger.warning("%d tasks that wait are handed back", queue.waiting)
        if queue.in_flight:
            logger.warning("%d tasks in flight are cut off", queue.in_flight)
        dispatcher.end_drain()
        await self._drained_or(None, LEAVE_S)
        self._connections.abandon()
        await super().shutdown(sockets)

    async def _drained_or(self, cut_off: asyncio.Task[bool] | None, limit_s: float) -> None:
        """Until what was accepted has been served and the answers have left; or at most so long."""
        drained = asyncio.create_task(self._drained())
        either = (drained,) if cut_off is None else (drained, cut_off)
        await asyncio.wait(either, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()

    async def _drained(self) -> None:
        await self._app.dispatcher.drained()
        while self._connections.answering:  # noqa: ASYNC110  # a buffer has no event for it
            await asyncio.sleep(POLL_S)


class PortTaken(Exception):
    """The address cannot be listened on."""


class RunningGateway:
    """A gateway that listens at `url`; `served` ends when it has stopped."""

    def __init__(self, server: GatewayServer, url: str, served: asyncio.Task[None]) -> None:
        self.url = url
        self.app: Gateway = server.config.app  # type: ignore[assignment]  # the one that we made
        self.served = served
        self._server = server

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT stop the gateway; the second one does not wait for what is left."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop_soon)

    def reload_on_hangup(self, begun: Checked[Any], check: Check) -> None:
        """SIGHUP has the settings read anew. Where it means that our terminal is gone, it stops the gateway."""
        app = self.app
        reloader = Reloader(app.dispatcher, app.tenants, app.bodies, app.observer, app.live, begun, check)
        ours = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()  # it is ignored under nohup

        def hung_up() -> None:
            if ours and not _has_terminal():
                self._stop_soon()
            else:
                reloader.ask()

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up)

    async def engine_is_seen(self) -> None:
        """Until the gateway knows that its engine serves: from then on it takes tasks."""
        self.app.dispatcher.engine_in_doubt.set()  # it looks at once
        while not self.app.flow.engine.up:  # noqa: ASYNC110  # only `justitia serve` waits here
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """Returns when it has stopped."""
        self._server.stop()
        await self.served

    def cut_off(self) -> None:
        """Nothing more will be served: do not wait for it."""
        self._server.cut_off()

    def _stop_soon(self) -> None:
        if self._server.should_exit:
            self._server.cut_off()
        self._server.stop()


async def start_gateway(settings: GatewaySettings) -> RunningGateway:
    """Listen at once. Tasks are served from the moment that the engine answers. Raises `PortTaken`, `UvicornDoesNotFit`, and
    what `create_app` raises."""
    uvicorn_facts.check()
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
    limits = ConnectionLimits(open_files_for(settings.max_connections), settings.keep_alive_s, settings.client_stall_s)
    metrics = app.metrics
    connections = Connections(limits, metrics.connections.cut_off)
    metrics.connections.reads(connections)
    config = uvicorn.Config(
        app,
        http=partial(ClientConnection, connections),  # type: ignore[arg-type]  # called like a class
        ws="none",
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LEAVE_S,
    )
    server = GatewayServer(config, connections)
    url = f"http://{settings.host}:{listening.getsockname()[1]}"
    served = asyncio.create_task(server.serve([listening]))
    return RunningGateway(server, url, served)


def open_files_for(connections: int) -> int:
    """Raise the limit of open files as far as we may. Returns how many connections there can be, at most `connections`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max(soft, connections + OWN_FILES) if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    possible = max(files - OWN_FILES, files // 2)
    if possible < connections:
        logger.warning(
            "at most %d connections, not %d: the limit of open files is %d (ulimit -n)", possible, connections, files
        )
    return min(connections, possible)


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
