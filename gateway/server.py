"""The gateway as a process: uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import resource
import signal
import socket
from collections.abc import Iterator

import uvicorn

from gateway.app import create_app
from gateway.parts import Parts
from gateway.protocol import ConnectionLimits, Connections
from gateway.release import Dispatcher
from gateway.settings import GatewaySettings
from gateway.watch import keep_running

logger = logging.getLogger(__name__)

# As many as connect in one burst; the kernel takes the smaller of this and net.core.somaxconn.
BACKLOG = 4096
# Open files that are not clients' connections: those to the engine, the state, what is imported.
OWN_FILES = 1024
# Seconds for answers to leave after the drain, and for their tasks to end.
LEAVE_S = 2
POLL_S = 0.05


class GatewayServer(uvicorn.Server):
    """On SIGTERM or SIGINT: takes nothing new, serves what it has accepted within a limit, hands back the rest, then ends."""

    def __init__(self, config: uvicorn.Config, connections: Connections, drain_s: float) -> None:
        super().__init__(config)
        self._connections = connections
        self._drain_s = drain_s
        self._dispatcher: Dispatcher = config.app.state.parts.dispatcher  # type: ignore[union-attr]  # the app that we made
        self._cut_off = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the process that we are a part of: uvicorn would raise them again and end it."""
        yield

    def stop(self) -> None:
        """Begin to end, at once: uvicorn looks at its flag now and then only."""
        self.should_exit = True
        self._dispatcher.begin_drain(self._drain_s)
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
        queue = self._dispatcher.queue
        logger.info("shutting down: %d waiting, %d in flight", queue.waiting, queue.in_flight)
        drained = asyncio.create_task(self._drained())
        cut_off = asyncio.create_task(self._cut_off.wait())
        await asyncio.wait((drained, cut_off), timeout=self._drain_s, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        cut_off.cancel()
        if queue.waiting:
            logger.warning("%d tasks that wait are handed back", queue.waiting)
        if queue.in_flight:
            logger.warning("%d tasks in flight are cut off", queue.in_flight)
        self._dispatcher.end_drain()
        await super().shutdown(sockets)

    async def _drained(self) -> None:
        """Until what was accepted has been served, and the answers have left."""
        await self._dispatcher.drained()
        while self._connections.answering:  # noqa: ASYNC110  # a buffer tells nobody that it is empty
            await asyncio.sleep(POLL_S)


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
        """SIGTERM and SIGINT stop the gateway; the second one does not wait for what is left."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop_soon)

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
    """Listen at once. Tasks are served from the moment that the engine answers. Raises `PortTaken`."""
    try:
        listening = socket.create_server((settings.host, settings.port), backlog=BACKLOG)
    except OSError as error:
        raise PortTaken(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
    app = await create_app(settings)
    metrics = app.state.parts.metrics
    limits = ConnectionLimits(open_files_for(settings.max_connections), settings.keep_alive_s, settings.client_stall_s)
    connections = Connections(limits, metrics.connection_cut_off)
    metrics.count_connections(lambda: len(connections))
    config = uvicorn.Config(
        app,
        http=connections.protocol,  # type: ignore[arg-type]  # called like a class
        ws="none",
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LEAVE_S,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
    )
    server = GatewayServer(config, connections, settings.drain_s)
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
