"""The measurement of the gateway's cost: that it measures, not what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.bench import overhead, wire
from gateway.bench.stand_in import StandIn

pytestmark = pytest.mark.asyncio


async def test_a_wire_times_answers_with_a_length_and_in_chunks(serving: Any) -> None:
    async with serving(StandIn(output_tokens=4, token_s=0.02)) as url:
        connection = await wire.Wire.connect(url)
        whole = await connection.ask(wire.request(url, overhead.PATH, b"{}"))
        streamed = await connection.ask(wire.request(url, overhead.PATH, b'{"stream":true}'))
        missing = await connection.ask(wire.request(url, "/nothing", b"{}"))
        connection.close()
    assert (whole.status, streamed.status, missing.status) == (200, 200, 404)
    assert whole.first_s == pytest.approx(whole.last_s, abs=0.02)
    assert 0.02 <= streamed.first_s <= streamed.last_s - 0.05


async def test_a_wire_whose_server_is_gone(serving: Any) -> None:
    async with serving(StandIn()) as url:
        connection = await wire.Wire.connect(url)
        await connection.ask(wire.request(url, overhead.PATH, b"{}"))
    with pytest.raises(ConnectionError):
        await connection.ask(wire.request(url, overhead.PATH, b"{}"))


async def test_percentiles_and_what_is_added_by_hand() -> None:
    rounds = [{"direct": [0.001, 0.002, 0.003], "through": [0.002, 0.003, 0.004]}]
    spread = overhead._spread(rounds)
    assert spread["direct"]["p50"] == 2
    assert spread["added"] == {"p50": 1, "p95": 1, "p99": 1}
    assert spread["added_p50_by_round"] == [1]


@pytest.mark.timeout(60)
async def test_a_short_run_through_the_real_gateway(tmp_path: Path) -> None:
    settings = overhead.OverheadSettings(
        rounds=1, requests=5, warm_up=2, concurrency=4, throughput_s=0.2, output_tokens=3, pin=False
    )
    record = await overhead.measure(settings, tmp_path)
    assert record["latency_ms"]["through"]["p50"] > record["latency_ms"]["direct"]["p50"] > 0
    assert record["first_chunk_ms"]["through"]["p50"] > 0
    assert record["requests_per_s"]["direct"] > 0
    assert record["requests_per_s"]["through"] > 0
    assert record["machine"]["cores"] >= 1
    assert "python" in record["versions"]
