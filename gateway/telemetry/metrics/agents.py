"""Agents and the tasks that they consist of, by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry

from gateway.telemetry.metrics.labels import BoundedLabels
from gateway.telemetry.metrics.requests import SECONDS
from gateway.telemetry.metrics.table import Reading, Row, Scraped, Subject, counts, histogram, readings
from predictor.types import FinishedTask

_STATES = ("waiting", "running", "idle")
_HELD_RATIO = (0.25, 0.5, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)

# The state of each live agent, one of `_STATES`.
AgentsView = Callable[[], Iterable[str]]


class AgentMetrics(Subject):
    """Tasks are of a tenant's agent, of a class or none."""

    _scraped: Row[Scraped[AgentsView]] = readings(
        Reading(
            "justitia_agents",
            "Agents, by state: waiting, running (tasks in flight, none waiting), idle.",
            lambda states: _by_state(states()),
            ("state",),
        )
    )
    _finished = counts("justitia_agents_finished_total", "Agents that have finished.", "agent_class")
    _jct = histogram(
        "justitia_agent_jct_seconds",
        "Completion time of an agent: from its first task's arrival to its last task's end.",
        SECONDS,
        "agent_class",
    )
    _prompt_tokens = counts("justitia_prompt_tokens_total", "Prompt tokens, cached ones included.", "agent_class")
    _completion_tokens = counts("justitia_completion_tokens_total", "Tokens decoded.", "agent_class")
    _observed_cost = counts(
        "justitia_observed_cost_token_iterations_total",
        "Observed cost of completed tasks, in KV token·iterations.",
        "agent_class",
    )
    _held_ratio = histogram(
        "justitia_held_cost_ratio",
        "KV token·iterations that a task held, as measured by the engine, over the formula's cost without cached tokens.",
        _HELD_RATIO,
    )

    def __init__(self, registry: CollectorRegistry, labels: BoundedLabels) -> None:
        super().__init__(registry)
        self._labels = labels

    def reads(self, states: AgentsView) -> None:
        self._scraped.view = states

    def task_ended(self, tenant: str, agent_class: str | None, prompt_tokens: int, completion_tokens: int) -> None:
        label = self._labels.agent_class(tenant, agent_class)
        self._prompt_tokens[label,].inc(prompt_tokens)
        self._completion_tokens[label,].inc(completion_tokens)

    def task_charged(self, tenant: str, agent_class: str | None, task: FinishedTask) -> None:
        """Once for each task, when its cost is final."""
        self._observed_cost[self._labels.agent_class(tenant, agent_class),].inc(task.cost)
        if task.held is not None and task.net_cost > 0:
            self._held_ratio[()].observe(task.held / task.net_cost)

    def finished(self, tenant: str, agent_class: str | None, jct_s: float) -> None:
        label = self._labels.agent_class(tenant, agent_class)
        self._finished[label,].inc()
        self._jct[label,].observe(jct_s)


def _by_state(states: Iterable[str]) -> dict[tuple[str, ...], float]:
    found = Counter(states)
    return {(state,): found[state] for state in _STATES}
