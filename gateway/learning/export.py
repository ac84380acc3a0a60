"""What a gateway served, as an agent trace (`gateway.agent_trace`) that can be replayed.

What the engine's usage said of a request is of the whole request. One of several sequences (`n`, or a batch of prompts)
becomes as many tasks, each with its share of the tokens: so they are in memory side by side, as they were.

Which task waited for which is not told by clients, and is taken from the times: a task comes after those that had ended when
it arrived, without those that others of them came after in turn (the order of intervals, and what covers what in it). The rest
of the time until it arrived is the agent's own: `think_s`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate

import msgspec

from gateway.agent_trace import MAX_TOKENS, AgentTrace, TaskTrace
from predictor.types import FinishedAgent, FinishedTask

# Of a wider wave only those that ended last are named, so that two waves of a thousand are not a million names.
MAX_AFTER = 64


async def traced(
    agents: AsyncIterator[FinishedAgent], *, text: bool = False, since: float = -math.inf
) -> list[AgentTrace]:
    """In the order of their arrival, which is counted from the first. text: with the texts, where they were kept. since:
    only those that arrived then or later, in seconds since 1970."""
    found = [
        (agent.arrived_at, trace(agent, f"a{agent.arrived_at * 1000:.0f}", text=text))
        async for agent in agents
        if agent.tasks and agent.arrived_at >= since
    ]
    found.sort(key=lambda one: one[0])
    named: dict[str, int] = {}
    traces = []
    for arrived_at, made in found:
        # By the time of arrival, which does not change when older agents go; several in a millisecond are numbered.
        twins = named[made.agent_id] = named.get(made.agent_id, 0) + 1
        name = made.agent_id if twins == 1 else f"{made.agent_id}.{twins}"
        traces.append(msgspec.structs.replace(made, agent_id=name, arrival_s=arrived_at - found[0][0]))
    return traces


def trace(agent: FinishedAgent, agent_id: str, *, text: bool = False) -> AgentTrace:
    """It arrives at 0. The agent must have a task."""
    tasks = agent.tasks
    names = [_names(number, task) for number, task in enumerate(tasks, 1)]
    waits = waits_of([task.arrived_s for task in tasks], [task.ended_s for task in tasks])
    made: list[TaskTrace] = []
    for task, own, (after, think_s) in zip(tasks, names, waits, strict=True):
        before = tuple(name for place in after for name in names[place])
        made += _tasks(task, own, before[-MAX_AFTER:], think_s, text=text)
    return AgentTrace(
        agent_id,
        0.0,
        tuple(made),
        agent.agent_class or "",
        agent.tenant,
        agent.weight,
        agent.expected_tasks,
    )


def waits_of(arrived_s: Sequence[float], ended_s: Sequence[float]) -> list[tuple[list[int], float]]:
    """For each task the places of those that it came after, the one that ended last being the last, and how long after.
    With none before it: how long after its agent."""
    # A task that took no time, by the clock, has ended after its arrival all the same.
    ended_s = [max(end, math.nextafter(begin, math.inf)) for begin, end in zip(arrived_s, ended_s, strict=True)]
    by_end = sorted(range(len(ended_s)), key=lambda place: ended_s[place])
    ends = [ended_s[place] for place in by_end]
    latest_begin = list(accumulate((arrived_s[place] for place in by_end), max))
    waits: list[tuple[list[int], float]] = []
    for begin in arrived_s:
        over = bisect_right(ends, begin)
        if not over:
            waits.append(([], max(0.0, begin)))
            continue
        # Who had ended when the last of them arrived is told by that one's own wait.
        wave = by_end[bisect_right(ends, latest_begin[over - 1]) : over]
        waits.append((wave, begin - ends[over - 1]))
    return waits


def _names(number: int, task: FinishedTask) -> list[str]:
    if task.sequences == 1:
        return [f"t{number}"]
    return [f"t{number}.{sequence}" for sequence in range(1, task.sequences + 1)]


def _tasks(
    task: FinishedTask, names: Sequence[str], after: tuple[str, ...], think_s: float, *, text: bool
) -> list[TaskTrace]:
    """One for each sequence."""
    a_prompt = max(1, task.sequences // task.prompts)  # sequences of a prompt
    text = text and task.prompts == 1  # which text is whose is not kept
    prompts, cached = _shares(task.prompt_tokens, task.prompts), _shares(task.cached_tokens, task.prompts)
    decoded = _shares(task.decode_tokens, task.sequences)
    made = []
    for place, name in enumerate(names):
        of = min(place // a_prompt, task.prompts - 1)
        prompt_tokens, output_tokens = _within(prompts[of]), _within(decoded[place])
        made.append(
            TaskTrace(
                name,
                prompt_tokens,
                output_tokens,
                after,
                think_s,
                min(cached[of], prompt_tokens),
                prompt=task.prompt if text else None,
                system=task.system if text else None,
                max_tokens=None if task.max_tokens is None else max(_within(task.max_tokens), output_tokens),
            )
        )
    return made


def _shares(total: int, count: int) -> list[int]:
    """As even as can be, the larger ones first."""
    each, more = divmod(max(0, total), count)
    return [each + (place < more) for place in range(count)]


def _within(tokens: int) -> int:
    """A trace has no task without a token."""
    return min(max(tokens, 1), MAX_TOKENS)
