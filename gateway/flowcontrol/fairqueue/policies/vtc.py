"""The virtual token counter, with agents in the place of clients: the agent that has been served least goes next.

Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, algorithm 2: a counter adds the prompt's tokens when a
task is admitted and each output token, worth twice as much, when it is produced. An agent that comes back to a queue
in which it had nothing is lifted to the least counter among those that wait, or, when none waits, to that of the agent
that left last: idling earns no credit. When this policy takes over from another one, all counters begin at zero.
"""

from __future__ import annotations

from collections.abc import Iterable

from gateway.flowcontrol.fairqueue.policies.policy import Policy
from gateway.flowcontrol.fairqueue.types import Agent, Task

PROMPT_TOKEN, OUTPUT_TOKEN = 1.0, 2.0  # the paper's w_p and w_q


class Vtc(Policy):
    by_progress = True

    def __init__(self) -> None:
        self._left_last: Agent | None = None

    def rank(self, agent: Agent, head: Task) -> float:
        return _counter(agent)

    def begin(self, agents: Iterable[Agent]) -> None:
        """All agents start level: service under another policy is no debt here, and no credit."""
        for agent in agents:
            agent.lift -= _counter(agent)

    def woke(self, agent: Agent, least: float | None) -> None:
        if least is None:
            least = _counter(self._left_last) if self._left_last is not None else 0.0
        agent.lift += max(0.0, least - _counter(agent))

    def slept(self, agent: Agent) -> None:
        self._left_last = agent


def _counter(agent: Agent) -> float:
    served = PROMPT_TOKEN * agent.prompt_tokens + OUTPUT_TOKEN * agent.output_tokens
    return agent.lift + served / agent.weight
