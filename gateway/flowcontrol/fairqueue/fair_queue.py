"""The fair queue: agents, their tasks, and the verbs that move them.

A task is enqueued, released, and then completed or cancelled. A waiting task can be cancelled too, and a task that the
engine lost is requeued. An agent that has nothing waiting and nothing in flight can be evicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from gateway.flowcontrol.fairqueue.forecast import Forecast
from gateway.flowcontrol.fairqueue.nested import NestedReference
from gateway.flowcontrol.fairqueue.policies import Policy
from gateway.flowcontrol.fairqueue.ranking import Ranking
from gateway.flowcontrol.fairqueue.reservations import Reservations
from gateway.flowcontrol.fairqueue.types import (
    NO_TENANT,
    Agent,
    AgentId,
    Flight,
    Iterations,
    KvTokenIterations,
    QueueError,
    Release,
    ReleaseLimits,
    Spent,
    Standing,
    Task,
    TaskId,
    TenantId,
    VirtualTime,
)


class FairQueue:
    """The fair queue of the package's docstring. It is one class, though a long one: its verbs move one state machine, and each
    keeps the reference, the ranking, the forecast and the agents' own sums consistent with one another."""

    def __init__(self, policy: Policy, limits: ReleaseLimits = ReleaseLimits()) -> None:  # noqa: B008 (the default is frozen)
        self.limits = limits
        self._reference = NestedReference()
        self._capacity_tokens = 0.0
        self._agents: dict[AgentId, Agent] = {}
        self._ranking = Ranking(policy, self._agents)
        self._tasks: dict[TaskId, Agent] = {}
        self._forecast = Forecast()
        self._reservations = Reservations()
        self._next_seq = 0

    # What can be seen

    @property
    def agents(self) -> Mapping[AgentId, Agent]:
        return MappingProxyType(self._agents)

    @property
    def waiting(self) -> int:
        return len(self._tasks) - self.in_flight

    @property
    def in_flight(self) -> int:
        return len(self._forecast)

    @property
    def peak_tokens(self) -> float:
        """The most tokens of KV that the tasks in flight will hold at one time, by their predicted lengths."""
        return self._forecast.peak(self._reference.now)

    @property
    def capacity_tokens(self) -> float:
        """M, in tokens."""
        return self._capacity_tokens

    def virtual_time(self, tenant: TenantId = NO_TENANT) -> VirtualTime:
        """V of the tenant's agents, at the last call that took `now`."""
        return self._reference.virtual_time(tenant)

    @property
    def outer_virtual_time(self) -> VirtualTime:
        """V of the tenants."""
        return self._reference.outer_virtual_time

    def backlog_tag(self, agent_id: AgentId) -> VirtualTime:
        """B of an agent. Raises `KeyError` for an unknown agent."""
        return self._reference.backlog_tag(self._agents[agent_id].tenant.id, agent_id)

    def in_order(self) -> Iterator[Agent]:
        """The agents with waiting tasks, the next one first. O(N log N): for reports, not for decisions."""
        return self._ranking.in_order()

    def standing(self, agent_id: AgentId) -> Standing:
        """What `restore` needs, at the last call that took `now`. Raises `KeyError` for an unknown agent."""
        agent = self._agents[agent_id]
        tenant, flights = agent.tenant.id, agent.in_flight.values()
        backlog = self._reference.backlog_tag(tenant, agent_id) - agent.unfinished / agent.weight
        idle_since = self._reference.virtual_time(tenant) if agent.busy else agent.idle_since
        return Standing(
            agent.weight,
            agent.predicted,
            KvTokenIterations(max(0.0, agent.arrived - agent.unfinished)),
            VirtualTime(agent.start_tag - max(idle_since, backlog)),
            agent.prompt_tokens - sum([flight.prompt_tokens for flight in flights]),
            agent.output_tokens - sum([flight.output_tokens for flight in flights]),
            agent.lift,
            agent.forming,
        )

    # The verbs

    def set_capacity(self, now: Iterations, tokens: float, served_tokens: float | None = None) -> None:
        """M, in tokens, once it is known and whenever it changes. `served_tokens`: the part of M that the engine was measured
        to hold while tasks waited; the reference then shares out that part."""
        if not (0 <= tokens < math.inf and (served_tokens is None or 0 <= served_tokens < math.inf)):
            raise QueueError(
                f"capacity must be at least 0 tokens, and finite, not {tokens}, of which {served_tokens} served"
            )
        self._reference.advance(now)
        self._reference.set_capacity(tokens if served_tokens is None else served_tokens)
        self._capacity_tokens = tokens

    def enqueue(
        self,
        now: Iterations,
        task: Task,
        agent_cost: KvTokenIterations,
        *,
        weight: float = 1.0,
        tenant: TenantId = NO_TENANT,
        tenant_weight: float = 1.0,
    ) -> None:
        """A task arrives. `agent_cost` is the total cost that is now predicted for its agent; it counts while the agent is
        forming, and when the work that has arrived outgrows the earlier prediction. `weight` and `tenant` count when the
        agent is new, `tenant_weight` from now on."""
        if task.id in self._tasks:
            raise QueueError(f"task {task.id} is in the queue already")
        if not (
            0 <= task.cost < math.inf
            and 0 <= task.memory_tokens < math.inf
            and 0 <= task.prompt_tokens < math.inf
            and 0 <= agent_cost < math.inf
        ):
            raise QueueError(f"costs and memory must be at least 0, and finite: {task}, agent {agent_cost}")
        if task.sequences < 1:
            raise QueueError(f"a task has at least one sequence: {task}")
        if not (0 < weight < math.inf and 0 < tenant_weight < math.inf):
            raise QueueError(f"weights must be positive, not {weight} of {tenant_weight}")
        self._reference.advance(now)
        agent = self._agents.get(task.agent_id)
        if agent is None:
            seq = self._seq()
            agent = Agent(task.agent_id, seq, self._ranking.tenant(tenant, seq), weight, agent_cost)
            agent.start_tag = self._reference.virtual_time(agent.tenant.id)
            self._agents[agent.id] = agent
        elif not agent.busy:
            self._count_idleness(agent)
        self._ranking.weigh(agent.tenant, tenant_weight)
        self._reference.arrive(agent.tenant.id, agent.id, task.cost, agent.weight, tenant_weight)
        if not agent.waiting:
            self._ranking.policy.woke(agent, self._ranking.least())
        self._wait(agent, task)
        agent.arrived = KvTokenIterations(agent.arrived + task.cost)
        agent.unfinished = KvTokenIterations(agent.unfinished + task.cost)
        self._settle_tag(agent, agent_cost)

    def restore(
        self,
        now: Iterations,
        agent_id: AgentId,
        standing: Standing,
        *,
        tenant: TenantId = NO_TENANT,
        tenant_weight: float = 1.0,
    ) -> None:
        """Put back an agent that was here before a restart. It is idle, as after a busy period, and F - V is what it was then.
        Put several back in the order of their arrival: ties go to the first."""
        weights_are_sound = 0 < standing.weight < math.inf and 0 < tenant_weight < math.inf
        if agent_id in self._agents or not (weights_are_sound and _restorable(standing)):
            raise QueueError(f"agent {agent_id!r} is in the queue already, or its standing is invalid: {standing}")
        self._reference.advance(now)
        seq = self._seq()
        agent = Agent(
            agent_id,
            seq,
            self._ranking.tenant(tenant, seq),
            standing.weight,
            standing.predicted,
            arrived=standing.served,
            released=standing.served,
            attained=standing.served,
            prompt_tokens=standing.prompt_tokens,
            output_tokens=standing.output_tokens,
            lift=standing.lift,
            forming=standing.forming,
        )
        agent.tenant.weight = tenant_weight
        self._reference.restore(agent.tenant.id, agent_id, standing.weight, tenant_weight)
        agent.idle_since = self._reference.virtual_time(agent.tenant.id)
        agent.start_tag = VirtualTime(agent.idle_since + standing.start_tag)
        self._agents[agent_id] = agent
        self._settle_tag(agent, standing.predicted)

    def release(self, now: Iterations, engine_waiting: int = 0) -> list[Release]:
        """Release the tasks that go to the engine now, and return them in order. `engine_waiting`: tasks in the engine's own
        queue."""
        self._reference.advance(now)
        releases: list[Release] = []
        displacing = engine_waiting > 0
        while (agent := self._ranking.first()) is not None:
            task = agent.head()
            assert task is not None
            if self.in_flight and not self._fits(now, task, engine_waiting):
                if displacing or not self._displaces(agent):
                    break
                displacing = True  # one at a time: a report must first show what the engine displaced
            rank = self._ranking.rank(agent)
            releases.append(Release(task, rank))
            agent.stop_waiting(task.id)
            tag = agent.tenant.start_tag
            agent.in_flight[task.id] = Flight(task, rank, rank, tag, agent.released, task.prompt_tokens)
            self._forecast.add(now, task)
            if kept := self._reservations.end(now, agent):
                self._count_extra(agent, kept)
            agent.prompt_tokens += task.prompt_tokens
            agent.forming = False
            self._count_release(agent, task.cost)
            if not agent.waiting:
                self._ranking.policy.slept(agent)
            self._ranking.place(agent)
        return releases

    def observe(self, now: Iterations, task_id: TaskId, kv_tokens: float, output_tokens: float) -> None:
        """The engine reports the KV tokens that a task in flight holds, and the output tokens that it has produced, over all of
        its sequences. Unknown tasks are ignored, since reports arrive late."""
        self.observe_all(now, [(task_id, kv_tokens, output_tokens)])

    def observe_all(self, now: Iterations, reported: Iterable[tuple[TaskId, float, float]]) -> None:
        """The same of many tasks: after an iteration, of all that decode. (Written out, since a replay calls it each time.)"""
        self._reference.advance(now)
        tasks, forecast = self._tasks, self._forecast
        by_progress = self._ranking.policy.by_progress
        for task_id, kv_tokens, output_tokens in reported:
            agent = tasks.get(task_id)
            flight = None if agent is None else agent.in_flight.get(task_id)
            if agent is None or flight is None or output_tokens <= flight.output_tokens:
                continue
            forecast.observe(now, task_id, kv_tokens, output_tokens)
            # The formula of a cost, with the tokens so far, as if the sequences were equally long.
            each = output_tokens / flight.task.sequences
            done = max(0.0, kv_tokens - output_tokens) * each + output_tokens * (each + 1) / 2
            attained = KvTokenIterations(max(done, flight.attained))
            agent.attained = KvTokenIterations(agent.attained + attained - flight.attained)
            agent.output_tokens += output_tokens - flight.output_tokens
            flight.attained, flight.output_tokens = attained, output_tokens
            if by_progress and agent.waiting:
                self._ranking.place(agent)

    def reserve(self, now: Iterations, agent_id: AgentId, tokens: float, iterations: float) -> None:
        """Keep this many tokens of KV, for at most this many iterations, for an idle agent that waits for its tool: see
        `reservations`."""
        agent = self._idle(agent_id)
        if not (0 <= tokens < math.inf and 0 <= iterations < math.inf):
            raise QueueError(
                f"a reservation must be at least 0, and finite, not {tokens} tokens for {iterations} iterations"
            )
        self._reference.advance(now)
        self._reservations.make(now, agent, tokens, iterations)

    def unreserve(self) -> None:
        """End all reservations, without a charge."""
        self._reservations.clear()

    def correct(self, now: Iterations, agent_id: AgentId, difference: KvTokenIterations) -> None:
        """A settled task turns out to have cost more, or less, than it was charged. An agent that has been evicted is passed
        over."""
        if not math.isfinite(difference):
            raise QueueError(f"a correction must be finite, not {difference}")
        self._reference.advance(now)
        agent = self._agents.get(agent_id)
        if agent is not None:
            self._count_extra(agent, difference)

    def revise(self) -> list[Release]:
        """In-flight tasks whose rank has changed since the engine last received it, because more is known of their agents or
        the policy is another one; marks them as sent."""
        return self._ranking.revise()

    def change_policy(self, now: Iterations, policy: Policy) -> None:
        """Order by another policy from now on: waiting tasks at once, tasks in flight by `revise`. The reference and all tags
        stay as they are, since they do not depend on the policy."""
        self._reference.advance(now)
        self._ranking.change_policy(policy)

    def calibrate(self, now: Iterations, held_tokens: float) -> None:
        """The engine reports how many tokens of its KV cache all tasks in flight hold together."""
        self._reference.advance(now)
        self._forecast.calibrate(now, held_tokens)

    def requeue(self, now: Iterations, task_id: TaskId) -> None:
        """The engine lost a task in flight. The task waits again, in its old place, as if it had never been released."""
        agent, flight = self._in_flight(task_id)
        self._reference.advance(now)
        self._land(agent, task_id)
        self._count_progress(agent, flight, 0.0, 0.0, 0.0)
        self._count_release(agent, -flight.task.cost)
        self._wait(agent, flight.task)
        self._ranking.place(agent)

    def complete(self, now: Iterations, task_id: TaskId, spent: Spent, agent_cost: KvTokenIterations) -> None:
        """A task in flight has ended. `spent`: its true cost. `agent_cost`: see `enqueue`."""
        if not (_sound(spent) and 0 <= agent_cost < math.inf):
            raise QueueError(f"spent costs and tokens must be at least 0, and finite: {spent}, agent {agent_cost}")
        agent, flight = self._in_flight(task_id)
        self._reference.advance(now)
        self._land(agent, task_id)
        self._charge(agent, flight, spent)
        if spent.output_tokens is not None:
            self._forecast.learn(flight.task, spent.output_tokens)
        self._reconcile(agent, flight.task, spent.cost, agent_cost)

    def cancel(self, now: Iterations, task_id: TaskId, spent: Spent) -> None:
        """A task was given up, waiting or in flight. `spent`: its true cost until then, which a waiting task has only if the
        engine lost it before."""
        if not _sound(spent):
            raise QueueError(f"spent costs and tokens must be at least 0, and finite: {spent}")
        agent = self._tasks.get(task_id)
        if agent is None:
            raise QueueError(f"task {task_id} is not in the queue")
        self._reference.advance(now)
        if (flight := agent.in_flight.get(task_id)) is not None:
            task = flight.task
            self._land(agent, task_id)
            self._charge(agent, flight, spent)
        else:
            task = agent.stop_waiting(task_id)
            del self._tasks[task_id]
            agent.attained = KvTokenIterations(agent.attained + spent.cost)
            self._count_release(agent, spent.cost)
            if not agent.waiting:
                self._ranking.policy.slept(agent)
        self._reconcile(agent, task, spent.cost, agent.predicted)

    def evict(self, now: Iterations, agent_id: AgentId) -> None:
        """Forget an agent that has ended. The reference keeps it while it is backlogged there."""
        agent = self._idle(agent_id)
        self._reference.advance(now)
        del self._agents[agent_id]
        self._reservations.drop(agent_id)
        self._ranking.forget(agent)
        self._reference.forget(agent.tenant.id, agent_id)

    # How they work

    def _idle(self, agent_id: AgentId) -> Agent:
        """The agent. Raises `QueueError` if it is unknown, or has anything waiting or in flight."""
        agent = self._agents.get(agent_id)
        if agent is None or agent.busy:
            raise QueueError(f"agent {agent_id!r} is " + ("unknown" if agent is None else "not idle"))
        return agent

    def _seq(self) -> int:
        self._next_seq += 1
        return self._next_seq

    def _fits(self, now: Iterations, task: Task, engine_waiting: int) -> bool:
        limits = self.limits
        if limits.engine_waiting is not None and engine_waiting > limits.engine_waiting:
            return False
        if limits.in_flight is not None and self.in_flight >= limits.in_flight:
            return False
        # M is 0 until it is known. Until then slots are the only limit.
        room = limits.beta * self._capacity_tokens or math.inf
        if not limits.foresight:
            return self._forecast.held(now) + task.prompt_tokens <= room
        if not self._forecast.fits(now, task, room):
            return False
        if not self._reservations:
            return True
        kept = self._reservations.kept_from(now, self._agents[task.agent_id], room)
        return self._forecast.fits(now, task, room - kept)

    def _count_extra(self, agent: Agent, cost: KvTokenIterations) -> None:
        """Charge the agent for memory that it had beyond what its tasks were charged."""
        self._reference.correct(agent.tenant.id, agent.id, cost)
        agent.arrived = KvTokenIterations(max(0.0, agent.arrived + cost))
        agent.attained = KvTokenIterations(max(0.0, agent.attained + cost))
        self._count_release(agent, cost)
        self._settle_tag(agent, agent.predicted)

    def _displaces(self, agent: Agent) -> bool:
        """Whether some task in flight may be preempted to make room for the agent's next task."""
        margin, slots = self.limits.displace_margin, self.limits.in_flight
        if margin is None or (slots is not None and self.in_flight >= slots):
            return False
        rank = self._ranking.rank(agent) + margin
        return any(flight.rank > rank for other in self._agents.values() for flight in other.in_flight.values())

    def _wait(self, agent: Agent, task: Task) -> None:
        tenant = agent.tenant
        if not len(tenant.order):
            tenant.start_tag = max(tenant.start_tag, self._reference.outer_virtual_time)
        self._ranking.wait(agent, task)
        self._tasks[task.id] = agent

    def _in_flight(self, task_id: TaskId) -> tuple[Agent, Flight]:
        """Raises `QueueError` for a task that is not in flight."""
        agent = self._tasks.get(task_id)
        flight = agent.in_flight.get(task_id) if agent else None
        if agent is None or flight is None:
            raise QueueError(f"task {task_id} is not in flight")
        return agent, flight

    def _land(self, agent: Agent, task_id: TaskId) -> None:
        """The task is no longer at the engine."""
        del agent.in_flight[task_id]
        del self._tasks[task_id]
        self._forecast.remove(task_id)

    def _charge(self, agent: Agent, flight: Flight, spent: Spent) -> None:
        """Replace what was counted for a task by what it really took."""
        prompt = flight.prompt_tokens if spent.prompt_tokens is None else spent.prompt_tokens
        output = flight.output_tokens if spent.output_tokens is None else spent.output_tokens
        self._count_progress(agent, flight, spent.cost, prompt, output)
        self._count_release(agent, spent.cost - flight.task.cost)

    def _count_progress(self, agent: Agent, flight: Flight, attained: float, prompt: float, output: float) -> None:
        agent.attained = KvTokenIterations(agent.attained + attained - flight.attained)
        agent.prompt_tokens += prompt - flight.prompt_tokens
        agent.output_tokens += output - flight.output_tokens
        flight.attained = KvTokenIterations(attained)
        flight.prompt_tokens, flight.output_tokens = prompt, output

    def _count_release(self, agent: Agent, cost: float) -> None:
        agent.released = KvTokenIterations(agent.released + cost)
        tenant = agent.tenant
        tenant.start_tag = VirtualTime(tenant.start_tag + cost / tenant.weight)

    def _reconcile(self, agent: Agent, task: Task, cost: KvTokenIterations, agent_cost: KvTokenIterations) -> None:
        difference = KvTokenIterations(cost - task.cost)
        self._reference.correct(agent.tenant.id, agent.id, difference)
        agent.arrived = KvTokenIterations(max(0.0, agent.arrived + difference))
        agent.unfinished = KvTokenIterations(agent.unfinished - task.cost if agent.busy else 0.0)
        self._settle_tag(agent, agent_cost)
        if not agent.busy:
            agent.idle_since = self._reference.virtual_time(agent.tenant.id)
        if not self._tasks:
            self._reference.end_busy_period()

    def _settle_tag(self, agent: Agent, agent_cost: KvTokenIterations) -> None:
        """F = max(S + Ĉ/w, B), with Ĉ renewed as the constitution has it."""
        if agent.forming or agent.arrived > agent.predicted:
            agent.predicted = KvTokenIterations(max(agent_cost, agent.arrived))
        whole = VirtualTime(agent.start_tag + agent.predicted / agent.weight)
        agent.finish_tag = max(whole, self._reference.backlog_tag(agent.tenant.id, agent.id))
        self._ranking.moved(agent)
        self._ranking.place(agent)

    def _count_idleness(self, agent: Agent) -> None:
        """S moves with V while the agent has nothing to do, neither here nor in the reference."""
        since = max(agent.idle_since, self._reference.backlog_tag(agent.tenant.id, agent.id))
        waited = self._reference.virtual_time(agent.tenant.id) - since
        agent.start_tag = VirtualTime(agent.start_tag + max(0.0, waited))


def _restorable(standing: Standing) -> bool:
    amounts = (standing.predicted, standing.served, standing.prompt_tokens, standing.output_tokens)
    return (
        all(0 <= a < math.inf for a in amounts) and math.isfinite(standing.start_tag) and math.isfinite(standing.lift)
    )


def _sound(spent: Spent) -> bool:
    cost, prompt_tokens, output_tokens = spent
    return (
        0 <= cost < math.inf
        and (prompt_tokens is None or 0 <= prompt_tokens < math.inf)
        and (output_tokens is None or 0 <= output_tokens < math.inf)
    )
