"""What a task held may be known only after its answer: then the books are put right."""

from __future__ import annotations

import msgspec
import pytest
from gateway.flowcontrol.feedback import Feedback
from prometheus_client import CollectorRegistry

from gateway.flowcontrol.agents import AgentRecord
from gateway.flowcontrol.estimate import Estimate
from gateway.flowcontrol.fairqueue import (
    POLICIES,
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    Spent,
    Task,
    TaskId,
)
from gateway.flowcontrol.records import TenantUsage, UsageRow, hour_of
from gateway.flowcontrol.tool_waits import UNKNOWN, ToolWaits
from gateway.learning.accuracy import Accuracy
from gateway.protocol.identify import Identity, Roots
from gateway.state import Journal
from gateway.state.memory import MemoryStore
from gateway.telemetry.metrics import Metrics
from predictor.learned import Learned
from predictor.types import AgentPrediction, FinishedAgent, FinishedTask

NET = FinishedTask(40, 10, 0, 4).net_cost


class Scene:
    """An agent `a` with one task after the other, through queue and feedback."""

    def __init__(self, store: MemoryStore | None = None, begin_s: float = 0.0) -> None:
        self.now = begin_s
        self.queue = FairQueue(POLICIES["justitia"]())
        self.queue.set_capacity(Iterations(0), 1000)
        self.registry = CollectorRegistry()
        self.waits, self.store, self.accuracy = ToolWaits(), store or MemoryStore(), Accuracy()
        self.predictor = Learned()
        self.journal = Journal(self.store)
        self.kept: list[tuple[str, float]] = []
        self.corrected: list[float] = []
        self.roots = Roots()
        self.feedback = Feedback(
            self.queue,
            self.predictor,
            self.journal,
            Metrics(self.registry),
            self.accuracy,
            now=lambda: Iterations(self.now),
            waits=self.waits,
            keep=lambda agent_id, kv_tokens, *_: self.kept.append((agent_id, kv_tokens)),
            correct=self.correct,
            charge=self.charge,
            tenant_weight=lambda tenant: 1.0,
            restored=self.roots.restore,
            clock=lambda: self.now - begin_s,
            wall=lambda: 1e9 + self.now,
        )

    def charge(self, tenant: str, used: TenantUsage) -> UsageRow:
        return UsageRow(tenant, hour_of(1e9 + self.now), **msgspec.structs.asdict(used))

    def correct(self, agent_id: AgentId, difference: float) -> None:
        self.corrected.append(difference)
        self.queue.correct(Iterations(self.now), agent_id, KvTokenIterations(difference))

    def task(
        self,
        number: int,
        held: float | None = None,
        *,
        final: bool = False,
        awaited: bool = True,
        agent: str = "a",
        total: float = NET,
    ) -> AgentRecord:
        """Arrives, is released and ends at once."""
        task_id = TaskId(number)
        record = self.feedback.arrived("t", agent, Identity(agent, "header", "kind", final))
        agent_id = record.id
        self.queue.enqueue(
            Iterations(self.now), Task(task_id, agent_id, KvTokenIterations(NET), 14, 10), KvTokenIterations(total)
        )
        estimate = Estimate(NET, 14, 10, AgentPrediction(total, 2 * total, "told"), None, b"")
        self.feedback.accepted(record, estimate, final=final)
        self.queue.release(Iterations(self.now))
        finished = FinishedTask(40, 10, 0, 4, held=held)
        self.queue.complete(
            Iterations(self.now), task_id, Spent(KvTokenIterations(finished.cost)), KvTokenIterations(finished.cost)
        )
        used = TenantUsage(1, 10, 0, 4, finished.cost)
        self.feedback.ended(record, finished, task_id if awaited else None, used)
        return record

    async def recall(self) -> None:
        await self.journal.start(self.feedback.recall, self.feedback.rewrite)

    @property
    def charged(self) -> float:
        value = self.registry.get_sample_value("justitia_observed_cost_token_iterations_total", {"agent_class": "kind"})
        return value or 0.0

    async def learned(self) -> list[FinishedAgent]:
        await self.feedback.flush()
        return await self.store.newest(100)


async def test_what_is_known_at_the_end_is_charged_at_once() -> None:
    scene = Scene()
    scene.task(1, held=99.0)
    scene.task(2, awaited=False)
    assert scene.charged == 99 + NET
    assert not scene.feedback.awaited and scene.corrected == []


async def test_what_comes_later_corrects_what_was_charged() -> None:
    scene = Scene()
    record = scene.task(1)
    assert scene.charged == 0
    before = scene.queue.agents[record.id].arrived
    scene.feedback.held(TaskId(1), 500.0)
    assert scene.charged == 500 and scene.corrected == [500 - NET]
    assert scene.queue.agents[record.id].arrived == before + 500 - NET
    assert [task.cost for task in record.tasks] == [500] and not record.awaited
    with pytest.raises(KeyError):
        scene.feedback.held(TaskId(1), 500.0)


async def test_an_agent_that_is_done_is_learned_from_when_its_costs_are_known() -> None:
    scene = Scene()
    scene.task(1)
    scene.task(2, final=True)
    scene.feedback.held(TaskId(2), 700.0)
    assert scene.feedback.records and await scene.learned() == []
    scene.feedback.held(TaskId(1), 300.0)
    assert [agent.cost for agent in await scene.learned()] == [1000]
    assert not scene.feedback.records and not scene.feedback.awaited


async def test_an_engine_that_never_says_it_does_not_keep_an_agent_for_ever() -> None:
    scene = Scene()
    scene.task(1, final=True)
    scene.feedback.sweep(idle_s=300)
    assert [agent.cost for agent in await scene.learned()] == [NET]
    assert scene.charged == NET and not scene.feedback.awaited


async def test_an_idle_agents_kv_is_kept_and_its_wait_is_learned() -> None:
    scene = Scene()
    scene.task(1, held=1.0)
    assert scene.kept == [("t/a", 14)]
    scene.now = 30.0
    scene.task(2, held=1.0)
    assert scene.waits.worth_keeping("t", "kind") == 31
    scene.now = 1000.0
    scene.feedback.sweep(idle_s=300)
    scene.task(3, held=1.0, final=True)
    assert len(scene.kept) == 2, "who says that it is done does not come back"
    assert ToolWaits().worth_keeping("t", "kind") == UNKNOWN


async def test_what_is_kept_tells_when_and_what_was_said_and_what_was_predicted_is_judged() -> None:
    scene = Scene()
    record = scene.task(1, held=NET)
    scene.feedback.released(record, NET)
    record.expected_tasks = 2
    scene.now = 30.0
    scene.task(2, held=3 * NET, final=True)
    (agent,) = await scene.learned()
    assert (agent.arrived_at, agent.weight, agent.expected_tasks) == (1e9, 1.0, 2)
    ratio = scene.registry.get_sample_value("justitia_agent_cost_ratio_sum", {"source": "model"})
    assert ratio == pytest.approx(4), "predicted at its first release, not at its second"
    below = scene.registry.get_sample_value("justitia_agents_below_p90_total", {"source": "model"})
    assert below == 0
    assert scene.accuracy.error("told") == (1, 0.75)


async def test_what_a_tenant_has_used_is_kept_by_the_hour_and_put_right_later() -> None:
    scene = Scene()
    scene.task(1)
    scene.task(2, held=100.0)
    scene.feedback.held(TaskId(1), 500.0)
    scene.now = 3600.0
    record = scene.feedback.arrived("t", "b", Identity("b", "header", "kind", False))
    scene.queue.enqueue(
        Iterations(scene.now), Task(TaskId(3), record.id, KvTokenIterations(NET), 14), KvTokenIterations(NET)
    )
    scene.queue.cancel(Iterations(scene.now), TaskId(3), Spent(KvTokenIterations(7.0)))
    scene.feedback.ended(record, None, None, TenantUsage(requests=1, kv_cost=7.0))
    await scene.feedback.flush()
    hour = int(1e9 // 3600) * 3600
    assert await scene.store.usage(0, 2**60) == [
        UsageRow("t", hour, 2, 20, 0, 8, 600.0),
        UsageRow("t", hour + 3600, 1, 0, 0, 0, 7.0),
    ]
    assert await scene.store.usage(0, 2**60, "default") == []


async def test_an_agent_that_the_queue_does_not_know_is_billed_nevertheless(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    record = scene.feedback.arrived("t", "a", Identity("a", "header", "kind", False))
    scene.feedback.ended(record, None, None, TenantUsage(requests=1))
    await scene.feedback.flush()
    assert [used.requests for used in await scene.store.usage(0, 2**60)] == [1]
    assert "could not be found out" in caplog.text
