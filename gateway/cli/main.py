"""The command `justitia`. Settings are in `settings`; here they meet the terminal."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from collections.abc import Callable, Coroutine
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from rich.console import Console

from engine.lab import tiny_model
from engine.launcher import EngineFailed, EngineProcess, EngineSpec, EngineState
from gateway.check import Checked, check, run_check
from gateway.cli.keys import run_keys
from gateway.cli.predictor import ExportSettings, run_export, run_predictor
from gateway.config.settings import GatewaySettings, ServeSettings, cache_home
from gateway.config.sources import load, or_exit
from gateway.demo.settings import DemoSettings
from gateway.extras import missing
from gateway.http.uvicorn_facts import UvicornDoesNotFit
from gateway.reload import Check
from gateway.server import PortTaken, RunningGateway, start_gateway
from gateway.telemetry.logs import LoggedText, set_up_logs
from gateway.telemetry.request_log import RequestLogError
from gateway.telemetry.request_span import NoOpenTelemetry
from gateway.tenancy.keys import KeysError

USAGE = """\
usage: justitia COMMAND [OPTIONS]

  serve      the gateway and its own vLLM engine, on this machine
  gateway    the gateway alone, before an engine that is already there (--engine URL)
  check      what is wrong with the settings, and where
  demo       a mix of agents before a real engine, once as fcfs and once as justitia, and what changed
  replay     agents through any policy and vLLM's own scheduler on a virtual clock: no GPU, no waiting
  predictor  the models that say what agents will cost: list, show, promote, rollback, train, evaluate
  keys       who may come in, as which tenant: add, list, revoke
  export     the agents that a gateway has served, as a trace for replay
  version    print the version

`justitia COMMAND --help` lists the options. Each can also be set as JUSTITIA_NAME in the environment, or in a file (--config).
"""

STOP_GRACE_S = 20.0

Settings = TypeVar("Settings", bound=GatewaySettings)
# What keeps a gateway from starting, and is reported in one line.
CANNOT_START = (PortTaken, KeysError, RequestLogError, NoOpenTelemetry, UvicornDoesNotFit)

console = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    commands: dict[str, Callable[[list[str]], int]] = {
        "serve": lambda arguments: _run(_serve(*_checked(ServeSettings, arguments, "justitia serve"))),
        "gateway": lambda arguments: _run(_gateway(*_checked(GatewaySettings, arguments, "justitia gateway"))),
        "check": run_check,
        "demo": _demo,
        "replay": _replay,
        "predictor": run_predictor,
        "keys": run_keys,
        "export": _export,
        "version": lambda arguments: print(distribution_version("justitia")) or 0,
    }
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif command in ("-V", "--version"):
        sys.exit(commands["version"]([]))
    elif command not in commands:
        print(f"justitia: no command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        sys.exit(2)
    else:
        try:
            sys.exit(commands[command](arguments))
        except ModuleNotFoundError as error:
            if (needs := missing(error)) is None:
                raise
            print(f"justitia {command} {needs}", file=sys.stderr)
            sys.exit(2)


def _checked(settings: type[Settings], arguments: list[str], program: str) -> tuple[Checked[Settings], Check]:
    """Settings that are right, and how to read them again; logs are now as they say. Exits with 2 if they are wrong."""
    begun = or_exit(lambda: check(settings, arguments, program=program))
    _set_up_logs(begun.settings)
    if begun.reading.found:
        console.print(f"{program}: settings from {begun.reading.file}", markup=False)
    for note in begun.notes:
        console.print(f"{program}: {note}", markup=False)
    return begun, lambda: check(settings, arguments, program=program, file=begun.reading.file)


def _demo(arguments: list[str]) -> int:
    settings = load(DemoSettings, arguments, program="justitia demo")
    from gateway.demo.demo import run_demo  # its clients need what a gateway does not

    return _run(run_demo(settings))


def _replay(arguments: list[str]) -> int:
    from gateway.replay.command import ReplaySettings, run_replay

    return run_replay(load(ReplaySettings, arguments, program="justitia replay"))


def _export(arguments: list[str]) -> int:
    return _run(run_export(load(ExportSettings, arguments, program="justitia export")))


def _run(command: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(command)
        except KeyboardInterrupt:
            return 130


async def _gateway(begun: Checked[GatewaySettings], check_again: Check) -> int:
    settings = begun.settings
    if not settings.engine:
        console.print("justitia gateway: --engine is needed: http://host:port, or unix:/path/to/socket")
        return 2
    try:
        gateway = await start_gateway(settings)
    except CANNOT_START as error:
        console.print(f"justitia gateway: {error}", markup=False)
        return 1
    gateway.stop_on_signals()
    gateway.reload_on_hangup(begun, check_again)
    console.print(f"justitia listens on {gateway.url}, in front of {settings.engine}")
    await gateway.served
    return 0


async def _serve(begun: Checked[ServeSettings], check_again: Check) -> int:
    """The gateway listens at once, and answers 503 until the engine is there. It goes first at the end, the engine after it."""
    settings = begun.settings
    with tempfile.TemporaryDirectory(prefix="justitia-") as temporary:
        model = settings.model
        if model == "tiny":
            console.print("making the tiny model …")
            model = str(await asyncio.to_thread(tiny_model.make, cache_home() / "tiny-model"))
        try:
            spec = EngineSpec(
                model=model,
                runtime_dir=settings.runtime_dir or Path(temporary),
                kv_blocks=settings.kv_blocks,
                max_num_seqs=settings.max_num_seqs,
                max_model_len=settings.max_model_len,
                scheduler=settings.engine_scheduler,
                displace_margin=settings.displace_margin,
                extra_args=_engine_args(settings),
            )
        except ValueError as error:
            console.print(f"justitia serve: {error}")
            return 2
        link = spec.link_address if settings.engine_scheduler == "justitia" else None
        try:
            gateway = await start_gateway(settings.model_copy(update={"engine": spec.url, "link": link}))
        except CANNOT_START as error:
            console.print(f"justitia serve: {error}", markup=False)
            return 1
        gateway.stop_on_signals()
        gateway.reload_on_hangup(begun, check_again)
        logging.getLogger("engine.launcher").setLevel(logging.WARNING)  # said on the console
        engine = EngineProcess(spec, _say_state)
        running: list[asyncio.Task[None]] = []
        try:
            await engine.start()
            running = [asyncio.create_task(engine.run()), gateway.served]
            ready = asyncio.create_task(_say_ready(engine, gateway, settings))
            await asyncio.wait((*running, ready), return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and ready.exception() is None:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
        except EngineFailed as failure:
            console.print(f"the engine cannot be started: {failure}", markup=False)
            return 1
        finally:
            if running and running[0].done():
                gateway.cut_off()  # there is nobody left to serve what waits
            await gateway.stop()
            console.print("stopping the engine …")
            await engine.stop(STOP_GRACE_S)
            console.print("stopped")
        try:
            await asyncio.gather(running[0], ready)
        except EngineFailed as failure:
            console.print(f"the engine failed: {failure}", markup=False)
            return 1
        except asyncio.CancelledError:  # it was not ready yet
            pass
        return 0


def _set_up_logs(settings: GatewaySettings) -> None:
    set_up_logs(settings.log_level, settings.log_format)
    if settings.log_format == "json":
        console.file = LoggedText(logging.getLogger("justitia"))


def _engine_args(settings: ServeSettings) -> tuple[str, ...]:
    """The engine knows the model by the name that the user gave."""
    return ("--served-model-name", settings.model, *settings.engine_args)


def _say_state(state: EngineState, detail: str) -> None:
    console.print(f"engine {state}: {detail}")


async def _say_ready(engine: EngineProcess, gateway: RunningGateway, settings: ServeSettings) -> None:
    await engine.wait_ready(settings.engine_start_s)
    await gateway.engine_is_seen()
    url = gateway.url
    console.print(
        f"""
[bold green]ready[/] at [bold]{url}[/] with the model {settings.model!r}, policy {settings.policy}. Try it:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -H 'X-Agent-ID: my-agent' \\
    -d '{{"model": "{settings.model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'

Agents in the queue: {url}/v1/agents   metrics: {url}/metrics   engine's log: {engine.spec.log}   stop: Ctrl-C"""
    )


if __name__ == "__main__":
    main()
