"""When agents should be done: the work before them over the rate at which the engine works."""

from __future__ import annotations

from gateway.api.agents import estimated_finishes, state_of
from gateway.flowcontrol.fairqueue import AgentId, ReleaseLimits
from tests.flowcontrol.fairqueue.driver import Driver


def finishes_of(driver: Driver, work_per_s: float | None) -> dict[AgentId, float]:
    return estimated_finishes(driver.queue.agents.values(), driver.queue.in_order(), work_per_s)


def test_while_nobody_knows_how_fast_the_engine_is_nobody_knows_when() -> None:
    driver = Driver()
    driver.enqueue("a", 10)
    assert finishes_of(driver, None) == {}


def test_an_agent_waits_for_what_is_before_it_and_beside_it_and_for_itself() -> None:
    driver = Driver(limits=ReleaseLimits(beta=10, in_flight=1))
    running = driver.enqueue("running", 100, total=150)
    assert driver.release() == ["running"]
    driver.enqueue("large", 1000, total=1200)
    driver.enqueue("small", 20)
    finishes = finishes_of(driver, 10.0)
    assert driver.in_order() == ["small", "large"]
    assert finishes == {"small": 12.0, "large": 132.0, "running": 15.0}
    driver.observe(running, prompt=0, output=8)
    done = 8 * 9 / 2
    assert finishes_of(driver, 10.0)["small"] == (120 - done) / 10


def test_who_has_nothing_to_do_has_no_finish() -> None:
    driver = Driver()
    task = driver.enqueue("a", 10, total=50)
    driver.release()
    driver.complete(task, 10, 50)
    assert state_of(driver.queue.agents[AgentId("a")]) == "idle"
    assert finishes_of(driver, 10.0) == {}


def test_it_comes_true_where_nothing_else_happens() -> None:
    """One after the other at a steady rate, and each finishes when it was said at the beginning."""
    driver = Driver(limits=ReleaseLimits(beta=10, in_flight=1))
    tasks = {driver.enqueue(name, cost): cost for name, cost in (("a", 30), ("b", 10), ("c", 20))}
    said = finishes_of(driver, 5.0)
    now_s, came = 0.0, {}
    while len(came) < len(tasks):
        (release,) = driver.queue.release(driver.now)
        now_s += tasks[release.task.id] / 5.0
        driver.complete(release.task.id, tasks[release.task.id], tasks[release.task.id])
        came[release.task.agent_id] = now_s
    assert said == came
