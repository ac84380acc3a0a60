"""The oracles themselves, against cases worked by hand."""

from fractions import Fraction

from tests.flowcontrol.fairqueue.fluid import FluidGps, FluidTenants


def test_two_equal_agents_share_and_the_longer_one_then_has_all() -> None:
    gps = FluidGps(capacity=Fraction(10))
    gps.arrive("long", Fraction(100))
    gps.arrive("short", Fraction(50))
    gps.run_until(Fraction(100))
    assert gps.finished == {"short": 10, "long": 15}


def test_weights_divide_the_capacity() -> None:
    gps = FluidGps(capacity=Fraction(10))
    gps.arrive("heavy", Fraction(90), weight=Fraction(3))
    gps.arrive("light", Fraction(30))
    gps.run_until(Fraction(100))
    assert gps.finished == {"heavy": 12, "light": 12}


def test_virtual_time_of_the_known_fixture() -> None:
    """M = 100, ten iterations with two agents and ten with one: V = 10·50 + 10·100."""
    gps = FluidGps(capacity=Fraction(100))
    gps.arrive("a", Fraction(500))
    gps.arrive("b", Fraction(1500))
    gps.run_until(Fraction(20))
    assert gps.served_per_weight == 1500


def test_nobody_is_backlogged_and_virtual_time_stands_still() -> None:
    gps = FluidGps(capacity=Fraction(10))
    gps.arrive("a", Fraction(10))
    gps.run_until(Fraction(50))
    assert gps.served_per_weight == 10


def test_tenants_share_first_however_many_agents_they_have() -> None:
    """10 a iteration: 5 for each tenant, so 2.5 for each of the two agents of the first. The last of it ends at 60 / 10."""
    gps = FluidTenants(capacity=Fraction(10))
    gps.arrive("many", "a", Fraction(10))
    gps.arrive("many", "b", Fraction(20))
    gps.arrive("one", "a", Fraction(30))
    gps.run_until(Fraction(100))
    assert gps.finished == {("many", "a"): 4, ("many", "b"): 6, ("one", "a"): 6}
    assert gps.served_per_weight == {"many": 20, "one": 30}


def test_weights_on_both_levels() -> None:
    """12 a iteration, 9 : 3 for the tenants, 6 : 3 inside the first. The second is alone from iteration 10 on."""
    gps = FluidTenants(capacity=Fraction(12))
    gps.arrive("heavy", "a", Fraction(60), Fraction(2), Fraction(3))
    gps.arrive("heavy", "b", Fraction(30), Fraction(1), Fraction(3))
    gps.arrive("light", "a", Fraction(90))
    gps.run_until(Fraction(100))
    assert gps.finished == {("heavy", "a"): 10, ("heavy", "b"): 10, ("light", "a"): 15}
    assert gps.served_per_weight == {"heavy": 30, "light": 90}


def test_a_correction_adds_work_or_takes_what_is_left() -> None:
    gps = FluidTenants(capacity=Fraction(10))
    gps.arrive("x", "a", Fraction(40))
    gps.arrive("y", "a", Fraction(40))
    gps.run_until(Fraction(2))
    gps.correct("x", "a", Fraction(-100))
    gps.correct("y", "a", Fraction(10))
    assert gps.left == {("x", "a"): 0, ("y", "a"): 40}
    gps.run_until(Fraction(100))
    assert gps.finished == {("y", "a"): 6}


def test_with_one_tenant_the_outer_level_vanishes() -> None:
    one, two = FluidGps(Fraction(7)), FluidTenants(Fraction(7))
    for then, agent, work, weight in [(0, "a", 30, 1), (1, "b", 50, 3), (5, "a", 9, 1), (30, "b", 4, 3)]:
        one.run_until(Fraction(then))
        two.run_until(Fraction(then))
        one.arrive(agent, Fraction(work), Fraction(weight))
        two.arrive("t", agent, Fraction(work), Fraction(weight), Fraction(5))
    one.run_until(Fraction(100))
    two.run_until(Fraction(100))
    assert two.finished == {("t", agent): when for agent, when in one.finished.items()}
    assert two.served_per_weight["t"] == one.served_per_weight
