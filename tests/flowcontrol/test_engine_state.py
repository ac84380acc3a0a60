from __future__ import annotations

import math
from copy import deepcopy

import msgspec
import pytest

from engine.link import PROTOCOL, Ended, Hello, Report
from gateway.flowcontrol.engine_state import (
    CAPACITY_ENOUGH,
    CAPACITY_HORIZON,
    REMEMBERED_ENDS,
    Counters,
    EngineView,
    ServedCapacity,
)


def hello(life: str = "one") -> Hello:
    return Hello(PROTOCOL, life, "0.32.0", total_blocks=127, block_size=32, max_num_seqs=64, max_model_len=2048)


def report(iteration: int, life: str = "one", preempted: int = 0) -> Report:
    return Report(
        engine_id=life,
        iteration=iteration,
        free_blocks=100,
        running=2,
        waiting=1,
        preempted=preempted,
        tasks=[7, -1],
        kv_tokens=[50, 8],
        output_tokens=[3, 1],
    )


def test_a_report_before_hello_is_not_counted() -> None:
    view = EngineView()
    view.hear(report(5), 0)
    assert view.iterations == 0
    assert not view.reporting


def test_hello_and_report_tell_capacity_clock_and_what_is_held() -> None:
    view = EngineView()
    view.hear(hello(), 0)
    view.hear(report(1000), 0)
    view.hear(report(1005), 0)
    assert view.capacity_tokens == 127 * 32
    assert (view.engine_max_num_seqs, view.max_model_len) == (64, 2048)
    assert view.now == 5, "what the engine did before we came is not ours to count"
    assert (view.running, view.waiting, view.held_tokens) == (2, 1, 27 * 32)
    assert view.held[7].output_tokens == 3


def test_the_clock_goes_on_over_restarts_and_never_back() -> None:
    view = EngineView()
    view.hear(hello(), 0)
    view.hear(report(0), 0)
    view.hear(report(100, preempted=4), 0)
    view.hear(report(99), 0)  # late
    assert view.now == 100
    view.lost()
    assert view.held == {}
    view.hear(hello("two"), 0)
    view.hear(report(101, "one"), 0)  # of the engine that is gone
    view.hear(report(10, "two", preempted=1), 0)
    assert (view.now, view.counters.preempted, view.restarts) == (110, 5, 1)


def test_what_the_settings_declare_goes_over_what_the_engine_says() -> None:
    view = EngineView(declared_capacity_tokens=1000)
    view.hear(hello(), 0)
    assert view.capacity_tokens == 1000


METRICS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",num_gpu_blocks="459",engine="0"}} 1.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{{engine="0",le="+Inf"}} {iterations}
vllm:iteration_tokens_total_count{{engine="0"}} {iterations}
vllm:num_requests_running{{engine="0"}} 3.0
vllm:num_requests_waiting{{engine="0"}} 2.0
vllm:kv_cache_usage_perc{{engine="0"}} 0.5
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{{engine="0"}} 6.0
vllm:num_preemptions_created{{engine="0"}} 1.7e9
"""


def test_a_stock_engine_is_read_from_its_metrics() -> None:
    view = EngineView()
    view.read_metrics(METRICS.format(iterations=40), 0)
    view.read_metrics(METRICS.format(iterations=50), 0)
    assert view.capacity_tokens == 459 * 16
    assert (view.now, view.running, view.waiting, view.counters.preempted) == (10, 3, 2, 0)
    assert view.held_tokens == 459 * 16 / 2
    view.read_metrics(METRICS.format(iterations=8), 0)
    assert (view.now, view.restarts) == (18, 1)


@pytest.mark.parametrize("odd", ["<html>502 Bad Gateway</html>", '{"detail":"Not Found"}', "", "up 1\n"])
def test_odd_metrics_are_refused_and_change_nothing(odd: str) -> None:
    view = EngineView()
    view.read_metrics(METRICS.format(iterations=40), 0)
    with pytest.raises(ValueError, match=r".+"):
        view.read_metrics(odd, 0)
    view.read_metrics(METRICS.format(iterations=41), 0)
    assert (view.now, view.restarts) == (1, 0)


@pytest.mark.parametrize("value", ["NaN", "-100", "1e300", "1e17", "1.0.0"])
@pytest.mark.parametrize(
    "name", ["iteration_tokens_total_count", "num_requests_running", "kv_cache_usage_perc", "num_preemptions_total"]
)
def test_values_that_none_can_have_are_refused_and_change_nothing(name: str, value: str) -> None:
    view = EngineView()
    view.read_metrics(METRICS.format(iterations=40), 0)
    before = deepcopy(view)
    odd = f'vllm:cache_config_info{{num_gpu_blocks="9",block_size="9"}} 1\nvllm:{name} {value}\n'
    with pytest.raises(ValueError, match=r".+"):
        view.read_metrics(f"{odd}vllm:iteration_tokens_total_count 41", 1)
    assert view == before


def test_a_link_that_falls_silent_is_said_to_be_and_its_last_word_does_not_hold() -> None:
    view = EngineView()
    view.hear(hello(), 100)
    view.hear(report(5), 100)
    view.silent(104)
    assert view.reporting
    view.silent(106)
    assert not view.reporting
    assert (view.waiting, view.running, view.held) == (0, 0, {})
    view.hear(report(6), 107)
    assert view.reporting


def test_the_effective_capacity_is_the_whole_until_there_is_enough_to_go_by() -> None:
    served = ServedCapacity()
    assert served.tokens(1000) == 1000
    served.observe(CAPACITY_ENOUGH - 1, 600)
    assert served.tokens(1000) == 1000
    served.observe(1, 600)
    assert served.tokens(1000) == pytest.approx(600)


def test_the_effective_capacity_is_a_mean_over_iterations() -> None:
    at_once, one_by_one = ServedCapacity(), ServedCapacity()
    at_once.observe(300, 400)
    at_once.observe(100, 800)
    for _ in range(300):
        one_by_one.observe(1, 400)
    for _ in range(100):
        one_by_one.observe(1, 800)
    assert at_once.tokens(1000) == pytest.approx(500)
    assert one_by_one.tokens(1000) == pytest.approx(500)


def test_what_was_long_ago_counts_less_and_less() -> None:
    served = ServedCapacity()
    served.observe(100 * CAPACITY_HORIZON, 900)
    assert served.tokens(1000) == 900
    for _ in range(int(CAPACITY_HORIZON)):
        served.observe(1, 400)
    assert served.tokens(1000) == pytest.approx(400 + 500 / math.e, rel=0.01)
    served.observe(CAPACITY_HORIZON, 300)
    assert served.tokens(1000) == pytest.approx(300)


def test_the_effective_capacity_is_at_most_the_whole() -> None:
    served = ServedCapacity()
    served.observe(1000, 5000)
    assert served.tokens(1000) == 1000
    assert served.tokens(9000) == pytest.approx(5000)


@pytest.mark.parametrize("iterations", [0.0, -3.0])
def test_a_clock_that_stands_still_says_nothing_of_capacity(iterations: float) -> None:
    served = ServedCapacity()
    served.observe(1000, 600)
    served.observe(iterations, 0)
    assert served.tokens(1000) == 600


# Counters over lives


def counted(life: str, iteration: int, *counters: int) -> Report:
    names = ("preempted", "recomputed_tokens", "displaced", "displaced_tokens", "refused")
    return msgspec.structs.replace(report(iteration, life), **dict(zip(names, counters, strict=True)))


def test_counters_go_on_over_the_lives_of_the_engine() -> None:
    view = EngineView()
    view.hear(hello("one"), 0)
    view.hear(counted("one", 10, 5, 500, 2, 200, 7), 0)
    assert view.counters == Counters(), "what was counted before we came"
    view.hear(counted("one", 20, 6, 520, 3, 210, 7), 0)
    assert view.counters == Counters(1, 20, 1, 10, 0)
    view.hear(counted("one", 15, 1, 1, 1, 1, 1), 0)
    assert view.counters == Counters(1, 20, 1, 10, 0), "an old word"
    view.hear(counted("one", 20, 6, 520, 3, 210, 7), 0)
    assert view.counters == Counters(1, 20, 1, 10, 0), "and the last one again"
    view.hear(hello("one"), 0)  # for another subscriber
    view.hear(counted("one", 30, 7, 530, 3, 210, 8), 0)
    assert view.counters == Counters(2, 30, 1, 10, 1)
    view.hear(hello("two"), 0)
    view.hear(counted("two", 3, 4, 40, 1, 11, 2), 0)
    assert (view.counters, view.restarts) == (Counters(6, 70, 2, 21, 3), 1)
    view.hear(counted("one", 99, 99, 99, 99, 99, 99), 0)
    assert view.counters == Counters(6, 70, 2, 21, 3), "of the engine that is gone"


def test_what_is_kept_is_in_tokens() -> None:
    view = EngineView()
    view.hear(hello(), 0)
    view.hear(msgspec.structs.replace(report(1), kept_blocks=5), 0)
    assert view.kept_tokens == 5 * 32
    view.lost()
    assert view.kept_tokens == 0


# What tasks held


def test_what_a_task_held_is_the_sum_over_its_sequences_and_is_told_once() -> None:
    view = EngineView()
    view.hear(hello(), 0)
    view.hear(Ended("one", {7: 100.0, 8: 5.0}), 0)
    view.hear(Ended("one", {7: 20.5}), 0)
    assert view.held_by(7) == 120.5
    assert view.held_by(7) is None
    assert view.held_by(99) is None
    assert view.held_by(8) == 5.0
    assert not view.ends


def test_the_ends_of_another_engine_are_not_heard() -> None:
    view = EngineView()
    view.hear(Ended("one", {7: 100.0}), 0)
    view.hear(hello("one"), 0)
    view.hear(Ended("two", {8: 100.0}), 0)
    assert (view.held_by(7), view.held_by(8)) == (None, None)


def test_ends_that_nobody_asks_for_are_forgotten_the_oldest_first() -> None:
    view = EngineView()
    view.hear(hello(), 0)
    for task in range(REMEMBERED_ENDS + 10):
        view.hear(Ended("one", {task: 1.0}), 0)
    assert len(view.ends) == REMEMBERED_ENDS
    assert (view.held_by(9), view.held_by(10), view.held_by(REMEMBERED_ENDS + 9)) == (None, 1.0, 1.0)
    view.hear(Ended("one", dict.fromkeys(range(10**5, 10**5 + 2 * REMEMBERED_ENDS), 2.0)), 0)
    assert len(view.ends) == REMEMBERED_ENDS


def test_what_agents_hold_stands_until_it_is_said_anew_or_nothing_runs() -> None:
    view = EngineView()
    view.hear(hello(), 0)
    view.hear(msgspec.structs.replace(report(1), agents={"a": 12.5}), 0)
    view.hear(report(2), 0)
    assert view.agents == {"a": 12.5}
    view.hear(msgspec.structs.replace(report(3), running=0, tasks=[], kv_tokens=[], output_tokens=[]), 0)
    assert view.agents == {}
