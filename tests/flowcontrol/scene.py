"""Flow control as a test drives it: a clock that is moved by hand, an engine that reports what the test has it report, a
predictor that predicts what the test sets, and a ledger of all that comes out."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Mapping

import msgspec
import pytest

from engine.link import PROTOCOL, Hello, Report
from engine.link import Ended as EngineEnded
from gateway.flowcontrol import Arriving, Effects, Ending, FlowController, LiveAgent, Now, Options, Quotas, Settlement
from gateway.flowcontrol.estimate import Asked
from gateway.flowcontrol.fairqueue import POLICIES, AgentId, FairQueue, TaskId
from gateway.flowcontrol.quotas import Limits
from gateway.flowcontrol.records import AgentRecord, Step
from gateway.protocol.errors import Outcome
from gateway.protocol.usage import Usage
from predictor.cost import task_cost
from predictor.features import COLUMNS, PLAIN_COLUMNS, SKETCH_COLUMNS, row, sketch
from predictor.types import (
    AgentPrediction,
    AgentProgress,
    Arrival,
    FinishedAgent,
    FinishedTask,
    TaskContent,
    TaskPrediction,
)

WALL = 1e9  # seconds since 1970 at which each scene begins
PROMPT, DECODE = 10, 4  # tokens of a task
COST = task_cost(PROMPT, DECODE)
USAGE = Usage(PROMPT, DECODE, 0)
CONTENT = TaskContent(prompt_bytes=4 * PROMPT)
BLOCKS, BLOCK_SIZE = 100, 10
SKETCH = sketch(TaskContent(40))
NUMBERS = bytes(4 * (len(COLUMNS) - len(SKETCH_COLUMNS) - len(PLAIN_COLUMNS)))
ROW = row(SKETCH, SKETCH, NUMBERS).tobytes()


class Scripted:
    """A predictor that predicts what is set: `decode` tokens, and `total` for the agent."""

    def __init__(self) -> None:
        self.decode: float = DECODE
        self.total = 0.0  # of an agent, at each arrival
        self.grown = 0.0  # of an agent that has outgrown that
        self.asked: list[AgentProgress] = []

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival | None:
        self.asked.append(progress)
        task = TaskPrediction(content.prompt_bytes / 4, self.decode)
        return Arrival(task, AgentPrediction(self.total, 2 * self.total, "scripted"), SKETCH, NUMBERS)

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction | None:
        self.asked.append(progress)
        return AgentPrediction(self.grown, self.grown, "scripted")


class Scene:
    """One gateway's life. Its engine is up, reports over the link, holds 1,000 tokens, and runs 8 tasks at once."""

    def __init__(
        self,
        *,
        predictor: Asked | None = None,
        options: Options | None = None,
        policy: str = "justitia",
        limits: Mapping[str, Limits] | None = None,
        max_waiting: int = 100,
        max_waiting_bytes: int = 10**6,
        slots: int | None = None,  # declared by the settings; else the engine's own 8, and 4 that wait there
        linked: bool | None = True,  # False: a stock engine; None: nothing is known of it
        prefix_caching: bool = False,
        begin_s: float = 0.0,
        journal: str = "j",
    ) -> None:
        self.at_s = self._begin_s = begin_s  # since WALL
        self.scripted = Scripted()
        self.quotas = Quotas(max_waiting, max_waiting_bytes)
        self.quotas.set_limits(self.now, limits or {})
        self.queue = FairQueue(POLICIES[policy]())
        self.flow = FlowController(self.queue, self.quotas, predictor or self.scripted, options, journal=journal)
        self.seen = Effects()  # all that has come out
        self.earlier = 0  # of its steps: those that were there before a restart
        self.settlements: dict[TaskId, Settlement] = {}
        self.life, self.iteration = "life-1", 0
        self._linked, self._prefix_caching = linked, prefix_caching
        self._numbers = itertools.count(1)
        self.flow.engine.declared_max_num_seqs = slots
        self.flow.engine_checked(self.now, True)
        if linked is not None:
            self.hello()
            self.report(iterations=0)

    @property
    def now(self) -> Now:
        """On a monotonic clock that began with the scene."""
        return Now(round((self.at_s - self._begin_s) * 1e9), WALL + self.at_s)

    def pass_s(self, seconds: float) -> None:
        self.at_s += seconds

    # Tasks

    def arrive(self, agent: str = "a", tenant: str = "t", **more: object) -> TaskId:
        facts = {"source": "header", "agent_class": "kind", "content": CONTENT, **more}
        arriving = Arriving(id=TaskId(next(self._numbers)), tenant=tenant, agent=agent, **facts)  # type: ignore[arg-type]
        return self.flow.arrive(self.now, arriving).id

    def release(self) -> list[TaskId]:
        effects = self.take(self.flow.release(self.now))
        return [release.task.id for release in effects.releases]

    def released(self, agent: str = "a", tenant: str = "t", **more: object) -> TaskId:
        """A task that has arrived, and is in flight."""
        task_id = self.arrive(agent, tenant, **more)
        assert task_id in self.release()
        return task_id

    def settle(
        self, task_id: TaskId, outcome: Outcome = Outcome.COMPLETED, usage: Usage | None = USAGE, **more: object
    ) -> Settlement:
        ending = Ending(outcome, usage, **more)  # type: ignore[arg-type]
        settlement, effects = self.flow.settle(self.now, task_id, ending)
        self.take(effects)
        self.settlements[task_id] = settlement
        return settlement

    def lose(self, task_id: TaskId, *, reached: bool = True, retry: bool = True) -> bool:
        return self.flow.engine_lost(self.now, task_id, reached=reached, retry=retry)

    def serve(self, agent: str = "a", held: float | None = None, tenant: str = "t", **more: object) -> LiveAgent:
        """A task from its arrival to its end at once. held: what the engine counts for it, before its end."""
        task_id = self.released(agent, tenant, **more)
        live = self.flow.tasks[task_id].agent
        if held is not None:
            self.counts({task_id: held})
        self.settle(task_id)
        return live

    # The engine

    def hello(self, **more: object) -> None:
        facts = {"max_num_seqs": 8, "max_model_len": 4096, "prefix_caching": self._prefix_caching, **more}
        hello = Hello(PROTOCOL, self.life, "v", BLOCKS, BLOCK_SIZE, **facts)  # type: ignore[arg-type]
        self.take(self.flow.engine_reports(self.now, hello, linked=bool(self._linked)))

    def report(
        self,
        held: Mapping[TaskId, tuple[int, int]] | None = None,  # by task: KV tokens, and output tokens of them
        *,
        iterations: int = 1,
        held_blocks: int | None = None,
        **more: object,
    ) -> None:
        held = held or {}
        self.iteration += iterations
        blocks = sum(-(-kv // BLOCK_SIZE) for kv, _ in held.values()) if held_blocks is None else held_blocks
        columns = {
            "tasks": list(held),
            "kv_tokens": [kv for kv, _ in held.values()],
            "output_tokens": [output for _, output in held.values()],
        }
        facts = {"waiting": 0, "running": len(held), **columns, **more}
        report = Report(engine_id=self.life, iteration=self.iteration, free_blocks=BLOCKS - blocks, **facts)  # type: ignore[arg-type]
        self.take(self.flow.engine_reports(self.now, report, linked=bool(self._linked)))

    def counts(self, costs: Mapping[TaskId, float]) -> None:
        """The engine reports what tasks held that have ended there."""
        self.take(self.flow.engine_reports(self.now, EngineEnded(self.life, dict(costs))))

    # What has come out

    def take(self, effects: Effects) -> Effects:
        """Notes it. Steps are kept as they are written, since their records go on to change."""
        for name in Effects.__struct_fields__:
            new = getattr(effects, name)
            if name == "keep":
                self.seen.keep |= new
            elif name == "steps":
                self.seen.steps += [msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=Step) for step in new]
            else:
                getattr(self.seen, name).extend(new)
        return effects

    @property
    def learned(self) -> list[FinishedAgent]:
        return [ended.finished for ended in self.seen.ended if ended.finished is not None]

    @property
    def charged(self) -> list[float]:
        return [charged.task.cost for charged in self.seen.charged]

    def agent(self, name: str = "a", tenant: str = "t") -> LiveAgent | None:
        return self.flow.agents.by_id.get(AgentId(f"{tenant}/{name}"))

    def there(self) -> set[str]:
        return set(self.flow.agents.by_id)

    def kept(self) -> list[AgentRecord]:
        """The agents that a store has which took all steps, in the order of their arrival."""
        return kept(self.seen.steps)

    def sweep(self) -> None:
        self.take(self.flow.sweep(self.now))

    def restarted(self, pause_s: float = 100.0, **more: object) -> Scene:
        """Another gateway that has taken this one's place, with the same wall clock, and a monotonic clock of its own."""
        anew = Scene(begin_s=self.at_s + pause_s, journal="k", **more)  # type: ignore[arg-type]
        anew._numbers = self._numbers
        anew.seen.steps += self.seen.steps
        anew.earlier = len(self.seen.steps)
        for record in self.kept():
            why, effects = anew.flow.restore(anew.now, record)
            assert why is None
            anew.take(effects)
        return anew

    def contents(self) -> bytes:
        """All that flow control holds, down to the last private field: equal if, and only if, nothing has changed."""
        for account in self.quotas:  # what fills or begins anew with time does so when it is read
            account.tokens.opens_in_s(self.now.ns)
            account.kv_today.used(self.now.wall_s)
        return pickle.dumps({name: value for name, value in vars(self.flow).items() if name != "predictor"})

    # What always holds

    def check(self) -> None:
        """Nothing is lost, and the books agree with one another."""
        flow, queue = self.flow, self.queue
        waiting = {task_id for task_id, task in flow.tasks.items() if task.waiting}
        agents = queue.agents.values()
        assert {task_id for agent in agents for task_id in agent.waiting} == waiting
        assert {task_id for agent in agents for task_id in agent.in_flight} == flow.tasks.keys() - waiting
        assert set().union(*flow._deadlines.waiting.values()) <= waiting
        assert queue.agents.keys() == flow.agents.by_id.keys()
        self._check_loads()
        for agent in flow.agents:
            known, record = queue.agents[agent.id], agent.record
            assert agent.arrived == len(known.waiting) + len(known.in_flight) + record.settled
            assert record.answered <= record.settled and len(agent.tasks) in (0, record.answered)
            assert agent.awaited == sum(other is agent for other, _, _ in flow.agents.awaited.values())
            idle = flow.agents._idle.get(record.tenant, {})
            assert (agent.id in idle) == (not known.busy)
            assert agent.idle_since is None or not known.busy
        for agent, _, _ in flow.agents.awaited.values():
            assert flow.agents.by_id[agent.id] is agent, "what has ended has been charged"
        self._check_charges()

    def check_over(self) -> None:
        """Nothing of any task is left."""
        self.check()
        assert (self.queue.waiting, self.queue.in_flight, len(self.flow.tasks)) == (0, 0, 0)
        assert not self.flow._deadlines.waiting
        load = self.quotas.load
        assert (load.waiting, load.in_flight, load.waiting_bytes) == (0, 0, 0)

    def _check_loads(self) -> None:
        sums = [0, 0, 0]
        for account in self.quotas:
            mine = [task for task in self.flow.tasks.values() if task.account is account]
            waiting = [task for task in mine if task.waiting]
            load = account.load
            assert (load.waiting, load.in_flight) == (len(waiting), len(mine) - len(waiting))
            assert load.waiting_bytes == sum(task.body_bytes for task in waiting)
            sums = [sums[0] + load.waiting, sums[1] + load.in_flight, sums[2] + load.waiting_bytes]
        load = self.quotas.load
        assert sums == [load.waiting, load.in_flight, load.waiting_bytes]

    def _check_charges(self) -> None:
        """Each task is charged once: what its tenant has used is what it was settled with, or what was counted later."""
        rows = [step.usage for step in self.seen.steps[self.earlier :] if step.usage is not None]
        broken_off = sum(each.cost for each in self.settlements.values() if each.finished is None)
        awaited = sum(task.cost for _, _, task in self.flow.agents.awaited.values())
        assert sum(row.kv_cost for row in rows) == pytest.approx(broken_off + sum(self.charged) + awaited)
        assert len(self.charged) + len(self.flow.agents.awaited) == len(self.seen.completed)
        assert sum(row.requests for row in rows) == len(self.settlements)


def kept(steps: list[Step]) -> list[AgentRecord]:
    """The agents of a store that took these steps."""
    records: dict[str, AgentRecord] = {}
    tasks: dict[str, dict[int, FinishedTask]] = {}
    for step in steps:
        if step.agent is None:
            continue
        run = step.agent.run
        records[run] = step.agent
        if step.task is not None:
            tasks.setdefault(run, {})[step.place] = step.task
        if step.over:
            del records[run]
    return [
        msgspec.structs.replace(record, tasks=[task for _, task in sorted(tasks.get(run, {}).items())])
        for run, record in records.items()
    ]
