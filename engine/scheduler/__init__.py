"""vLLM's scheduler, with the gateway's order: what `--scheduler-cls engine.scheduler.JustitiaScheduler` names.

scheduler       the subclass of vLLM's scheduler
order           the order of requests, waiting and running
waiting_queue   its waiting requests, in that order
displacement    which running tasks make room for a more urgent one
ledger          KV tokens that tasks really hold
kept_blocks     free blocks kept for agents that wait for their tools
step_times      what prefill costs, in iterations
reporting       the scheduler's side of the link
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.scheduler.scheduler import JustitiaScheduler

__all__ = ["JustitiaScheduler"]


def __getattr__(name: str) -> Any:
    """Imports the scheduler, and vLLM with it, only when it is asked for: other modules of this package need no vLLM."""
    if name == "JustitiaScheduler":
        from engine.scheduler.scheduler import JustitiaScheduler

        return JustitiaScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
