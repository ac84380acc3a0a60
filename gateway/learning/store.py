"""The state's store, as commands open it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from gateway.config.settings import StateSettings
from gateway.state import Store, open_store

console = Console(stderr=True, highlight=False, soft_wrap=True)


def kept_store(command: str, settings: StateSettings) -> Store | None:
    """None, if it can hold nothing: then it has been said why."""
    if settings.state == "memory:":
        console.print(
            f"justitia {command}: what is kept in memory ends with its gateway: --state names a file or a Redis"
        )
        return None
    path = settings.state.removeprefix("sqlite:///")
    if path != settings.state and not Path(path).expanduser().exists():
        console.print(f"justitia {command}: there is no state {path}", markup=False)
        return None
    return open_store(settings.state)
