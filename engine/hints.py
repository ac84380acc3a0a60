"""What a request carries from the gateway to the engine's scheduler.

Three fields of vLLM's OpenAI request, nothing else: `priority` holds the tag, and two flat `vllm_xargs` name the agent
and the task. A stock vLLM honours the first and ignores the others. A request of a kind that has no `priority` (Anthropic's
messages) has the tag in a third one, and for a stock vLLM in a header.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

AGENT_XARG = "justitia_agent"
TASK_XARG = "justitia_task"
TAG_XARG = "justitia_tag"
PRIORITY_HEADER = "x-vllm-priority"

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class Hints(NamedTuple):
    """A task's place in the order: the smallest comes first."""

    # The gateway's order, an int64. For the policy `justitia` it is the agent's virtual finish time in token·iterations.
    tag: int
    agent: str  # the agent's id: where tags are equal, tasks of one agent stay together
    task: int  # the gateway's number of the task: grows with arrival, and never repeats, not even over restarts


def to_tag(rank: float) -> int:
    """A policy's rank as the int64 that `priority` can hold; beyond its range the nearest end."""
    return int(max(INT64_MIN, min(INT64_MAX, rank)))


def to_fields(hints: Hints) -> tuple[int, dict[str, str | int]]:
    """`(priority, vllm_xargs)` for the body of a request."""
    return hints.tag, {AGENT_XARG: hints.agent, TASK_XARG: hints.task}


def from_fields(priority: int, xargs: Mapping[str, Any] | None) -> Hints:
    """The hints of a request at the scheduler. One that did not come through the gateway has task -1 and no agent."""
    if not xargs:
        return Hints(priority, "", -1)
    task = xargs.get(TASK_XARG, -1)
    numbered = type(task) is int and 0 <= task <= INT64_MAX
    tag = xargs.get(TAG_XARG, priority)
    return Hints(
        tag if type(tag) is int and INT64_MIN <= tag <= INT64_MAX else priority,
        str(xargs.get(AGENT_XARG, "")),
        task if numbered else -1,
    )
