"""Each policy against a case worked by hand, in the spirit of the paper that it is from."""

from __future__ import annotations

import pytest

from gateway.flowcontrol.fairqueue import POLICIES, Iterations
from tests.flowcontrol.fairqueue.driver import ONE_AT_A_TIME, Driver


def test_there_are_seven() -> None:
    assert list(POLICIES) == ["justitia", "fcfs", "agent-fcfs", "vtc", "las", "sjf", "srjf"]


def rank(queue: Driver) -> tuple[str, float]:
    """Who goes next, and with what rank."""
    (release,) = queue.queue.release(queue.now)
    return release.task.agent_id, release.rank


def test_justitia_is_the_order_in_which_fair_sharing_would_finish_them() -> None:
    """Two agents from the beginning, and two at iteration 1, when V is 50."""
    queue = Driver("justitia")
    queue.enqueue("large", 50, total=900)
    queue.enqueue("middle", 50, total=250)
    queue.now = Iterations(1)
    queue.enqueue("late", 50, total=100)
    queue.enqueue("heavy", 50, total=300, weight=4)
    assert queue.in_order() == ["heavy", "late", "middle", "large"]
    assert [queue.tag(name) for name in queue.in_order()] == [125, 150, 250, 900]


def test_fcfs_takes_requests_as_they_come() -> None:
    queue = Driver("fcfs")
    for agent, cost in [("a", 900), ("b", 1), ("a", 5), ("c", 0), ("b", 700)]:
        queue.enqueue(agent, cost)
    assert queue.release() == ["a", "b", "a", "c", "b"]


def test_agent_fcfs_serves_the_first_application_to_its_end() -> None:
    """Also what it sends late: the request of b waited first, and still waits."""
    queue = Driver("agent-fcfs", ONE_AT_A_TIME)
    first = queue.enqueue("a", 900)
    queue.enqueue("b", 1)
    queue.enqueue("a", 900)
    assert queue.release() == ["a"]
    queue.complete(first, 900)
    late = queue.enqueue("a", 900)
    assert queue.release() == ["a"]
    queue.complete(late - 1, 900)  # type: ignore[arg-type]
    assert queue.release() == ["a"]
    queue.complete(late, 900)
    assert queue.release() == ["b"]


def test_vtc_charges_the_prompt_on_admission_and_twice_for_each_token_produced() -> None:
    queue = Driver("vtc", ONE_AT_A_TIME)
    a = queue.enqueue("a", 1, prompt=100)
    queue.enqueue("a", 1, prompt=1)
    queue.enqueue("b", 1, prompt=130)
    queue.enqueue("b", 1, prompt=1)
    assert rank(queue) == ("a", 0.0)
    assert queue.in_order() == ["b", "a"], "0 against 100"
    queue.observe(a, prompt=100, output=10)
    queue.complete(a, 1, prompt=100, output=20)
    assert rank(queue) == ("b", 0.0)
    assert queue.in_order() == ["b", "a"], "130 against 100 + 2 · 20"


def test_vtc_divides_by_the_weight() -> None:
    queue = Driver("vtc", ONE_AT_A_TIME)
    heavy = queue.enqueue("heavy", 1, prompt=100, weight=4)
    queue.enqueue("heavy", 1, prompt=100)
    assert rank(queue) == ("heavy", 0.0)
    queue.observe(heavy, prompt=100, output=50)
    queue.complete(heavy, 1, prompt=100, output=50)
    assert rank(queue) == ("heavy", 50.0), "(100 + 2 · 50) / 4"


def test_vtc_lifts_who_comes_back_to_the_least_of_those_that_wait() -> None:
    """c, new, and a, idle meanwhile, do not get ahead of b, but start level with it: 300."""
    queue = Driver("vtc", ONE_AT_A_TIME)
    a = queue.enqueue("a", 1, prompt=10)
    assert queue.release() == ["a"]
    queue.complete(a, 1, output=0)
    b = queue.enqueue("b", 1, prompt=290)  # lifted to 10, where a had left
    queue.enqueue("b", 1, prompt=10)
    assert rank(queue) == ("b", 10.0)
    queue.enqueue("c", 1, prompt=5)
    queue.enqueue("a", 1, prompt=5)
    queue.complete(b, 1, output=0)
    assert rank(queue) == ("a", 300.0), "the first among equals"
    assert [agent.lift for agent in queue.queue.agents.values()] == [290, 10, 300]


def test_vtc_lifts_to_who_left_last_when_nobody_waits() -> None:
    queue = Driver("vtc")
    a = queue.enqueue("a", 1, prompt=100)
    queue.release()
    queue.complete(a, 1, output=20)
    queue.enqueue("b", 1, prompt=1)
    assert rank(queue) == ("b", 140.0)


def test_vtc_does_not_lift_who_is_above() -> None:
    queue = Driver("vtc", ONE_AT_A_TIME)
    a = queue.enqueue("a", 1, prompt=100)
    queue.release()
    queue.enqueue("b", 1, prompt=1)
    queue.complete(a, 1, output=500)
    queue.enqueue("a", 1, prompt=1)
    assert queue.queue.agents["a"].lift == 0  # type: ignore[index]
    assert queue.in_order() == ["b", "a"], "b was lifted to 100, a has 1100"


def test_las_takes_the_agent_for_which_least_has_been_done_as_a_whole() -> None:
    """Costs 450 and 100: that b's next task is large does not count, nor that a has had more of them."""
    queue = Driver("las", ONE_AT_A_TIME)
    first = queue.enqueue("a", 100)
    queue.enqueue("a", 1)
    queue.release()
    second = queue.enqueue("b", 450)
    queue.enqueue("b", 1)
    queue.complete(first, 100)
    assert rank(queue) == ("b", 0.0)
    queue.complete(second, 450)
    assert rank(queue) == ("a", 100.0)


def test_las_divides_by_the_weight() -> None:
    queue = Driver("las", ONE_AT_A_TIME)
    task = queue.enqueue("a", 100, weight=4)
    queue.release()
    queue.enqueue("a", 1)
    queue.complete(task, 100)
    assert rank(queue) == ("a", 25.0)


def test_sjf_goes_by_the_task_also_inside_an_agent() -> None:
    queue = Driver("sjf")
    for agent, cost in [("a", 30), ("a", 10), ("b", 20), ("a", 25)]:
        queue.enqueue(agent, cost)
    releases = queue.queue.release(queue.now)
    assert [(release.task.agent_id, release.task.cost) for release in releases] == [
        ("a", 10),
        ("b", 20),
        ("a", 25),
        ("a", 30),
    ]


@pytest.mark.parametrize("policy", ["sjf", "srjf"])
def test_large_ones_may_starve(policy: str) -> None:
    queue = Driver(policy, ONE_AT_A_TIME)
    queue.enqueue("large", 1000)
    for number in range(100):
        small = queue.enqueue(f"small-{number}", 999)
        assert queue.release() == [f"small-{number}"]
        queue.complete(small, 999)


def test_srjf_goes_by_what_is_left_of_the_agent() -> None:
    """a: 1000 in total, 700 done. b: 400 in total."""
    queue = Driver("srjf", ONE_AT_A_TIME)
    task = queue.enqueue("a", 700, total=1000)
    assert rank(queue) == ("a", 1000.0)
    queue.enqueue("a", 300, total=0)
    queue.enqueue("b", 1, total=400)
    assert queue.in_order() == ["b", "a"], "nothing has been done as far as is known"
    queue.complete(task, 700)
    assert rank(queue) == ("a", 300.0)


@pytest.mark.parametrize(
    ("policy", "order"), [("vtc", ["b", "a"]), ("las", ["b", "a"]), ("srjf", ["a", "b"]), ("justitia", ["a", "b"])]
)
def test_what_the_engine_produces_counts_at_once_where_progress_decides(policy: str, order: list[str]) -> None:
    """Level before: then a's task has produced 30 tokens, and a moves back, or forward, or stays where it is."""
    queue = Driver(policy, ONE_AT_A_TIME)
    task = queue.enqueue("a", 1000, total=2000)
    queue.release()
    queue.enqueue("a", 1000)
    queue.enqueue("b", 1990, total=1990 if policy == "srjf" else 2000)
    assert queue.in_order() == (["b", "a"] if policy == "srjf" else ["a", "b"])
    queue.observe(task, prompt=5, output=30)
    assert queue.in_order() == order
    agent = queue.queue.agents["a"]  # type: ignore[index]
    assert (agent.attained, agent.output_tokens) == (5 * 30 + 30 * 31 / 2, 30)


@pytest.mark.parametrize("policy", ["vtc", "las", "srjf"])
def test_requeue_takes_back_what_was_counted(policy: str) -> None:
    """The engine lost all that it had done: a is first again, as in the beginning."""
    queue = Driver(policy, ONE_AT_A_TIME)
    task = queue.enqueue("a", 5000, total=5000, prompt=40)
    began = rank(queue)
    queue.observe(task, prompt=40, output=30)
    queue.queue.requeue(queue.now, task)
    agent = queue.queue.agents["a"]  # type: ignore[index]
    assert (agent.attained, agent.prompt_tokens, agent.output_tokens, agent.released) == (0, 0, 0, 0)
    if policy != "vtc":  # which lifts who comes back to where it left
        assert rank(queue) == began


def test_complete_replaces_guesses_by_what_was_spent() -> None:
    queue = Driver("vtc", ONE_AT_A_TIME)
    task = queue.enqueue("a", 500, total=500, prompt=40)
    queue.release()
    queue.observe(task, prompt=40, output=30)
    queue.complete(task, 123, prompt=44, output=7)
    agent = queue.queue.agents["a"]  # type: ignore[index]
    assert (agent.attained, agent.prompt_tokens, agent.output_tokens) == (123, 44, 7)
    assert (agent.released, agent.arrived) == (123, 123)


def test_cancel_leaves_what_was_really_done() -> None:
    queue = Driver("las", ONE_AT_A_TIME)
    task = queue.enqueue("a", 500, prompt=40)
    waiting = queue.enqueue("a", 500)
    queue.release()
    queue.observe(task, prompt=40, output=3)
    queue.cancel(task, cost=126)
    queue.cancel(waiting)
    agent = queue.queue.agents["a"]  # type: ignore[index]
    assert (agent.attained, agent.released, agent.arrived) == (126, 126, 126)
    assert (agent.prompt_tokens, agent.output_tokens) == (40, 3), "as far as the engine had said"


@pytest.mark.parametrize(("policy", "rank_of_a"), [("las", 60.0), ("srjf", 940.0)])
def test_cancel_of_a_waiting_task_charges_what_the_engine_had_done_before_it_lost_it(
    policy: str, rank_of_a: float
) -> None:
    """The work was done for the agent, though nothing came of it: las sees 60 more done, and srjf 60 less to do."""
    queue = Driver(policy, ONE_AT_A_TIME)
    lost = queue.enqueue("a", 500, total=1000)
    queue.enqueue("a", 300, total=1000)
    queue.release()
    queue.queue.requeue(queue.now, lost)
    queue.cancel(lost, cost=60)
    agent = queue.queue.agents["a"]  # type: ignore[index]
    assert (agent.attained, agent.released, agent.arrived) == (60, 60, 360)
    assert rank(queue) == ("a", rank_of_a)
