"""The reference against hand-worked cases, and against the fluid oracle."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.fairqueue.reference import Reference
from gateway.flowcontrol.fairqueue.types import AgentId, Iterations, KvTokenIterations, QueueError
from tests.flowcontrol.fairqueue.fluid import FluidGps

A, B = AgentId("a"), AgentId("b")


def cost(value: float) -> KvTokenIterations:
    return KvTokenIterations(value)


def at(value: float) -> Iterations:
    return Iterations(value)


def reference(capacity: float) -> Reference:
    made = Reference()
    made.set_capacity(capacity)
    return made


def test_known_fixture_two_agents_then_one() -> None:
    gps = reference(100)
    gps.arrive(A, cost(500), 1)
    gps.arrive(B, cost(1500), 1)
    gps.advance(at(10))
    assert gps.virtual_time == 500
    gps.advance(at(20))
    assert gps.virtual_time == 1500


def test_an_agent_leaves_when_v_reaches_its_end_not_when_it_really_finishes() -> None:
    gps = reference(100)
    gps.arrive(A, cost(100), 1)
    gps.advance(at(1))
    assert not gps.is_backlogged(A)
    gps.advance(at(50))
    assert gps.virtual_time == 100, "V stands still when nobody is backlogged"


def test_an_idle_agent_starts_again_at_v() -> None:
    gps = reference(10)
    gps.arrive(A, cost(10), 1)
    gps.arrive(B, cost(200), 1)
    gps.advance(at(10))  # A ended at τ=2 with V=10; then 8 iterations at slope 10
    assert gps.virtual_time == 90
    gps.arrive(A, cost(5), 1)
    assert gps.backlog_tag(A) == 95


def test_a_larger_true_cost_moves_the_end_back_and_can_make_backlogged_again() -> None:
    gps = reference(10)
    gps.arrive(A, cost(10), 1)
    gps.arrive(B, cost(100), 1)
    gps.advance(at(3))
    assert gps.virtual_time == 20 and not gps.is_backlogged(A)
    gps.correct(A, cost(30))
    assert gps.backlog_tag(A) == 40 and gps.is_backlogged(A)


def test_a_refund_moves_the_end_forward_and_can_end_the_backlog() -> None:
    gps = reference(10)
    gps.arrive(A, cost(100), 1)
    gps.arrive(B, cost(100), 1)
    gps.advance(at(4))
    gps.correct(A, cost(-90))
    assert not gps.is_backlogged(A)
    gps.advance(at(5))
    assert gps.virtual_time == 30, "B alone now: slope 10"


def test_end_of_a_busy_period_moves_v_to_the_largest_end() -> None:
    gps = reference(10)
    gps.arrive(A, cost(100), 1)
    gps.arrive(B, cost(300), 1)
    gps.end_busy_period()
    assert gps.virtual_time == 300 and not gps.is_backlogged(A) and not gps.is_backlogged(B)


def test_a_changed_weight_keeps_the_work_that_is_left() -> None:
    gps = reference(10)
    gps.arrive(A, cost(100), 1)
    gps.advance(at(5))
    gps.arrive(A, cost(0), 2)  # 50 left, at weight 2
    assert gps.backlog_tag(A) == 75
    gps.advance(at(10))
    assert not gps.is_backlogged(A)


def test_a_forgotten_agent_counts_until_v_has_reached_its_end() -> None:
    gps = reference(10)
    gps.arrive(A, cost(20), 1)
    gps.arrive(B, cost(100), 1)
    gps.forget(A)
    gps.advance(at(2))
    assert gps.virtual_time == 10, "A still takes its half"
    gps.advance(at(4))
    assert gps.backlog_tag(A) == gps.virtual_time == 20, "and is no longer known"
    gps.advance(at(5))
    assert gps.virtual_time == 30


def test_without_capacity_v_stands_still_and_the_clock_goes_on() -> None:
    gps = Reference()
    gps.arrive(A, cost(10), 1)
    gps.advance(at(5))
    assert gps.virtual_time == 0 and gps.now == 5


def test_a_clock_that_goes_back_is_refused() -> None:
    gps = reference(10)
    gps.advance(at(5))
    with pytest.raises(QueueError):
        gps.advance(at(4))
    assert gps.now == 5


events = st.lists(
    st.tuples(
        st.integers(0, 20),  # iterations until it happens
        st.sampled_from(["a", "b", "c", "d"]),
        st.integers(1, 500),  # work
    ),
    min_size=1,
    max_size=25,
)


@given(events, st.fixed_dictionaries({name: st.integers(1, 5) for name in "abcd"}), st.integers(1, 50))
def test_agrees_with_the_fluid_oracle(
    events: list[tuple[int, str, int]], weights: dict[str, int], capacity: int
) -> None:
    oracle = FluidGps(Fraction(capacity))
    gps = reference(capacity)
    now = 0
    for wait, agent, work in events:
        now += wait
        oracle.run_until(Fraction(now))
        gps.advance(at(now))
        assert gps.virtual_time == pytest.approx(float(oracle.served_per_weight), rel=1e-9, abs=1e-6)
        for name, left in oracle.left.items():
            unserved = max(0.0, gps.backlog_tag(AgentId(name)) - gps.virtual_time) * weights[name]
            assert unserved == pytest.approx(float(left), rel=1e-6, abs=1e-5)
        oracle.arrive(agent, Fraction(work), Fraction(weights[agent]))
        gps.arrive(AgentId(agent), cost(work), weights[agent])
    gps.advance(at(now + 10**6))
    assert not any(gps.is_backlogged(AgentId(name)) for name in "abcd")
