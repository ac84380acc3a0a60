"""What runs in vLLM's scheduler; `--scheduler-cls engine.scheduler.JustitiaScheduler`. Its modules: see `engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.scheduler.scheduler import JustitiaScheduler

__all__ = ["JustitiaScheduler"]


def __getattr__(name: str) -> Any:
    """Imports the scheduler, and with it vLLM, when it is first asked for: other modules of the package need no vLLM."""
    if name == "JustitiaScheduler":
        from engine.scheduler.scheduler import JustitiaScheduler

        return JustitiaScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
