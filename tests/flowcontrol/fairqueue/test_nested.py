"""The reference of two levels: hand-worked cases, and agreement with the fluid oracle."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.fairqueue.nested import NestedReference
from gateway.flowcontrol.fairqueue.reference import Reference
from gateway.flowcontrol.fairqueue.types import AgentId, Iterations, KvTokenIterations, TenantId
from tests.flowcontrol.fairqueue.fluid import FluidTenants

X, Y = TenantId("x"), TenantId("y")
A, B = AgentId("a"), AgentId("b")


class Nested(NestedReference):
    """With plain numbers."""

    def __init__(self, capacity: float) -> None:
        super().__init__()
        self.set_capacity(capacity)

    def come(self, tenant: str, agent: str, work: float, weight: float = 1, tenant_weight: float = 1) -> None:
        self.arrive(TenantId(tenant), AgentId(agent), KvTokenIterations(work), weight, tenant_weight)

    def change(self, tenant: str, agent: str, difference: float) -> None:
        self.correct(TenantId(tenant), AgentId(agent), KvTokenIterations(difference))

    def unserved(self, tenant: str, agent: str, weight: float) -> float:
        tag = self.backlog_tag(TenantId(tenant), AgentId(agent))
        return max(0.0, tag - self.virtual_time(TenantId(tenant))) * weight


def test_two_agents_of_one_tenant_have_half_of_what_the_one_of_the_other_has() -> None:
    gps = Nested(10)
    gps.come("x", "a", 100)
    gps.come("x", "b", 100)
    gps.come("y", "a", 100)
    gps.advance(Iterations(4))
    assert (gps.virtual_time(X), gps.virtual_time(Y)) == (10, 20)
    assert gps.outer_virtual_time == 20


def test_what_a_tenant_leaves_goes_to_the_other() -> None:
    gps = Nested(10)
    gps.come("x", "a", 10)
    gps.come("y", "a", 100)
    gps.advance(Iterations(5))  # both have 10 after 2, then y has all
    assert (gps.virtual_time(X), gps.virtual_time(Y)) == (10, 40)
    gps.come("x", "b", 5)
    assert gps.backlog_tag(X, B) == 15, "an idle tenant's virtual time stood still"


def test_a_refund_to_an_agent_is_one_to_its_tenant() -> None:
    gps = Nested(10)
    gps.come("x", "a", 100)
    gps.come("y", "a", 100)
    gps.advance(Iterations(2))
    gps.change("x", "a", -95)  # 10 are served already, so 90 are given back
    gps.advance(Iterations(4))
    assert gps.virtual_time(Y) == 30, "alone since"


steps = st.lists(
    st.tuples(
        st.integers(0, 20),  # iterations until it happens
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from(["a", "b"]),
        st.integers(1, 300),  # work that arrives
        st.none() | st.integers(-300, 300),  # or a correction, where the agent is backlogged
        st.integers(1, 3),  # the tenant's weight, from now on
    ),
    min_size=1,
    max_size=25,
)


@given(steps, st.lists(st.integers(1, 4), min_size=6, max_size=6), st.integers(1, 50))
def test_agrees_with_the_fluid_oracle(
    steps: list[tuple[int, str, str, int, int | None, int]], weights: list[int], capacity: int
) -> None:
    weight_of = dict(zip([(tenant, agent) for tenant in "xyz" for agent in "ab"], weights, strict=True))
    oracle, gps, now = FluidTenants(Fraction(capacity)), Nested(capacity), 0
    for wait, tenant, agent, work, difference, tenant_weight in steps:
        now += wait
        oracle.run_until(Fraction(now))
        gps.advance(Iterations(now))
        for key, served in oracle.served_per_weight.items():
            assert gps.virtual_time(TenantId(key)) == pytest.approx(float(served), rel=1e-9, abs=1e-6)
        for key, left in oracle.left.items():
            assert gps.unserved(*key, weight_of[key]) == pytest.approx(float(left), rel=1e-6, abs=1e-5)
        if difference is None or oracle.left.get((tenant, agent), 0) < Fraction(1, 1000):
            weight = weight_of[tenant, agent]
            oracle.arrive(tenant, agent, Fraction(work), Fraction(weight), Fraction(tenant_weight))
            gps.come(tenant, agent, work, weight, tenant_weight)
        else:
            oracle.correct(tenant, agent, Fraction(difference))
            gps.change(tenant, agent, difference)


@given(steps, st.integers(1, 50))
def test_with_one_tenant_it_is_the_reference_without_levels(
    steps: list[tuple[int, str, str, int, int | None, int]], capacity: int
) -> None:
    """Any corrections, also of what has been served already, and whatever weight the tenant has."""
    plain, nested, now = Reference[AgentId](capacity), Nested(capacity), 0
    seen: set[str] = set()
    for wait, one, two, work, difference, tenant_weight in steps:
        now += wait
        agent = one + two
        plain.advance(Iterations(now))
        nested.advance(Iterations(now))
        if difference is None or agent not in seen:
            plain.arrive(AgentId(agent), KvTokenIterations(work), 1)
            nested.come("t", agent, work, 1, tenant_weight)
            seen.add(agent)
        else:
            plain.correct(AgentId(agent), KvTokenIterations(difference))
            nested.change("t", agent, difference)
        assert nested.virtual_time(TenantId("t")) == pytest.approx(plain.virtual_time, rel=1e-9, abs=1e-6)
        for name in seen:
            tag = nested.backlog_tag(TenantId("t"), AgentId(name))
            assert tag == pytest.approx(plain.backlog_tag(AgentId(name)), rel=1e-9, abs=1e-6)


def test_the_end_of_a_busy_period_ends_it_for_every_tenant() -> None:
    gps = Nested(10)
    gps.come("x", "a", 100)
    gps.come("x", "b", 30)
    gps.come("y", "a", 50)
    gps.advance(Iterations(1))
    gps.end_busy_period()
    assert gps.virtual_time(X) == gps.backlog_tag(X, A) == 100
    assert gps.virtual_time(Y) == gps.backlog_tag(Y, A) == 50
