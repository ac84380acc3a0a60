"""`justitia check`: are the settings right, and is it there what they name? A start and a reload ask the same first."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gateway.config.problems import Problem, Wrong
from gateway.config.settings import GatewaySettings, ServeSettings
from gateway.config.sources import Reading, gather
from gateway.tenancy.keys import Keys, KeysError

Settings = TypeVar("Settings", bound=GatewaySettings)


class CheckSettings(ServeSettings):
    """`justitia check`: what is wrong with the settings, and where. It takes the flags of `justitia serve`. With `--schema` it
    prints a JSON schema of the settings file instead."""


@dataclass(frozen=True, slots=True)
class Checked(Generic[Settings]):
    """Settings that are right. notes: what may be meant so."""

    reading: Reading[Settings]
    keys: Keys
    notes: tuple[Problem, ...]

    @property
    def settings(self) -> Settings:
        return self.reading.settings


def check(
    settings: type[Settings], arguments: list[str], *, program: str, file: Path | None = None
) -> Checked[Settings]:
    """The settings as `sources.read` reads them, with what they name. Raises `Wrong`, with all that is."""
    reading, problems = gather(settings, arguments, program=program, file=file)
    given = reading.settings
    if given.state_file is not None and (why := _why_not_writable(given.state_file)):
        problems.append(reading.problem(("state",), why))
    keys = Keys()
    try:
        keys = Keys.load(given.keys_file)
    except KeysError as error:
        problems.append(reading.problem(("keys",), str(error)))
    if problems:
        raise Wrong(problems)
    return Checked(reading, keys, tuple(_notes(reading, keys)))


def run_check(arguments: list[str]) -> int:
    """0, or 2 when something is wrong."""
    if "--schema" in arguments:
        print(json.dumps(schema(), indent=2, ensure_ascii=False))
        return 0
    try:
        checked = check(CheckSettings, arguments, program="justitia check")
    except Wrong as wrong:
        print(wrong, file=sys.stderr)
        return 2
    for note in checked.notes:
        print(f"note: {note}")
    settings, file = checked.settings, checked.reading.file
    tenants = len(settings.tenants)
    print(f"{file or 'no settings file'}: right; policy {settings.policy}, {tenants} tenant{'s' * (tenants != 1)}")
    return 0


def schema() -> dict[str, Any]:
    """A JSON schema of the settings file, for editors and for tools that check it before it is there."""
    made = ServeSettings.model_json_schema()
    properties = {name: each for name, each in made["properties"].items() if name != "config"}
    properties["tenants"]["anyOf"][0]["additionalProperties"] = False  # which its pattern has left open
    for each in (*properties.values(), *made["$defs"]["TenantSettings"]["properties"].values()):
        del each["title"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "justitia.yaml",
        "description": "Settings of justitia. `reload`: what a running gateway takes over on SIGHUP.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": made["$defs"],
    }


def _why_not_writable(file: Path) -> str | None:
    if file.exists():
        if not file.is_file() or not os.access(file, os.R_OK | os.W_OK):
            return f"{file} is no file that can be written"
        return None
    above = file.parent
    while not above.exists():
        above = above.parent
    try:
        with tempfile.TemporaryFile(dir=above):  # who may write, and to what, is not to be had otherwise
            return None
    except OSError as error:
        return f"{file} cannot be made: {above}: {error.strerror}"


def _notes(reading: Reading[Any], keys: Keys) -> Iterator[Problem]:
    settings = reading.settings
    if not keys.configured:
        if settings.tenants:
            yield reading.problem(("tenants",), "there are no keys, so that everybody is the tenant default")
        return
    for name in sorted(settings.tenants.keys() - keys.tenants):
        yield reading.problem(("tenants", name), "has no key")
    for name in sorted(keys.tenants - settings.tenants.keys()):
        yield reading.problem(("tenants", name), "has a key and no entry, and so no limits")
