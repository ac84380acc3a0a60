"""How late an agent can be, with an ideal engine: never later than the bound, whatever arrives when, and however wrong the
predictions. The same check fails for a policy that does nothing, and for others where they are known to fail."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.flowcontrol.fairqueue import POLICIES, Agent, Policy, Task
from tests.flowcontrol.fairqueue.ideal_engine import Client, IdealEngine, Job, cost_of


class Nothing(Policy):
    """The control: it takes the agents as they come."""

    def rank(self, agent: Agent, head: Task) -> float:
        return 0.0


def run(
    policy: Policy | str, jobs: list[Job], clients: dict[str, Client] | None = None, memory: int = 600
) -> IdealEngine:
    made = policy if isinstance(policy, Policy) else POLICIES[policy]()
    return IdealEngine(made, memory, jobs, clients or {}).run()


def check(engine: IdealEngine) -> None:
    """Nobody finishes later than `Bound.iterations()` after V has reached its largest finish tag."""
    late = engine.late()
    assert not late, f"later than {engine.bound.iterations()} iterations: {late}"


def small(name: str, at: int = 0) -> Job:
    return Job(name, prompt=20, decode=10, at=at)


def an_elephant_then_mice() -> list[Job]:
    """The elephant is 500 iterations of the whole cache; 30 mice of one task each come soon after it."""
    return [small("elephant") for _ in range(1000)] + [small(f"mouse-{n}", at=10 + 10 * n) for n in range(30)]


def an_elephant_among_dogs() -> list[Job]:
    """Dogs, each a little smaller than the elephant, keep coming somewhat faster than they can be served."""
    jobs = [small("dog-0") for _ in range(36)]
    jobs += [Job("elephant", prompt=21, decode=11) for _ in range(36)]
    return jobs + [small(f"dog-{n}", at=13 * n) for n in range(1, 45) for _ in range(36)]


@pytest.mark.parametrize("scenario", [an_elephant_then_mice, an_elephant_among_dogs])
def test_justitia_keeps_to_the_bound(scenario: Any) -> None:
    check(run("justitia", scenario()))


@pytest.mark.parametrize(
    "policy",
    [Nothing(), "fcfs", "agent-fcfs", "sjf"],
    ids=lambda policy: str(policy) if isinstance(policy, str) else "control",
)
def test_mice_that_wait_for_the_elephant_break_it(policy: Policy | str) -> None:
    """The control that must fail, and those that are no better than it here: about 500 iterations, where 95 are allowed."""
    engine = run(policy, an_elephant_then_mice())
    with pytest.raises(AssertionError, match="mouse-0"):
        check(engine)
    assert len(engine.late()) == 30, "every mouse"
    assert engine.lateness("mouse-0") > 4 * engine.bound.iterations()


@pytest.mark.parametrize("policy", ["srjf", "las", "sjf"])
def test_an_elephant_that_starves_breaks_it(policy: str) -> None:
    """776 iterations, where 143 are allowed; the order of las has dogs starve, too."""
    engine = run(policy, an_elephant_among_dogs())
    with pytest.raises(AssertionError, match="elephant"):
        check(engine)
    assert engine.lateness("elephant") > 4 * engine.bound.iterations()


def test_who_comes_first_by_tokens_alone_breaks_it() -> None:
    """vtc shares evenly, so all dogs in the queue end late together."""
    with pytest.raises(AssertionError, match="dog"):
        check(run("vtc", an_elephant_among_dogs()))


factors = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])


@st.composite
def workloads(draw: st.DrawFn, *, wrong: bool) -> tuple[list[Job], dict[str, Client]]:
    """Agents of a few stages; the tasks of one arrive together, some time after those of the one before have ended."""
    jobs: list[Job] = []
    clients: dict[str, Client] = {}
    for number in range(draw(st.integers(1, 7))):
        name, stage, true = f"agent-{number}", (), 0.0
        for at in draw(st.lists(st.integers(0, 40) | st.just(0), min_size=1, max_size=4)):
            places = []
            for prompt, decode in draw(
                st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=8)
            ):
                guess = max(1, round(decode * draw(factors))) if wrong else None
                places.append(len(jobs))
                jobs.append(Job(name, prompt, decode, at, stage, guess))
                true += cost_of(prompt, decode)
            stage = tuple(places)
        weight = draw(st.sampled_from([0.5, 1.0, 1.0, 3.0]))
        clients[name] = Client(weight=weight, guess=true * draw(factors) if wrong else None)
    return jobs, clients


@settings(max_examples=80, deadline=None)
@given(workloads(wrong=False), st.integers(70, 300))
def test_with_exact_costs_nobody_is_later_than_the_bound(
    workload: tuple[list[Job], dict[str, Client]], memory: int
) -> None:
    engine = run("justitia", *workload, memory=memory)
    assert engine.bound.terms()["E"] == 0
    assert all(held.total() <= memory for held in engine.history), "nor does the engine hold more than it can"
    check(engine)


@settings(max_examples=80, deadline=None)
@given(workloads(wrong=True), st.integers(70, 300))
def test_with_wrong_costs_neither_with_what_was_in_flight_unforeseen(
    workload: tuple[list[Job], dict[str, Client]], memory: int
) -> None:
    check(run("justitia", *workload, memory=memory))
