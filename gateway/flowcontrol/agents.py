"""The agents that have not ended: what is known of each, its sub-agents, and for how long it has been idle.

What grows is bounded for each tenant: an agent that never ends keeps sums instead of its tasks, and a tenant that starts
agents without end has its longest idle ones ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from gateway.flowcontrol.fairqueue import AgentId, Iterations, TaskId
from gateway.flowcontrol.records import AgentRecord
from predictor.shares import Shares
from predictor.types import AgentProgress, FinishedTask, Sketch

# Names of sub-agents that are remembered: of all tenants, and, over a restart, of an agent.
MAX_NAMES, MAX_ALIASES = 100_000, 256
# Idle agents of a tenant.
MAX_IDLE = 10_000
# Tasks of an agent that are kept to learn from. An id with more is a service's, and no agent's.
MAX_TASKS = 4096
# Completed tasks of all agents whose KV the engine has not reported. It reports within moments; what it does not report then
# is lost.
MAX_AWAITED = 4096


def agent_id_of(tenant: str, name: str) -> AgentId:
    """A name counts only together with its tenant, whose own name has no slash."""
    return AgentId(f"{tenant}/{name}")


class LiveAgent(msgspec.Struct, eq=False):
    """An agent while it lives: its record, and what only this process needs."""

    id: AgentId
    record: AgentRecord
    first_arrival_s: float  # on the monotonic clock
    last_end_s: float  # the same, of its last task; its first arrival while none has ended
    arrived: int = 0  # tasks
    awaited: int = 0  # completed tasks whose KV the engine has not reported yet
    idle_since: Iterations | None = None  # it waits for its tool, or has ended
    cost_ended: float = 0.0  # of its completed tasks, in KV token·iterations
    kept: list[FinishedTask] | None = None  # the completed tasks, without texts; made when there is one
    opening: Sketch | None = None  # of its first task, and of its last
    latest: Sketch | None = None

    @property
    def tasks(self) -> Sequence[FinishedTask]:
        """The completed tasks that are kept to learn from."""
        return self.kept or ()

    def progress(
        self, cost_arrived: float, agent_class: str | None = None, expected_tasks: int | None = None
    ) -> AgentProgress:
        """cost_arrived: of all that has arrived, in KV token·iterations, true where it is known. agent_class, expected_tasks:
        of a task that arrives, if they are not known yet, or have changed."""
        record = self.record
        return AgentProgress(
            record.agent_class or agent_class,
            record.tenant,
            self.arrived,
            record.answered,
            cost_arrived,
            self.cost_ended,
            record.returns,
            expected_tasks or record.expected_tasks,
            self.opening,
            self.latest,
        )

    def complete(self, task: FinishedTask) -> int:
        """Counts a completed task, and returns its place among them."""
        place = self.record.answered
        self.record.answered += 1
        self.cost_ended += task.cost
        if place >= MAX_TASKS:
            self.kept, self.record.whole = None, False
        elif place == 0:
            self.kept = [task]
        elif self.kept is not None:  # else some before it are missing, after a restart
            self.kept.append(task)
        return place

    def correct(self, place: int, task: FinishedTask, difference: float) -> None:
        """The completed task at this place cost more than it was charged, by this difference."""
        self.cost_ended += difference
        if self.kept is not None:
            self.kept[place] = task


class Roots:
    """The root of each sub-agent, by tenant. Where there are too many, the tenant that has most loses those that it used least
    recently; they would then be agents of their own, if they came back without naming their parent."""

    def __init__(self) -> None:
        self._roots: Shares[str, str] = Shares(MAX_NAMES)

    def root_of(self, tenant: str, name: str, parent: str | None) -> str:
        """The root of the parent, if one is named, now or earlier; else the agent itself."""
        if parent is not None and (root := self._root(tenant, parent)) != name:
            return root
        return self._root(tenant, name)

    def remember(self, tenant: str, name: str, root: str) -> None:
        """A request of `name` has arrived, and counts as its root's."""
        if (root := self._root(tenant, root)) != name:
            self._roots.put(tenant, name, root)

    def _root(self, tenant: str, name: str) -> str:
        # There is no circle: a name is only put below a root that is not the name itself, and has no root.
        below = []
        while (above := self._roots.get(tenant, name)) is not None:
            below.append(name)
            name = above
        for descendant in below[:-1]:  # else a long chain would be gone through each time
            self._roots.put(tenant, descendant, name)
        return name


class Agents:
    """All agents that have not ended, by id, and which of them are idle, by tenant."""

    def __init__(self) -> None:
        self.by_id: dict[AgentId, LiveAgent] = {}
        self.roots = Roots()
        # Completed tasks whose KV the engine has not reported yet: of which agent, at which place, and with its texts.
        self.awaited: dict[TaskId, tuple[LiveAgent, int, FinishedTask]] = {}
        self._idle: dict[str, dict[AgentId, LiveAgent]] = {}  # by tenant, the longest idle one first

    def __iter__(self) -> Iterator[LiveAgent]:
        return iter(self.by_id.values())

    def add(self, agent: LiveAgent) -> None:
        self.by_id[agent.id] = agent
        for alias in agent.record.aliases:
            self.roots.remember(agent.record.tenant, alias, agent.record.name)

    def named(self, agent: LiveAgent, alias: str | None) -> None:
        """A request names this agent, or its sub-agent `alias`."""
        record = agent.record
        if alias is None or alias == record.name:
            return
        self.roots.remember(record.tenant, alias, record.name)
        if alias not in record.aliases and len(record.aliases) < MAX_ALIASES:
            record.aliases += (alias,)

    def is_idle(self, agent: LiveAgent) -> None:
        """Nothing of the agent waits, and nothing is in flight."""
        self._idle.setdefault(agent.record.tenant, {})[agent.id] = agent

    def is_busy(self, agent: LiveAgent) -> None:
        if (idle := self._idle.get(agent.record.tenant)) is not None:
            idle.pop(agent.id, None)

    def overdue(self, since_s: float) -> list[LiveAgent]:
        """Idle agents whose last task ended at or before this time, or that are final, and those that a tenant has too many
        of."""
        return [
            agent
            for idle in self._idle.values()
            for number, agent in enumerate(idle.values())
            if len(idle) - number > MAX_IDLE or agent.last_end_s <= since_s or agent.record.final
        ]

    def remove(self, agent: LiveAgent) -> list[FinishedTask]:
        """Forgets an agent that has ended. Returns its tasks whose KV will not be known."""
        del self.by_id[agent.id]
        self.is_busy(agent)
        if not agent.awaited:
            return []
        task_ids = [task_id for task_id, (other, _, _) in self.awaited.items() if other is agent]
        return [self.awaited.pop(task_id)[2] for task_id in task_ids]
