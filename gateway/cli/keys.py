"""The command `justitia keys …`: who may come in, as which tenant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich import box
from rich.console import Console
from rich.table import Table

from gateway.config.settings import KeysSettings
from gateway.config.sources import load
from gateway.tenancy.keys import Keys, KeysError, add_key, revoke_key

answers = Console(highlight=False, markup=False, soft_wrap=True)  # standard output
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

Settings = TypeVar("Settings", bound=KeysSettings)

USAGE = """\
usage: justitia keys COMMAND [OPTIONS]

  add TENANT  a new key, printed once and never again
  list        the keys that there are, without their secrets
  revoke ID   let nobody in with this key any more

A running gateway follows within seconds. `justitia keys COMMAND --help` lists the options.
"""


class AddKeySettings(KeysSettings):
    """`justitia keys add TENANT`: a new key for a tenant, printed to standard output."""

    tenant: CliPositionalArg[str] = Field(description="The tenant: what its keys share are its agents and its limits.")
    name: str = Field("", description="A note on the key: who has it.")


class ListKeysSettings(KeysSettings):
    """`justitia keys list`: the keys that there are, without their secrets."""


class RevokeKeySettings(KeysSettings):
    """`justitia keys revoke ID`: let nobody in with this key any more."""

    id: CliPositionalArg[str] = Field(description="The key's id: see `justitia keys list`.", pattern=r"^[0-9a-f]{8}$")


def run_keys(arguments: list[str]) -> int:
    """0; 1 when it failed; 2 when it was asked for what there cannot be."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "add": _command("add", AddKeySettings, _add),
        "list": _command("list", ListKeysSettings, _list),
        "revoke": _command("revoke", RevokeKeySettings, _revoke),
    }
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        answers.print(USAGE, end="")
        return 0
    if command not in commands:
        console.print(f"justitia keys: no command {command!r}\n\n{USAGE}", end="")
        return 2
    return commands[command](rest)


def _command(name: str, settings_of: type[Settings], act: Callable[[Settings], None]) -> Callable[[list[str]], int]:
    def command(arguments: list[str]) -> int:
        settings = load(settings_of, arguments, program=f"justitia keys {name}")
        try:
            act(settings)
        except KeysError as error:
            console.print(f"justitia keys {name}: {error}")
            return 1
        return 0

    return command


def _add(settings: AddKeySettings) -> None:
    path = settings.keys_file
    is_first = not Keys.load(path).configured
    key, secret = add_key(path, settings.tenant, settings.name, datetime.now(UTC))
    sys.stdout.write(secret + "\n")  # alone, so that it can be piped
    sys.stdout.flush()
    console.print(f"key {key.id} of tenant {key.tenant}, in {path}. It is not shown again.")
    if is_first:
        console.print("It is the first one: from now on, nobody is served without a key.")


def _list(settings: ListKeysSettings) -> None:
    keys = sorted(Keys.load(settings.keys_file), key=lambda key: (key.tenant, key.created))
    if not keys:
        console.print(f"no keys in {settings.keys_file}: everybody is served, as one tenant")
        return
    drawn = Table(box=box.SIMPLE_HEAD)
    for heading in ("id", "tenant", "note", "created", "revoked"):
        drawn.add_column(heading, no_wrap=True)
    for key in keys:
        drawn.add_row(key.id, key.tenant, key.note, _time(key.created), _time(key.revoked))
    answers.print(drawn)


def _revoke(settings: RevokeKeySettings) -> None:
    now = datetime.now(UTC)
    key = revoke_key(settings.keys_file, settings.id, now)
    if key.revoked == now:
        console.print(f"key {key.id} of tenant {key.tenant} is revoked")
    else:
        console.print(f"key {key.id} of tenant {key.tenant} was revoked already, {_time(key.revoked)}")


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"
