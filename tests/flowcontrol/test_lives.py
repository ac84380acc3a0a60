"""The life of an agent: its tasks, its idle times, its end, and a restart in the middle of it."""

from __future__ import annotations

import math

import msgspec
import pytest

import gateway.flowcontrol.agents
import gateway.flowcontrol.lives
from gateway.flowcontrol.agents import MAX_IDLE
from gateway.flowcontrol.fairqueue import AgentId, KvTokenIterations, Standing, VirtualTime
from gateway.flowcontrol.records import AgentRecord
from gateway.flowcontrol.tool_waits import UNKNOWN, ToolWaits
from gateway.protocol.body import parse_body
from gateway.protocol.errors import Outcome
from gateway.protocol.texts import content_of
from gateway.protocol.usage import Usage
from predictor.cost import task_cost
from predictor.features import SCHEMA
from predictor.learned import Learned
from predictor.types import AgentPrediction, FinishedTask
from tests.flowcontrol.scene import COST, SKETCH, WALL, Scene, kept

# Beginning and end


def test_an_agent_is_known_by_its_tenant_and_name_from_its_first_task() -> None:
    scene = Scene()
    scene.arrive("a", "red", agent_class=None, weight=3.0)
    scene.pass_s(5)
    scene.arrive("a", "blue", agent_class="other")
    scene.arrive("a", "red", agent_class="kind", expected_tasks=9, weight=7.0, source="body")
    scene.arrive("a", "red", agent_class="later")
    scene.check()
    red, blue = scene.agent("a", "red"), scene.agent("a", "blue")
    assert red is not None and blue is not None and scene.there() == {"red/a", "blue/a"}
    assert (red.arrived, red.first_arrival_s, red.last_end_s, red.record.arrived_at) == (3, 0, 0, WALL)
    record = red.record
    assert (record.agent_class, record.expected_tasks, record.source, record.name) == ("kind", 9, "header", "a")
    assert (record.run, blue.record.run, record.journal, record.schema) == ("", "", "j", SCHEMA)
    assert (blue.record.arrived_at, blue.record.agent_class) == (WALL + 5, "other")
    assert scene.queue.agents[red.id].weight == 3.0, "that of its first task"
    scene.arrive("a", "red", expected_tasks=11)
    scene.arrive("a", "red")
    assert record.expected_tasks == 11, "the newest that is declared"


def test_an_agent_that_is_declared_final_ends_with_its_last_task() -> None:
    scene = Scene()
    first, second, third = scene.released(), scene.released(final=True), scene.released()
    scene.counts(dict.fromkeys([first, second, third], 5.0))
    scene.settle(second)
    scene.pass_s(3)
    scene.settle(third)
    assert scene.seen.ended == [] and scene.there() == {"t/a"}
    scene.pass_s(4)
    scene.settle(first)
    (ended,) = scene.seen.ended
    assert (ended.jct_s, ended.record.answered, ended.record.settled) == (7, 3, 3)
    assert ended.finished is not None and ended.finished.cost == 15
    assert [step.over for step in scene.seen.steps] == [False, False, True]
    assert scene.there() == set() and scene.kept() == []
    scene.check_over()
    scene.serve(held=5.0)
    assert scene.seen.steps[-1].agent is not None and scene.seen.steps[-1].agent.run == "j-2", "and comes anew"


def test_an_agent_ends_when_it_has_been_idle_for_long_enough() -> None:
    scene = Scene()
    scene.serve("a", 5.0)
    scene.pass_s(100)
    scene.serve("b", 5.0)
    waiting = scene.arrive("c")
    scene.pass_s(199.9)
    scene.sweep()
    assert scene.there() == {"t/a", "t/b", "t/c"}
    scene.pass_s(0.1)
    scene.sweep()
    assert scene.there() == {"t/b", "t/c"}
    scene.pass_s(1000)
    scene.sweep()
    assert scene.there() == {"t/c"}, "one that has a task is not idle"
    assert [ended.jct_s for ended in scene.seen.ended] == [0, 0]
    scene.settle(waiting, Outcome.EXPIRED, None)
    scene.pass_s(299)
    scene.sweep()
    assert scene.there() == {"t/c"}
    assert [step.over for step in scene.seen.steps] == [False, False, True, True, False]
    scene.check_over()


def test_the_sweep_finds_all_that_are_over_wherever_they_stand() -> None:
    """One that is final and waits for its count stands behind others, and so does one that came back after a restart."""
    scene = Scene()
    scene.serve("a")
    scene.serve("b", final=True)
    assert scene.there() == {"t/a", "t/b"}
    scene.sweep()
    assert scene.there() == {"t/a"}
    scene.serve("c")
    scene.pass_s(100)
    scene.serve("a")
    anew = scene.restarted(150)
    assert list(anew.flow.agents.by_id) == ["t/a", "t/c"], "in the order of their arrival"
    anew.pass_s(50)
    anew.sweep()
    assert anew.there() == {"t/a"}


def test_a_tenant_with_too_many_idle_agents_has_the_longest_idle_ones_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.flowcontrol.agents, "MAX_IDLE", 3)
    scene = Scene()
    for number in range(4):
        scene.serve(f"a{number}", 5.0)
        scene.serve("other", 5.0, f"tenant{number}")
    busy = scene.arrive("busy")
    scene.serve("a0", 5.0)
    scene.sweep()
    assert {agent for agent in scene.there() if agent.startswith("t/")} == {"t/a0", "t/a2", "t/a3", "t/busy"}
    assert len(scene.there()) == 8, "those of other tenants stay"
    scene.sweep()
    assert len(scene.there()) == 8
    scene.settle(busy, Outcome.CANCELLED, None)
    scene.check_over()
    assert MAX_IDLE == 10_000


def test_an_agent_is_ended_from_outside() -> None:
    scene = Scene()
    idle, awaited = scene.serve("idle", 5.0), scene.serve("awaited")
    waiting = scene.arrive("busy")
    flying = scene.released("busy")
    busy = scene.agent("busy")
    assert busy is not None
    for agent in (idle, awaited, busy):
        tasks, effects = scene.flow.end_agent(agent)
        scene.take(effects)
        assert sorted(tasks) == ([waiting, flying] if agent is busy else [])
    assert scene.there() == {"t/busy"}, "also the one whose count has not come: what comes later begins a new agent"
    scene.check()
    for task in (waiting, flying):
        scene.settle(task, Outcome.CANCELLED, None)
    assert scene.there() == set() and [agent.cost for agent in scene.learned] == [5.0, COST]
    scene.check_over()


def test_an_agent_without_a_settled_task_leaves_no_step() -> None:
    scene = Scene()
    scene.arrive()
    assert scene.seen.steps == [] and scene.kept() == []
    agent = scene.agent()
    assert agent is not None and scene.flow.lives.rewrite(agent) == []


# What is learned from it


def test_an_agent_is_learned_from_with_all_of_its_tasks_in_the_order_of_their_arrival() -> None:
    scene = Scene()
    one = scene.released(expected_tasks=2, weight=2.0)
    scene.pass_s(1)
    other = scene.released()
    scene.counts({one: 5.0, other: 7.0})
    scene.settle(other)
    scene.settle(one)
    scene.pass_s(1000)
    scene.sweep()
    (agent,) = scene.learned
    assert [task.cost for task in agent.tasks] == [5, 7]
    assert (agent.agent_class, agent.tenant, agent.schema, agent.arrived_at) == ("kind", "t", SCHEMA, WALL)
    assert (agent.weight, agent.expected_tasks, scene.seen.ended[0].jct_s) == (2.0, 2, 1)


def test_it_is_judged_by_what_was_predicted_at_its_first_release() -> None:
    scene = Scene(slots=1)
    scene.scripted.total = 70.0
    first = scene.arrive()
    scene.scripted.total = 90.0
    second = scene.arrive()
    agent = scene.agent()
    assert agent is not None and agent.record.predicted is None
    scene.release()
    record = agent.record
    assert (record.predicted, record.judged) == (100.0, AgentPrediction(100.0, 180.0, "scripted")), "two tasks of 50"
    scene.settle(first)
    scene.scripted.total = 900.0
    third = scene.arrive()
    scene.release()
    assert (record.predicted, record.judged) == (100.0, AgentPrediction(100.0, 180.0, "scripted"))
    assert record.prediction == AgentPrediction(900.0, 1800.0, "scripted")
    for task in (second, third):
        scene.settle(task, Outcome.CANCELLED, None)
    scene.check_over()


def test_what_is_asked_of_the_predictor_is_how_far_the_agent_has_come() -> None:
    scene = Scene()
    scene.serve(held=30.0, agent_class=None)
    scene.arrive(agent_class="kind", expected_tasks=4)
    scene.arrive()
    first, second, third = scene.scripted.asked
    assert (first.agent_class, first.tenant, first.tasks_arrived, first.cost_arrived) == (None, "t", 0, 0)
    assert (second.agent_class, second.tasks_arrived, second.tasks_ended, second.returns) == ("kind", 1, 1, 0)
    assert (second.cost_arrived, second.cost_ended, second.expected_tasks) == (30, 30, 4)
    assert second.opening is SKETCH and second.latest is SKETCH and first.opening is first.latest is None
    assert (third.tasks_arrived, third.tasks_ended, third.returns) == (2, 1, 1)
    assert (third.cost_arrived, third.cost_ended, third.expected_tasks) == (30 + COST, 30, 4)


def test_an_agent_that_has_outgrown_its_prediction_is_predicted_anew_at_a_tasks_end() -> None:
    scene = Scene()
    scene.scripted.total, scene.scripted.grown = 60.0, 1000.0
    first, second = scene.released(), scene.released()
    known = scene.queue.agents[AgentId("t/a")]
    scene.counts({first: 40.0, second: 500.0})
    scene.settle(first)
    assert (known.arrived, known.predicted) == (90.0, 100.0) and len(scene.scripted.asked) == 2, "it stands"
    scene.settle(second)
    assert (known.arrived, known.predicted) == (540.0, 1000.0)
    asked = scene.scripted.asked[-1]
    assert (asked.cost_arrived, asked.cost_ended, asked.tasks_arrived) == (540.0, 40.0, 2)


def test_a_late_count_corrects_the_agent_and_ends_one_that_is_done() -> None:
    scene = Scene()
    tasks = [scene.released(), scene.released(), scene.released(final=True)]
    for task in tasks:
        scene.settle(task)
    agent = scene.agent()
    assert agent is not None and (agent.awaited, agent.cost_ended) == (3, 3 * COST)
    scene.counts({tasks[2]: 700.0, 999: 1.0})  # type: ignore[dict-item]
    assert (agent.awaited, agent.cost_ended) == (2, 2 * COST + 700)
    assert [task.cost for task in agent.tasks] == [COST, COST, 700]
    assert scene.queue.agents[agent.id].arrived == 2 * COST + 700
    scene.counts({tasks[0]: 300.0, tasks[1]: 0.0})
    assert [agent.cost for agent in scene.learned] == [1000]
    assert [step.over for step in scene.seen.steps] == [False] * 5 + [True]
    assert scene.seen.steps[-1].usage is not None and scene.kept() == []
    scene.check_over()


def test_an_agent_that_ends_without_its_counts_leaves_those_of_others_awaited() -> None:
    scene = Scene()
    scene.serve("a", final=True)
    scene.serve("b")
    scene.sweep()
    assert scene.there() == {"t/b"} and scene.charged == [COST]
    (task,) = scene.flow.agents.awaited
    scene.counts({task: 7.0})
    assert scene.charged == [COST, 7.0]
    scene.check_over()


def test_counts_that_will_not_come_are_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when the engine starts anew, nor when more of them are missing than can be on their way."""
    scene = Scene()
    for name in ("done", "lasting"):
        task = scene.released(name, final=name == "done")
        scene.settle(task)
    assert len(scene.flow.agents.awaited) == 2 and scene.there() == {"t/done", "t/lasting"}
    scene.life, scene.iteration = "life-2", 0
    scene.hello()
    assert not scene.flow.agents.awaited and scene.there() == {"t/lasting"}
    lasting = scene.agent("lasting")
    assert lasting is not None and lasting.awaited == 0 and len(scene.seen.charged) == 2
    monkeypatch.setattr("gateway.flowcontrol.lives.MAX_AWAITED", 3)
    for _ in range(5):
        scene.settle(scene.released("lasting"))
    assert len(scene.flow.agents.awaited) == lasting.awaited == 3 and len(scene.seen.charged) == 4


def test_an_agent_whose_tasks_the_store_has_lost_goes_on_and_is_not_learned_from() -> None:
    """A place is that of a task among all, and not among those that came back."""
    scene = Scene()
    for cost in (1.0, 2.0, 3.0):
        scene.serve("a", cost)
    (record,) = scene.kept()
    anew = Scene()
    why, effects = anew.flow.restore(anew.now, msgspec.structs.replace(record, tasks=record.tasks[:1]))
    anew.take(effects)
    agent = anew.agent()
    assert why is None and agent is not None and not agent.tasks and not agent.record.whole
    task = anew.released("a", final=True)
    anew.settle(task)
    anew.counts({task: 777.0})
    assert anew.there() == set() and anew.learned == [] and anew.seen.charged[-1].task.cost == 777


def test_a_late_count_does_not_end_an_agent_that_is_busy() -> None:
    scene = Scene()
    first = scene.released(final=True)
    scene.settle(first)
    second = scene.released()
    scene.counts({first: 7.0})
    assert scene.there() == {"t/a"}
    scene.counts({second: 7.0})
    scene.settle(second)
    assert scene.there() == set() and [agent.cost for agent in scene.learned] == [14.0]
    scene.check_over()


# Idle times


def test_an_idle_agents_kv_is_kept_for_as_long_as_such_agents_wait() -> None:
    scene = Scene(prefix_caching=True)
    scene.serve(held=1.0)
    assert scene.seen.keep == {"t/a": UNKNOWN} and not scene.queue._reservations
    scene.report(iterations=30, prefill_iterations=5.0)
    scene.serve(held=1.0)
    assert scene.seen.keep == {"t/a": 31} and scene.queue._reservations
    assert scene.flow.lives.waits.worth_keeping("t", "kind") == 31
    assert scene.flow.lives.waits.worth_keeping("other", "kind") == UNKNOWN
    scene.seen.keep.clear()
    failed = scene.released()
    scene.settle(failed, Outcome.CANCELLED, None)
    scene.serve(held=1.0, final=True)
    assert scene.seen.keep == {}, "neither after a failure, nor of one that does not come back"


@pytest.mark.parametrize("off", ["caching", "option", "deaf", "silent", "stock"])
def test_kv_is_not_kept_where_the_engine_cannot_or_is_not_to(off: str) -> None:
    scene = Scene(prefix_caching=off != "caching", linked=off != "stock")
    if off == "option":
        scene.flow.change(msgspec.structs.replace(scene.flow.options, keep_kv=False))
    if off == "deaf":
        scene.flow.link_closed()
    scene.serve()
    scene.report(iterations=30, prefill_iterations=5.0)
    if off == "silent":
        scene.pass_s(9)
        scene.flow.engine_checked(scene.now, True)
        scene.seen.keep.clear()
    scene.serve()
    assert scene.seen.keep == {} and not scene.queue._reservations


def test_how_long_agents_wait_and_whether_they_come_back_is_learned_by_class() -> None:
    scene = Scene()
    waits = scene.flow.lives.waits
    agent = scene.serve(held=1.0)
    assert agent.idle_since == 0 and agent.record.returns == 0
    scene.report(iterations=30)
    task = scene.released()
    assert agent.idle_since is None and agent.record.returns == 1
    scene.arrive()
    assert agent.record.returns == 1
    known = waits._classes.get("t", "kind")
    assert known is not None and (list(known.waits), list(known.came_back)) == ([30.0], [True])
    scene.settle(task)
    scene.pass_s(1000)
    scene.sweep()
    assert list(known.came_back) == [True], "it is busy"
    scene.serve("b", held=1.0)
    scene.pass_s(1000)
    scene.sweep()
    scene.serve("c", held=1.0, final=True)
    assert list(known.came_back) == [True, False], "one that says that it is done teaches nothing"


def test_kv_is_kept_until_nine_in_ten_are_back_and_not_for_the_longest() -> None:
    waits = ToolWaits()
    for iterations in range(1, 21):
        waits.came_back("t", "kind", float(iterations))
    assert waits.worth_keeping("t", "kind") == 1 + 19


# What is kept in memory


def test_an_agent_that_never_ends_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gateway.flowcontrol.agents, gateway.flowcontrol.lives):
        monkeypatch.setattr(module, "MAX_TASKS", 3)
    scene = Scene()
    first = scene.released()
    scene.settle(first)
    for _ in range(2):
        agent = scene.serve(held=2.0)
    assert len(agent.tasks) == 3 and agent.record.whole
    task = scene.released()
    scene.settle(task)
    assert not agent.tasks and not agent.record.whole and agent.record.answered == 4
    scene.serve(held=9.0)
    scene.counts({task: 5.0})
    scene.counts({first: 1.0})
    assert not agent.tasks and agent.cost_ended == 1 + 2 + 2 + 5 + 9
    assert [step.task is not None for step in scene.seen.steps] == [True] * 3 + [False] * 3 + [True]
    assert [step.place for step in scene.seen.steps] == [0, 1, 2, 0, 0, 0, 0]
    scene.check_over()
    anew = scene.restarted()
    again = anew.agent()
    assert again is not None and not again.tasks and again.record.answered == 5
    anew.serve(held=1.0)
    assert not again.tasks
    anew.serve(held=1.0, final=True)
    assert anew.learned == [] and anew.there() == set()


def test_texts_are_not_kept_in_memory_once_they_are_in_a_step() -> None:
    scene = Scene()
    first, second = scene.released(), scene.released()
    scene.settle(first, prompt="asked", system="told")
    scene.counts({first: 7.0, second: 7.0})
    scene.settle(second, prompt="asked", system="told")
    agent = scene.agent()
    assert agent is not None and {(task.prompt, task.system) for task in agent.tasks} == {(None, None)}
    texts = [step.task and (step.task.prompt, step.task.system) for step in scene.seen.steps]
    assert texts == [("asked", "told")] * 3, "also with the correction, which takes the first one's place in the store"
    anew = scene.restarted()
    agent = anew.agent()
    assert agent is not None and {(task.prompt, task.system) for task in agent.tasks} == {(None, None)}
    anew.serve(held=1.0, final=True)
    assert {(task.prompt, task.system) for task in anew.learned[0].tasks} == {(None, None)}


# A restart


def ahead(scene: Scene, agent: str) -> float:
    """What is left of it, in virtual time: F - B, as an idle agent's B stands still."""
    agent_id = AgentId(agent)
    return scene.queue.agents[agent_id].finish_tag - scene.queue.backlog_tag(agent_id)


def test_agents_are_there_again_and_stand_where_they_stood() -> None:
    scene = Scene()
    scene.scripted.total = 900.0
    scene.serve("a", COST)
    scene.scripted.total = 500.0
    scene.serve("b", COST)
    scene.pass_s(5)
    scene.serve("a", 2 * COST)
    anew = scene.restarted()
    assert list(anew.flow.agents.by_id) == ["t/a", "t/b"]
    for agent_id, before in scene.flow.agents.by_id.items():
        after = anew.flow.agents.by_id[agent_id]
        assert after.tasks == before.tasks and after.cost_ended == before.cost_ended
        assert (after.record.run, after.record.journal) == (before.record.run, "k")
        assert (after.record.arrived_at, after.record.prediction) == (
            before.record.arrived_at,
            before.record.prediction,
        )
        gone = {"opening": None, "latest": None}
        assert after.progress(COST) == msgspec.structs.replace(before.progress(COST), **gone)
        assert after.last_end_s - after.first_arrival_s == before.last_end_s - before.first_arrival_s
        assert after.first_arrival_s == -105.0, "on the new clock, which has just begun"
        assert ahead(anew, agent_id) == ahead(scene, agent_id)
        assert anew.queue.agents[agent_id].attained == scene.queue.agents[agent_id].attained
    anew.check_over()


def test_it_goes_on_and_is_learned_from_once_with_all_of_its_tasks() -> None:
    scene = Scene()
    scene.serve(held=COST)
    scene.serve(held=COST)
    unfinished = scene.arrive()
    anew = scene.restarted()
    agent = anew.agent()
    assert agent is not None and (agent.arrived, agent.idle_since) == (2, 0), "what was unfinished is given up"
    with pytest.raises(KeyError):
        anew.settle(unfinished)
    anew.report(iterations=7)
    anew.serve(held=5 * COST, final=True)
    (learned,) = anew.learned
    assert [task.cost for task in learned.tasks] == [COST, COST, 5 * COST]
    assert (learned.schema, learned.arrived_at, anew.seen.ended[0].jct_s) == (SCHEMA, WALL, 100)
    assert agent.record.returns == 2 and anew.kept() == []
    assert anew.restarted().there() == set()


def test_silence_counts_while_the_gateway_was_down() -> None:
    scene = Scene()
    scene.serve(held=COST)
    anew = scene.restarted(299)
    anew.sweep()
    assert anew.there() == {"t/a"}
    anew.pass_s(1)
    anew.sweep()
    assert anew.there() == set() and [agent.cost for agent in anew.learned] == [COST]


def test_a_wall_clock_that_was_put_back_makes_no_agent_younger_than_the_gateway() -> None:
    scene = Scene()
    scene.serve(held=COST)
    (record,) = scene.kept()
    anew = Scene(begin_s=-500.0)
    anew.flow.restore(anew.now, record)
    agent = anew.agent()
    assert agent is not None and (agent.first_arrival_s, agent.last_end_s) == (0, 0)


def test_one_that_was_done_and_only_waited_for_the_engines_count_ends_with_the_next_sweep() -> None:
    scene = Scene()
    scene.serve("b")
    scene.serve(final=True)
    anew = scene.restarted(1)
    agent = anew.agent()
    assert agent is not None and agent.idle_since is None
    anew.sweep()
    assert anew.there() == {"t/b"} and [agent.cost for agent in anew.learned] == [COST]
    assert anew.flow.lives.waits._classes.get("t", "kind") is None


def test_one_that_was_cut_short_is_not_learned_from_after_a_restart_either() -> None:
    scene = Scene()
    scene.serve(held=COST)
    scene.settle(scene.released(), Outcome.FAILED, None)
    anew = scene.restarted()
    anew.serve(held=COST, final=True)
    assert anew.learned == [] and len(anew.seen.ended) == 1 and anew.there() == set()


def test_rows_of_another_schema_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an upgrade in the middle of an agent's life."""
    scene = Scene()
    scene.serve(held=COST)
    monkeypatch.setattr(gateway.flowcontrol.lives, "SCHEMA", "another")
    anew = scene.restarted()
    anew.serve(held=COST, final=True)
    anew.serve(held=COST, final=True)
    assert [agent.schema for agent in anew.learned] == ["", "another"]


def test_the_weight_of_a_tenant_is_that_of_the_settings() -> None:
    from gateway.flowcontrol.quotas import NoLimits

    scene = Scene()
    scene.serve(held=COST)
    anew = scene.restarted(limits={"t": NoLimits(weight=4.0)})
    assert anew.queue.agents[AgentId("t/a")].tenant.weight == 4.0


@pytest.mark.parametrize("how", ["id taken", "cut in two", "no standing", "impossible standing"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_cannot_be_put_back_has_ended(how: str, whole: bool) -> None:
    scene = Scene()
    scene.pass_s(10)
    scene.serve(held=COST)
    scene.pass_s(5)
    scene.serve(held=COST)
    if not whole:
        scene.settle(scene.released(), Outcome.FAILED, None)
    (record,) = scene.kept()
    anew = Scene(begin_s=100.0, journal="k")
    if how == "id taken":
        anew.serve(held=COST)
    if how == "no standing":
        record.standing = None
    if how == "impossible standing":
        record.standing = Standing(-1.0, KvTokenIterations(1), KvTokenIterations(1), VirtualTime(0), 0, 0, 0, False)
    there = anew.there()
    why, effects = anew.flow.restore(anew.now, record, newest=how != "cut in two")
    anew.take(effects)
    assert why is not None and anew.there() == there
    (ended,) = anew.seen.ended
    assert (ended.jct_s, ended.backlog_tag) == (5, 0)
    assert [agent.cost for agent in anew.learned] == [2 * COST] * whole
    step = anew.seen.steps[-1]
    assert step.over and step.agent is not None and step.agent.tasks == () and step.usage is None
    assert kept([*scene.seen.steps, step]) == []


def test_one_that_was_put_back_belongs_to_the_gateway_that_put_it_back() -> None:
    scene = Scene()
    scene.serve(held=COST)
    anew = scene.restarted()
    (record,) = anew.kept()
    assert (record.journal, record.whole, record.settled, len(record.tasks)) == ("k", True, 1, 1)


def test_a_store_that_has_lost_everything_is_given_the_agents_again() -> None:
    scene = Scene()
    scene.serve("a", 3.0)
    scene.serve("a", 5.0)
    scene.settle(scene.released("a"), Outcome.FAILED, None)
    ended = scene.serve("b", 7.0, final=True)
    busy = scene.arrive("c")
    expected = scene.kept()
    assert [record.id for record in expected] == ["t/a"]
    steps = [step for agent in [*scene.flow.agents, ended] for step in scene.flow.lives.rewrite(agent)]
    scene.seen.steps.clear()
    for step in steps:
        assert (step.agent is None) == (step.task is not None) and not step.over
    tasks = {step.place: step.task for step in steps if step.task is not None}
    (record,) = [step.agent for step in steps if step.agent is not None]
    assert {step.run for step in steps if step.agent is None} == {record.run}
    assert [tasks[place] for place in sorted(tasks)] == expected[0].tasks
    assert msgspec.structs.replace(record, tasks=expected[0].tasks) == expected[0]
    scene.settle(busy, Outcome.CANCELLED, None)


def test_a_record_survives_as_it_is() -> None:
    task = FinishedTask(40, 10, 0, 4)
    standing = Standing(1.0, KvTokenIterations(90), KvTokenIterations(50), VirtualTime(-7), 6, 5, 4, False)
    record = AgentRecord(
        run="r-1",
        journal="j",
        id="red/a",
        name="a",
        tenant="red",
        source="x-agent-id",
        standing=standing,
        arrived_at=WALL,
        last_end_at=WALL + 10,
        settled=2,
        answered=1,
        agent_class="kind",
        final=False,
        whole=False,
        returns=1,
        expected_tasks=9,
        predicted=7.0,
        prediction=AgentPrediction(1.0, 2.0, "ladder"),
        judged=AgentPrediction(3.0, 4.0, "model"),
        schema=SCHEMA,
        aliases=("x", "y"),
        tasks=(task,),
    )
    packed = msgspec.msgpack.encode(record)
    scene = Scene(begin_s=50.0, journal="k")
    _, effects = scene.flow.restore(scene.now, msgspec.msgpack.decode(packed, type=AgentRecord))
    scene.take(effects)
    (agent,) = scene.flow.agents
    assert (agent.id, agent.arrived, agent.awaited, agent.cost_ended) == ("red/a", 2, 0, task.cost)
    assert (agent.first_arrival_s, agent.last_end_s, agent.tasks) == (-50, -40, [task])
    (written,) = [step.agent for step in scene.seen.steps if step.agent is not None]
    assert written == msgspec.structs.replace(record, journal="k", tasks=())
    assert [scene.flow.agents.roots.root_of("red", name, None) for name in ("x", "y", "z")] == ["a", "a", "z"]


def test_a_predictor_copes_without_the_sketches() -> None:
    """The next task that arrives counts as the first one."""
    scene = Scene(predictor=Learned())
    content = content_of(parse_body(b'{"messages": [{"role": "user", "content": "Name 12 rivers."}]}'))
    scene.serve(held=COST, content=content)
    learned = Learned()
    anew = scene.restarted(predictor=learned)
    before, agent = scene.agent(), anew.agent()
    assert before is not None and before.opening is not None and agent is not None
    progress = agent.progress(COST)
    assert (progress.opening, progress.latest, progress.tasks_arrived) == (None, None, 1)
    arrival = learned.arrive(content, progress)
    assert arrival.agent.cost > COST and math.isfinite(arrival.agent.cost)
    assert len(arrival.numbers) == len(learned.arrive(content, before.progress(COST)).numbers)
    assert learned.predict_agent(progress).cost >= COST
    anew.serve(held=COST, content=content, final=True)
    assert len(anew.learned) == 1


def test_usage_of_today_counts_again_after_a_restart_and_that_of_yesterday_does_not() -> None:
    from gateway.flowcontrol.quotas import NoLimits
    from gateway.protocol.errors import QuotaSpent

    limits = {"t": NoLimits(kv_per_day=3 * task_cost(10, 4))}
    scene = Scene(limits=limits, begin_s=86_400 - WALL % 86_400 - 10)
    scene.serve(held=2 * COST)
    scene.pass_s(20)
    scene.settle(scene.released(), usage=Usage(10, 4, 0))
    rows = [step.usage for step in scene.seen.steps if step.usage is not None]
    anew = scene.restarted(limits=limits)
    anew.flow.restore_use(anew.now, rows)
    (account,) = anew.quotas
    assert account.kv_today.used(anew.now.wall_s) == COST
    anew.serve(held=2 * COST)
    with pytest.raises(QuotaSpent):
        anew.arrive()
    anew.check_over()
