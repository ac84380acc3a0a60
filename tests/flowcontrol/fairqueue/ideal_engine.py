"""An ideal engine, driven by the fair queue, one iteration at a time.

It has memory for M tokens, no prefill and no blocks. A task with a prompt of p tokens that decodes d holds p + i tokens in its
i-th iteration, ends after d, and gives back all. Only the queue keeps it from holding more than M, as far as the predicted
lengths go. So of the assumptions of the bound only fragmentation is left: a task waits until it fits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.flowcontrol.fairqueue import (
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    Policy,
    ReleaseLimits,
    Spent,
    Task,
    TaskId,
    TenantId,
)
from gateway.replay.bound import Bound


def cost_of(prompt: int, decode: int) -> float:
    return prompt * decode + decode * (decode + 1) / 2


@dataclass(frozen=True)
class Job:
    """A task, and when it arrives: `at` iterations after the jobs `after` (their places in the list) have ended.

    guess: the decode length as predicted. patience: given up so many iterations after it arrived."""

    agent: str
    prompt: int
    decode: int
    at: int = 0
    after: tuple[int, ...] = ()
    guess: int | None = None
    patience: int | None = None

    @property
    def cost(self) -> float:
        return cost_of(self.prompt, self.decode)


@dataclass(frozen=True)
class Client:
    """Of an agent, what its tasks do not say. guess: its predicted total cost; None for the true one."""

    weight: float = 1.0
    tenant: str = ""
    tenant_weight: float = 1.0
    guess: float | None = None


@dataclass
class IdealEngine:
    policy: Policy
    memory: int
    jobs: Sequence[Job]
    clients: Mapping[str, Client] = field(default_factory=dict)
    now: int = 0

    def __post_init__(self) -> None:
        self.queue = FairQueue(self.policy, ReleaseLimits(beta=1.0, engine_waiting=None))
        self.queue.set_capacity(Iterations(0), self.memory)
        self.bound = Bound()
        self.totals: Counter[str] = Counter()
        for job in self.jobs:
            self.totals[job.agent] += job.cost
        self.finished: dict[str, int] = {}  # iterations done when its last task ended
        self.arrived: dict[str, int] = {}
        self.tags: dict[str, float] = defaultdict(float)  # the largest finish tag that the agent had
        self.history: list[Counter[str]] = []  # by iteration: tokens held by each agent
        self.waiting: list[int] = []  # by iteration: tasks
        self.virtual_times: list[float] = []  # by iteration, at its begin
        self._running: dict[int, int] = {}  # by job: tokens decoded
        self._ended: set[int] = set()
        self._arrivals: dict[int, list[int]] = defaultdict(list)
        self._departures: dict[int, list[int]] = defaultdict(list)
        self._pending = [len(job.after) for job in self.jobs]
        self._followers: dict[int, list[int]] = defaultdict(list)
        for number, job in enumerate(self.jobs):
            for before in job.after:
                self._followers[before].append(number)
            if not job.after:
                self._arrivals[job.at].append(number)

    def run(self, iterations: int | None = None) -> IdealEngine:
        """All jobs to their end, or for so many iterations."""
        most = self.now + iterations if iterations is not None else 100_000
        while self.now < most and len(self._ended) < len(self.jobs):
            self._step()
        assert iterations is not None or len(self._ended) == len(self.jobs)
        return self

    def _step(self) -> None:
        now = Iterations(self.now)
        for number in self._departures.pop(self.now, ()):
            if number not in self._ended:
                done = self._running.pop(number, 0)
                spent = Spent(KvTokenIterations(cost_of(self.jobs[number].prompt, done)))
                self.queue.cancel(now, TaskId(number), spent)
                self._end(number)
        for number in self._arrivals.pop(self.now, ()):
            self._arrive(now, number)
        for release in self.queue.release(now):
            number = release.task.id
            self._running[number] = 0
            job = self.jobs[number]
            self.bound.released(self.now, number, job.agent, job.cost, release.task.cost)
        self.virtual_times.append(self.queue.virtual_time())
        self.waiting.append(self.queue.waiting)
        self._iterate()

    def _iterate(self) -> None:
        held: Counter[str] = Counter()
        for number in self._running:
            self._running[number] += 1
            held[self.jobs[number].agent] += self.jobs[number].prompt + self._running[number]
        self.history.append(held)
        self.bound.served(held.total(), self.memory if self.queue.waiting else None)
        self.now += 1
        now = Iterations(self.now)
        for number, done in [*self._running.items()]:
            job = self.jobs[number]
            if done < job.decode:
                self.queue.observe(now, TaskId(number), job.prompt + done, done)
            else:
                del self._running[number]
                spent = Spent(KvTokenIterations(job.cost), job.prompt, done)
                self.queue.complete(now, TaskId(number), spent, self._guess(job.agent))
                self.bound.ended(self.now, number)
                self._end(number)

    def _arrive(self, now: Iterations, number: int) -> None:
        job = self.jobs[number]
        guess = job.guess if job.guess is not None else job.decode
        task = Task(
            TaskId(number),
            AgentId(job.agent),
            KvTokenIterations(cost_of(job.prompt, guess)),
            memory_tokens=job.prompt + guess,
            prompt_tokens=job.prompt,
        )
        client = self.clients.get(job.agent, Client())
        self.queue.enqueue(
            now,
            task,
            self._guess(job.agent),
            weight=client.weight,
            tenant=TenantId(client.tenant),
            tenant_weight=client.tenant_weight,
        )
        self.arrived.setdefault(job.agent, self.now)
        self._note_tag(job.agent)
        if job.patience is not None:
            self._departures[self.now + job.patience].append(number)

    def _end(self, number: int) -> None:
        agent = self.jobs[number].agent
        self._ended.add(number)
        self.finished[agent] = self.now
        self._note_tag(agent)
        for other in self._followers[number]:
            self._pending[other] -= 1
            if not self._pending[other]:
                # Who ends in an iteration has ended before the next one begins.
                self._arrivals[self.now + self.jobs[other].at].append(other)

    def _note_tag(self, agent: str) -> None:
        self.tags[agent] = max(self.tags[agent], self.queue.agents[AgentId(agent)].finish_tag)

    def _guess(self, agent: str) -> KvTokenIterations:
        guess = self.clients.get(agent, Client()).guess
        return KvTokenIterations(self.totals[agent] if guess is None else guess)

    # What can be said of a run

    def lateness(self, agent: str) -> int:
        """Iterations from when V had reached the agent's largest finish tag to its finish; below 0 if it was early."""
        tag = self.tags[agent] * (1 - 1e-9)
        reached = next((now for now, v in enumerate(self.virtual_times) if v >= tag), len(self.virtual_times))
        return self.finished[agent] - reached

    def late(self) -> dict[str, int]:
        """Who was later than the bound allows, and how late."""
        allowed = self.bound.iterations() + 1e-6
        return {agent: late for agent in self.finished if (late := self.lateness(agent)) > allowed}

    def served(self, *agents: str, since: int = 0, until: int | None = None) -> float:
        """Token·iterations."""
        return float(sum(held[agent] for held in self.history[since:until] for agent in agents))
