"""Where settings come from, and all that is wrong with what is said there.

A flag (`--max-queue-s 60`) goes over the environment (`JUSTITIA_MAX_QUEUE_S`), over a YAML file (`--config`, or
`JUSTITIA_CONFIG`, or `justitia.yaml` in the working directory), over the default: each setting as a whole. A name that is not
known is an error in all three, and so is a wrong value, also where another goes over it. What `export` or `predictor …` takes
beyond what it shares with the gateway is a flag alone: a variable or a line that is there for all commands would mean something
to that one alone.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, PydanticBaseSettingsSource

from gateway.config.file import SettingsFile
from gateway.config.problems import Name, Problem, Wrong, did_you_mean, dotted, explain
from gateway.config.settings import PREFIX, ServeSettings, StateSettings, TenantSettings

FILE = Path("justitia.yaml")
OTHER_PREFIXES = ("JUSTITIA_DEMO_", "JUSTITIA_REPLAY_", "JUSTITIA_EVALUATE_")

# What the file and the environment may say: they are there for all commands.
_SHARED = ServeSettings.model_fields
_OF_FILE = _SHARED.keys() - {"config"}
# Never shown, whatever is wrong with them.
_SECRET = [name for name, f in _SHARED.items() if SecretStr in (f.annotation, *get_args(f.annotation))]

Settings = TypeVar("Settings", bound=BaseSettings)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Source:
    """What one of the three says. problem: something wrong with one of its names, said where that stands. problems: what is
    wrong whatever the settings are."""

    values: Mapping[str, Any]
    problem: Callable[[Name, str], Problem]
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, settings: type[BaseSettings]) -> list[Problem]:
        """All that is wrong with it by itself."""
        problems = list(self.problems)
        try:
            settings(**self.values)
        except ValidationError as error:
            explained = explain(error, _names_in, _SECRET)
            problems += [self.problem(name, what) for name, what in explained if name and name[0] in self.values]
        return sorted(problems, key=lambda problem: problem.place)


@dataclass(frozen=True, slots=True)
class Reading(Generic[Settings]):
    """The merged settings and their sources, highest precedence first. file: the settings file that was read. found: it was
    found, and not named."""

    settings: Settings
    sources: tuple[Source, ...]
    file: Path | None = None
    found: bool = False

    def problem(self, name: Name, what: str) -> Problem:
        """Something wrong with a setting, said where it was set."""
        for source in self.sources:
            if name[0] in source.values:
                return source.problem(name, what)
        return Problem("", dotted(name), what)


def load(settings: type[Settings], arguments: list[str], *, program: str) -> Settings:
    """What `read` reads. Exits with 2, and a line on each thing that is wrong."""
    reading = or_exit(lambda: read(settings, arguments, program=program))
    say_file(reading, program)
    return reading.settings


def or_exit(read: Callable[[], Result]) -> Result:
    try:
        return read()
    except Wrong as wrong:
        print(wrong, file=sys.stderr)
        raise SystemExit(2) from None


def say_file(reading: Reading[Any], program: str) -> None:
    """A file that nobody has named is not taken in silence."""
    if reading.found:
        print(f"{program}: settings from {reading.file}", file=sys.stderr)


def read(
    settings: type[Settings], arguments: list[str], *, program: str, file: Path | None = None
) -> Reading[Settings]:
    """The settings that flags, environment, file and defaults give together. file: which one, if none is named; else the one in
    the working directory, if it is there. Raises `Wrong`. Exits with 2 if the arguments are no flags, with 0 after `--help`."""
    reading, problems = gather(settings, arguments, program=program, file=file)
    if problems:
        raise Wrong(problems)
    return reading


def gather(
    settings: type[Settings], arguments: list[str], *, program: str, file: Path | None = None
) -> tuple[Reading[Settings], list[Problem]]:
    """As `read`, with what is wrong beside the settings, and left out of them. Raises `Wrong` where there are none then."""
    made = _by_itself(settings)
    variables = _variables(made)
    try:
        flags = _flags(made, arguments, program)
    except SystemExit as stop:
        if stop.code and variables.problems:  # they may be why an argument is missing
            raise Wrong(variables.problems) from None
        raise
    sources = [flags, variables]
    path, found = None, False
    if "config" in settings.model_fields:
        named = flags.values.get("config") or variables.values.get("config") or file
        found = not named and FILE.exists()
        path = Path(named) if named else FILE if found else None
    if path is not None:
        sources.append(_file(made, path))
    problems = [problem for source in sources for problem in source.wrong(made)]
    given = {name: value for source in reversed(sources) for name, value in source.values.items()}
    return Reading(_right(made, given, problems), tuple(sources), path, found), problems


def _right(settings: type[Settings], given: Mapping[str, Any], problems: list[Problem]) -> Settings:
    """Of what is given all that is right. Raises `Wrong` if that is not enough, or does not go together."""
    try:
        return settings(**given)
    except ValidationError as error:
        explained = list(explain(error, _names_in, _SECRET))
    wrong = {name[0] for name, _ in explained if name}
    right = {name: value for name, value in given.items() if name not in wrong}
    if not problems or len(right) == len(given):
        raise Wrong(problems or [Problem("", dotted(name), what) for name, what in explained])
    return _right(settings, right, problems)


def _flags(settings: type[BaseSettings], arguments: list[str], program: str) -> Source:
    """Raises `Wrong` for a setting that is no flag."""
    fields = settings.model_fields
    hidden = [name for name in fields if argparse.SUPPRESS in fields[name].metadata]
    given = [name for name in hidden if any(word.partition("=")[0] == _flag(name) for word in arguments)]
    if given:
        raise Wrong(
            Problem(_flag(name), "", f"is no flag: set {_variable(name)}, or {name} in a file") for name in given
        )

    def problem(name: Name, what: str) -> Problem:
        first = str(name[0])
        return Problem(first.upper() if fields[first].is_required() else _flag(first), dotted(name[1:]), what)

    return Source(CliSettingsSource[Any](settings, cli_prog_name=program, cli_parse_args=arguments)(), problem)


def _variables(settings: type[BaseSettings]) -> Source:
    prefix = str(settings.model_config.get("env_prefix", ""))
    environment = _Environment(settings)
    values = environment()
    if issubclass(settings, StateSettings):
        values = {name: value for name, value in values.items() if name in _SHARED}
    known = [_variable(name) for name in _SHARED]
    if prefix != PREFIX:
        known += [_variable(name, prefix) for name in settings.model_fields]
    others = tuple(other for other in OTHER_PREFIXES if other != prefix)
    unknown = [
        Problem(name, "", f"is not a setting{did_you_mean(name, known)}")
        for name in sorted(os.environ)
        if name.startswith(PREFIX) and name not in known and not name.startswith(others)
    ]
    not_json = [Problem(_variable(name, prefix), "", f"is not JSON: {why}") for name, why in environment.unreadable]
    return Source(
        values,
        lambda name, what: Problem(_variable(str(name[0]), prefix), dotted(name[1:]), what),
        [*unknown, *not_json],
    )


def _file(settings: type[BaseSettings], path: Path) -> Source:
    file = SettingsFile.read(path)
    unknown = [
        file.problem((name,), f"is not a setting{did_you_mean(name, _OF_FILE)}")
        for name in file.values
        if name not in _OF_FILE
    ]
    values = {name: value for name, value in file.values.items() if name in _OF_FILE & settings.model_fields.keys()}
    return Source(values, file.problem, [*file.problems, *unknown])


class _Environment(EnvSettingsSource):
    """unreadable: names of settings, and why."""

    def __init__(self, settings: type[BaseSettings]) -> None:
        self.unreadable: list[tuple[str, str]] = []
        super().__init__(settings)

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except (ValueError, RecursionError) as error:
            self.unreadable.append((field_name, str(error)))
            return None


@functools.cache
def _by_itself(settings: type[Settings]) -> type[Settings]:
    """The same settings, which read nothing but what they are given."""

    def only_given(
        cls: type[BaseSettings],
        /,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        **_: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    members = {"__doc__": settings.__doc__, "settings_customise_sources": classmethod(only_given)}
    return type(settings.__name__, (settings,), members)


def _names_in(name: Name) -> Collection[str]:
    """The names that there are inside of one."""
    return TenantSettings.model_fields if name else _OF_FILE


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str, prefix: str = PREFIX) -> str:
    return f"{prefix}{name}".upper()
