"""A stock vLLM's `/metrics` become the messages that our scheduler would send; what is not vLLM's is refused."""

from __future__ import annotations

import pytest

from engine.link import Hello, Report
from gateway.flowcontrol.engine_state import EngineState
from gateway.relay.stock_metrics import StockMetrics

METRICS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}",engine="0"}} 1.0
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


def metrics(iterations: int, blocks: int = 458) -> str:
    return METRICS.format(iterations=iterations, blocks=blocks)


class Read:
    """A stock engine whose `/metrics` are read into what flow control knows of it."""

    def __init__(self) -> None:
        self.stock, self.state = StockMetrics(), EngineState()

    def read(self, exposition: str) -> None:
        for message in self.stock.messages(exposition):
            self.state.take(message, 0, linked=False)


def test_a_stock_engine_is_read_from_its_metrics() -> None:
    engine = Read()
    engine.read(metrics(40))
    engine.read(metrics(50))
    state = engine.state
    assert state.capacity_tokens == 458 * 16
    assert (state.now, state.running, state.waiting, state.counters.preempted) == (10, 3, 2, 0)
    assert state.held_tokens == 458 * 16 / 2
    assert (state.engine_max_num_seqs, state.max_model_len) == (None, None), "they are not in the metrics"
    assert state.reporting and not state.counts_held
    engine.read(metrics(8))
    assert (state.now, state.restarts) == (18, 1)


def test_a_hello_comes_first_and_again_with_another_size_or_life() -> None:
    stock = StockMetrics()
    kinds = [
        [type(message) for message in stock.messages(read)]
        for read in (metrics(40), metrics(41), metrics(42, blocks=900), metrics(43, blocks=900), metrics(1, blocks=900))
    ]
    assert kinds == [[Hello, Report], [Report], [Hello, Report], [Report], [Hello, Report]]


def test_another_size_is_no_other_life() -> None:
    engine = Read()
    engine.read(metrics(40))
    engine.read(metrics(42, blocks=900))
    assert (engine.state.capacity_tokens, engine.state.now, engine.state.restarts) == (900 * 16, 2, 0)


def test_engines_of_one_server_are_summed() -> None:
    engine = Read()
    two = metrics(40) + metrics(40).replace('engine="0"', 'engine="1"')
    engine.read(two)
    assert (engine.state.running, engine.state.waiting) == (6, 4)


@pytest.mark.parametrize("odd", ["<html>502 Bad Gateway</html>", '{"detail":"Not Found"}', "", "up 1\n"])
def test_odd_metrics_are_refused_and_change_nothing(odd: str) -> None:
    engine = Read()
    engine.read(metrics(40))
    with pytest.raises(ValueError, match=r".+"):
        engine.read(odd)
    engine.read(metrics(41))
    assert (engine.state.now, engine.state.restarts) == (1, 0)


@pytest.mark.parametrize("value", ["NaN", "-100", "1e300", "1e17", "1.0.0"])
@pytest.mark.parametrize(
    "name", ["iteration_tokens_total_count", "num_requests_running", "kv_cache_usage_perc", "num_preemptions_total"]
)
def test_values_that_none_can_have_are_refused_and_change_nothing(name: str, value: str) -> None:
    engine = Read()
    engine.read(metrics(40))
    odd = f'vllm:cache_config_info{{num_gpu_blocks="9",block_size="9"}} 1\nvllm:{name} {value}\n'
    with pytest.raises(ValueError, match=r".+"):
        engine.read(f"{odd}vllm:iteration_tokens_total_count 41")
    assert [type(message) for message in engine.stock.messages(metrics(40))] == [Report], "of the same life and size"
