"""The ideal engine itself, by hand."""

from __future__ import annotations

from gateway.flowcontrol.fairqueue import POLICIES
from tests.flowcontrol.fairqueue.ideal_engine import Client, IdealEngine, Job


def engine(*jobs: Job, memory: int = 100, **clients: Client) -> IdealEngine:
    return IdealEngine(POLICIES["justitia"](), memory, jobs, clients)


def test_a_task_holds_one_token_more_with_each_iteration() -> None:
    run = engine(Job("a", 10, 3)).run()
    assert [held["a"] for held in run.history] == [11, 12, 13]
    assert run.finished == {"a": 3}
    assert run.served("a") == 36 == run.jobs[0].cost


def test_a_task_waits_until_it_fits() -> None:
    """60 and 60 do not fit into 100: the second begins when the first has ended."""
    run = engine(Job("a", 50, 10), Job("b", 51, 9)).run()
    assert run.finished == {"b": 9, "a": 19}, "b is the smaller one"
    assert run.waiting == [1] * 9 + [0] * 10


def test_a_task_begins_before_the_other_has_ended_if_the_peak_to_come_fits() -> None:
    """At 5, b would be at 60 + 5 when a ends with 35; 100 is allowed, and b alone ends at 80."""
    run = engine(Job("a", 25, 10), Job("b", 60, 20)).run()
    assert run.finished == {"a": 10, "b": 25}
    assert max(held.total() for held in run.history) == 100


def test_a_stage_arrives_after_the_one_before_and_its_tool() -> None:
    run = engine(Job("a", 1, 5), Job("a", 1, 3), Job("a", 1, 4, at=7, after=(0, 1))).run()
    assert run.finished == {"a": 5 + 7 + 4}
    assert run.totals["a"] == 20 + 9 + 14


def test_who_loses_patience_leaves_waiting_or_in_flight() -> None:
    run = engine(Job("a", 90, 10, patience=4), Job("b", 90, 10, patience=3), Job("b", 90, 10, after=(1,))).run()
    assert run.finished == {"a": 4, "b": 14}
    assert run.served("a") == 91 + 92 + 93 + 94
    assert run.queue.agents["b"].arrived == run.queue.agents["b"].attained == run.jobs[2].cost  # type: ignore[index]


def test_a_wrong_prediction_is_found_out_at_the_end() -> None:
    run = engine(Job("a", 10, 8, guess=2), a=Client(guess=5)).run()
    assert run.tags["a"] == run.jobs[0].cost
    assert run.bound.terms()["E"] == run.jobs[0].cost - (10 * 2 + 3)


def test_lateness_is_counted_from_the_virtual_time_of_the_tag() -> None:
    """Both 10 iterations long, and each fills the cache alone. V reaches the first tag, 945, after about 19 iterations."""
    run = engine(Job("a", 89, 10), Job("b", 89, 10)).run()
    assert run.finished == {"a": 10, "b": 20}
    assert run.lateness("a") == -9 and run.lateness("b") == 1
