"""The commands `justitia predictor …` and `justitia export`: what was learned, for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec
from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich import box
from rich.console import Console
from rich.table import Table

from gateway.agent_trace import AgentTrace, TraceError, encode
from gateway.config.settings import StateSettings
from gateway.config.sources import load
from gateway.learning.export import traced
from gateway.learning.serving import created_at, error_of
from gateway.learning.store import console, kept_store
from gateway.learning.trainer import TrainSettings, run_train
from gateway.learning.training import read_note
from gateway.state import StateError
from predictor.files import write_atomically
from predictor.model import ModelError
from predictor.model import load as load_model
from predictor.registry import Registry, RegistryError

answers = Console(highlight=False, markup=False, soft_wrap=True)  # standard output

Settings = TypeVar("Settings", bound=StateSettings)

USAGE = """\
usage: justitia predictor COMMAND [OPTIONS]

  list       the models that there are, and which one serves
  show       what one of them was made from, and how good it was
  promote    let another one serve
  rollback   let the one serve that did before
  train      make a new one from the agents that are kept; it serves if it is better
  evaluate   how well predictors predict the agents of a trace

`justitia predictor COMMAND --help` lists the options.
"""


class ListSettings(StateSettings):
    """`justitia predictor list`: the models that there are, and which one serves."""


class ShowSettings(StateSettings):
    """`justitia predictor show VERSION`: what a model was made from, and how good it was."""

    version: CliPositionalArg[int] = Field(description="The model's version.", ge=1)


class PromoteSettings(StateSettings):
    """`justitia predictor promote VERSION`: let this model serve. A running gateway takes it within seconds."""

    version: CliPositionalArg[int] = Field(description="The model's version.", ge=1)


class RollbackSettings(StateSettings):
    """`justitia predictor rollback`: let the model serve that did before."""


class ExportSettings(StateSettings):
    """`justitia export`: the agents that a gateway served, as a trace for `justitia replay`."""

    out: Path | None = Field(None, description="File for the trace; default: standard output.")
    text: bool = Field(False, description="With the texts of requests, where the gateway kept them (--keep-text).")
    since: datetime | None = Field(
        None, description="Only agents that arrived then or later: a date, or a date and time, in UTC unless it says."
    )


def run_predictor(arguments: list[str]) -> int:
    """0; 1 when it failed; 2 when it was asked for what there cannot be."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "list": _of_models("list", ListSettings, _list),
        "show": _of_models("show", ShowSettings, lambda registry, settings: _show(registry, settings.version)),
        "promote": _of_models(
            "promote", PromoteSettings, lambda registry, settings: _promote(registry, settings.version)
        ),
        "rollback": _of_models("rollback", RollbackSettings, _rollback),
        "train": lambda rest: run_train(load(TrainSettings, rest, program="justitia predictor train")),
        "evaluate": _evaluate,
    }
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        answers.print(USAGE, end="")
        return 0
    if command not in commands:
        console.print(f"justitia predictor: no command {command!r}\n\n{USAGE}", end="", markup=False)
        return 2
    return commands[command](rest)


def _of_models(
    name: str, settings_of: type[Settings], act: Callable[[Registry, Settings], None]
) -> Callable[[list[str]], int]:
    def command(arguments: list[str]) -> int:
        settings = load(settings_of, arguments, program=f"justitia predictor {name}")
        directory = settings.models_directory
        if directory is None:
            console.print(
                f"justitia predictor {name}: with the state in memory there are no models, unless --models says where"
            )
            return 2
        try:
            act(Registry(directory), settings)
        except (RegistryError, ModelError) as error:
            console.print(f"justitia predictor {name}: {error}", markup=False)
            return 1
        return 0

    return command


def _list(registry: Registry, _: StateSettings) -> None:
    versions, current = registry.versions(), registry.current()
    note = read_note(registry.directory)
    if note is not None:
        console.print(f"last training: {note.outcome}, {_time(note.at)}, {note.seconds:.0f} s")
    if not versions:
        console.print(f"no models in {registry.directory}", markup=False)
        return
    drawn = Table(box=box.SIMPLE_HEAD)
    drawn.add_column("version", no_wrap=True)
    for heading in ("made", "agents", "error", "order", "below P90"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    drawn.add_column("", no_wrap=True)
    for version in versions:
        serves = "serves" if version == current else ""
        try:
            told = load_model(registry.path(version)).told
        except ModelError as error:
            drawn.add_row(f"{version:06}", "", "", "", "", "", "unusable")
            console.print(str(error), markup=False)
            continue
        drawn.add_row(
            f"{version:06}",
            _time(created_at(told)),
            str(told.agents),
            _share(error_of(told)),
            f"{told.metrics.get('tau', math.nan):.2f}",
            _share(told.metrics.get("coverage", math.nan)),
            serves,
        )
    drawn.caption = (
        "error: median of |predicted - true| / true. order: Kendall's tau. Both of agents that were held out."
    )
    answers.print(drawn)


def _show(registry: Registry, version: int) -> None:
    if version not in registry.versions():
        raise RegistryError(registry.path(version), "there is no such version")
    told = load_model(registry.path(version)).told
    drawn = Table(box=None, show_header=False)
    drawn.add_row("version", f"{version:06}" + (", serves" if version == registry.current() else ""))
    drawn.add_row("made", _time(created_at(told)))
    drawn.add_row("agents", str(told.agents))
    drawn.add_row("rows", str(told.rows))
    for name, number in sorted(told.metrics.items()):
        drawn.add_row(name, f"{number:.3f}")
    for part in (told.settings, told.calibration):
        for name, number in msgspec.structs.asdict(part).items():
            drawn.add_row(name, f"{number:.3g}")
    answers.print(drawn)


def _promote(registry: Registry, version: int) -> None:
    load_model(registry.path(version))  # one that cannot serve shall not
    registry.promote(version)
    console.print(f"{version:06} serves; a running gateway takes it within seconds")


def _rollback(registry: Registry, _: StateSettings) -> None:
    console.print(f"{registry.rollback():06} serves; a running gateway takes it within seconds")


def _evaluate(arguments: list[str]) -> int:
    from gateway.replay.evaluation import EvaluateSettings, run_evaluate  # needs what replays need

    return run_evaluate(load(EvaluateSettings, arguments, program="justitia predictor evaluate"))


async def run_export(settings: ExportSettings) -> int:
    """0; 1 when there is nothing to write, or it cannot be read or written; 2 when there can be no such state."""
    since = -math.inf
    if settings.since is not None:
        since = (settings.since if settings.since.tzinfo else settings.since.replace(tzinfo=UTC)).timestamp()
    if (store := kept_store("export", settings)) is None:
        return 2
    try:
        agents = await traced(store.read(), text=settings.text, since=since)
        if not agents:
            console.print("justitia export: no agents are kept" + ("" if settings.since is None else " since then"))
            return 1
        _write(agents, settings.out)
    except (StateError, TraceError, OSError) as error:
        console.print(f"justitia export: {error}", markup=False)
        return 1
    finally:
        await store.close()
    tasks = sum(len(agent.tasks) for agent in agents)
    console.print(f"{len(agents)} agents, {tasks} tasks", markup=False)
    return 0


def _write(agents: list[AgentTrace], out: Path | None) -> None:
    """To a file, which then is whole or not there at all, or to standard output. Raises `TraceError` and `OSError`."""
    lines = (encode(agent) + b"\n" for agent in agents)
    if out is None:
        sys.stdout.buffer.writelines(lines)
        sys.stdout.buffer.flush()
    else:
        write_atomically(out, lines)


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}" if at else ""


def _share(number: float) -> str:
    return "" if math.isnan(number) else f"{100 * number:.0f} %"
