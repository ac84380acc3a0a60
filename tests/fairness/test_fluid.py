"""The oracle itself, against cases worked by hand."""

from fractions import Fraction

from tests.fairness.fluid import FluidGps


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
