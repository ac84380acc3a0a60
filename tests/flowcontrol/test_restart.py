"""What a gateway that was ended knows when it starts again: from the store alone, or from its journal."""

from __future__ import annotations

import msgspec
import pytest

import gateway.flowcontrol.agents
from gateway.flowcontrol.agents import AgentRecord, record_of, state_of
from gateway.flowcontrol.fairqueue import AgentId, Iterations, KvTokenIterations, Standing, Task, TaskId, VirtualTime
from gateway.flowcontrol.records import AgentRecord, Step
from gateway.protocol.body import parse_body
from gateway.protocol.identify import Identity
from gateway.protocol.texts import content_of
from gateway.state import StateError
from gateway.state.batch import fold
from gateway.state.memory import MemoryStore
from predictor.features import SCHEMA
from predictor.learned import Learned
from predictor.types import AgentPrediction, FinishedTask
from tests.flowcontrol.test_feedback import NET, Scene

LATER_S = 100.0


async def restarted(scene: Scene, pause_s: float = LATER_S) -> Scene:
    """With another clock, but the same wall."""
    await scene.feedback.flush()
    anew = Scene(scene.store, scene.now + pause_s)
    await anew.recall()
    return anew


def ahead(scene: Scene, agent: str) -> float:
    """What is left of it, in virtual time: F - B, as an idle agent's B stands still."""
    agent_id = AgentId(agent)
    return scene.queue.agents[agent_id].finish_tag - scene.queue.backlog_tag(agent_id)


async def test_agents_are_there_again_and_stand_where_they_stood() -> None:
    scene = Scene()
    scene.task(1, held=NET, agent="a", total=900)
    scene.task(2, held=NET, agent="b", total=500)
    scene.now = 5.0
    scene.task(3, held=2 * NET, agent="a")
    anew = await restarted(scene)
    assert anew.feedback.records.keys() == {"t/a", "t/b"}
    for agent, before in scene.feedback.records.items():
        after = anew.feedback.records[agent]
        assert after.tasks == before.tasks
        assert (after.run, after.arrived_at, after.prediction) == (before.run, before.arrived_at, before.prediction)
        assert after.progress(NET) == before.progress(NET)
        assert after.last_end_s - after.first_arrival_s == before.last_end_s - before.first_arrival_s
        assert after.first_arrival_s + 1e9 + 105.0 == before.arrived_at, "on the new clock, which has just begun"
        assert ahead(anew, agent) == ahead(scene, agent)
        assert anew.queue.agents[agent].attained == scene.queue.agents[agent].attained


async def test_an_agent_goes_on_and_is_learned_from_once_with_all_of_its_tasks() -> None:
    scene = Scene()
    scene.task(1, held=NET)
    scene.task(2, held=NET)
    anew = await restarted(scene)
    assert anew.predictor.ladder.history("kind", "t")[0] == 0, "it has not ended"
    anew.task(3, held=5 * NET, final=True)
    (agent,) = await anew.learned()
    assert [task.cost for task in agent.tasks] == [NET, NET, 5 * NET]
    assert (agent.schema, agent.arrived_at) == (SCHEMA, 1e9)
    assert anew.registry.get_sample_value("justitia_agent_jct_seconds_sum", {"agent_class": "kind"}) == LATER_S
    third = await restarted(anew)
    assert third.feedback.records == {}
    assert third.queue.agents == {}
    assert await third.learned() == [agent]
    told = [Learned(), Learned(), third.predictor]
    told[1].learn(agent)
    assert (
        told[2].ladder.history("kind", "t")
        == told[1].ladder.history("kind", "t")
        != told[0].ladder.history("kind", "t")
    )


async def test_silence_counts_while_the_gateway_was_down() -> None:
    scene = Scene()
    scene.task(1, held=NET)
    anew = await restarted(scene)
    anew.feedback.sweep(idle_s=LATER_S + 1)
    assert anew.feedback.records
    anew.feedback.sweep(idle_s=LATER_S - 1)
    assert not anew.feedback.records
    assert [agent.cost for agent in await anew.learned()] == [NET]


async def test_one_that_was_done_and_only_waited_for_the_engines_word_ends_with_the_next_sweep() -> None:
    scene = Scene()
    scene.task(1, final=True)
    assert scene.feedback.records
    anew = await restarted(scene)
    anew.feedback.sweep(idle_s=1e9)
    assert [agent.cost for agent in await anew.learned()] == [NET]


async def test_one_that_failed_once_is_not_learned_from_after_a_restart_either() -> None:
    scene = Scene()
    scene.feedback.ended(scene.task(1, held=NET), None)
    anew = await restarted(scene)
    anew.task(2, held=NET, final=True)
    assert await anew.learned() == []
    assert anew.feedback.records == {}


async def test_one_that_had_no_end_of_a_task_is_not_there_again() -> None:
    scene = Scene()
    scene.feedback.arrived("t", "a", Identity("a", "header", "kind", False))
    scene.queue.enqueue(
        Iterations(0), Task(TaskId(1), AgentId("t/a"), KvTokenIterations(NET), 14), KvTokenIterations(NET)
    )
    anew = await restarted(scene)
    assert anew.feedback.records == {}


async def test_rows_of_another_schema_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an upgrade in the middle of an agent's life."""
    scene = Scene()
    scene.task(1, held=NET)
    await scene.feedback.flush()
    monkeypatch.setattr(gateway.flowcontrol.agents, "SCHEMA", "another")
    anew = await restarted(scene)
    anew.task(2, held=NET, final=True)
    assert [agent.schema for agent in await anew.learned()] == [""]


async def test_an_agent_whose_id_came_again_while_the_store_was_away_was_cut_in_two() -> None:
    class Away(MemoryStore):
        away = False

        async def newest(self, limit: int) -> list:  # type: ignore[type-arg]
            if self.away:
                raise StateError("away")
            return await super().newest(limit)

    store = Away()
    scene = Scene(store)
    scene.task(1, held=NET, agent="a")
    scene.task(2, held=NET, agent="b")
    await scene.feedback.flush()
    store.away = True
    anew = Scene(store, LATER_S)
    await anew.recall()
    assert not anew.journal.up
    anew.task(3, held=7 * NET, agent="a")
    assert anew.feedback.records.keys() == {"t/a"}
    store.away = False
    await anew.feedback.flush()
    assert anew.journal.up
    assert anew.feedback.records.keys() == {"t/a", "t/b"}
    assert [agent.cost for agent in await anew.learned()] == [NET], "the first half"
    anew.task(4, held=NET, agent="a", final=True)
    assert [agent.cost for agent in await anew.learned()] == [NET, 8 * NET]
    assert {agent.id for agent in await store.agents()} == {"t/b"}


async def test_those_of_a_gateway_that_lives_are_left_to_it() -> None:
    scene = Scene()
    scene.task(1, held=NET)
    await scene.feedback.flush()
    other = Scene(scene.store)
    other.journal.live_journals.add(scene.journal.id)
    await other.recall()
    assert other.feedback.records == {}
    assert len(await scene.store.agents()) == 1


async def test_who_puts_an_agent_back_has_it_for_itself() -> None:
    scene = Scene()
    scene.task(1, held=NET)
    anew = await restarted(scene)
    (kept,) = await scene.store.agents()
    assert kept.journal == anew.journal.id
    assert (kept.tasks, kept.whole, kept.settled) == (anew.feedback.records[AgentId("t/a")].tasks, True, 1)
    other = Scene(scene.store)
    other.journal.live_journals.add(anew.journal.id)
    await other.recall()
    assert other.feedback.records == {}


async def test_what_cannot_be_put_back_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    record = scene.task(1, held=NET)
    nonsense = Standing(-1.0, KvTokenIterations(1), KvTokenIterations(1), VirtualTime(0), 0, 0, 0, False)
    await scene.feedback.flush()
    state = msgspec.structs.replace(state_of(record, nonsense, "j"), last_end_at=2e9)
    await scene.store.apply(fold([Step(agent=state)], "j", 1))
    anew = await restarted(scene)
    assert anew.feedback.records == {}
    assert [agent.cost for agent in await anew.learned()] == [NET]
    assert await scene.store.agents() == []


async def test_a_store_that_has_lost_everything_is_given_the_agents_again() -> None:
    scene = Scene()
    scene.task(1, held=NET, agent="a")
    await scene.recall()
    scene.task(2, held=NET, agent="b")
    await scene.feedback.flush()
    scene.store = scene.journal.store = MemoryStore()
    scene.task(3, held=NET, agent="a")
    await scene.feedback.flush()
    scene.task(4, held=NET, agent="b", final=True)
    assert [agent.cost for agent in await scene.learned()] == [2 * NET]
    (left,) = await scene.store.agents()
    assert (left.id, len(left.tasks), left.whole) == ("t/a", 2, True)


def test_a_record_survives_as_it_is() -> None:
    """All that is kept of it. Sketches are not, and what the engine had not said."""
    record = AgentRecord(
        AgentId("red/a"),
        "a",
        "x-agent-id",
        "kind",
        "red",
        first_arrival_s=50.0,
        last_end_s=60.0,
        arrived_at=1e9,
        run="r-1",
        aliases={"x", "y"},
        tasks_arrived=2,
        tasks_settled=2,
        final=True,
        whole=False,
        predicted=7.0,
        prediction=AgentPrediction(1.0, 2.0, "ladder"),
        judged=AgentPrediction(3.0, 4.0, "model"),
        tasks=[FinishedTask(40, 10, 0, 4)],
        tasks_accepted=2,
        cost_ended=FinishedTask(40, 10, 0, 4).cost,
        returns=1,
        expected_tasks=9,
    )
    standing = Standing(1.0, KvTokenIterations(9), KvTokenIterations(8), VirtualTime(-7), 6, 5, 4, False)
    state = state_of(record, standing, "journal")
    assert (state.name, state.tenant) == ("a", "red")
    packed = msgspec.msgpack.encode(msgspec.structs.replace(state, tasks=record.tasks))
    assert record_of(msgspec.msgpack.decode(packed, type=AgentRecord), 50.0) == record


async def test_a_predictor_copes_without_the_sketches() -> None:
    """The next task that comes counts as the first one."""
    scene = Scene()
    scene.task(1, held=NET)
    anew = await restarted(scene)
    progress = anew.feedback.records[AgentId("t/a")].progress(NET)
    assert (progress.opening, progress.latest, progress.tasks_arrived) == (None, None, 1)
    content = content_of(parse_body(b'{"messages": [{"role": "user", "content": "Name 12 rivers."}]}'))
    arrival = anew.predictor.arrive(content, progress)
    assert arrival.agent.cost > NET
    assert len(arrival.row) == len(Learned().arrive(content, scene.feedback.records[AgentId("t/a")].progress(NET)).row)
    assert anew.predictor.predict_agent(progress).cost >= NET
