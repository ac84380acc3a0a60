"""The measurement of the gateway's speed: that it measures, and says what it measured; never how fast."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from tests.benchmarks.speed import report
from tests.benchmarks.speed.answers import EVENT_BYTES, TOKENS
from tests.benchmarks.speed.bench import bodies
from tests.benchmarks.speed.client import Refused, Stream, Wire, request
from tests.benchmarks.speed.engine import Engine, serving
from tests.benchmarks.speed.lines import Line, Target, lines_of
from tests.benchmarks.speed.measure import TooFewFiles, measure
from tests.benchmarks.speed.relays import BARE, DIRECT, GATEWAY, Cores, bare_relay
from tests.benchmarks.speed.settings import QUICK, ROWS
from tests.benchmarks.speed.waiting import _p99

pytestmark = pytest.mark.wire

WAYS = {DIRECT, BARE, GATEWAY}


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    made = Engine()
    async with serving(made) as url:
        yield made, url


def asked(url: str, model: str) -> bytes:
    (body,) = bodies(model, 8, count=1)
    return request(url, body)


async def until(true: Any) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


async def test_answers_whole_and_in_events(engine: tuple[Engine, str]) -> None:
    _, url = engine
    wire = await Wire.connect(url)
    whole, streamed = await wire.ask(asked(url, "whole")), await wire.ask(asked(url, "stream"))
    assert whole.header(b"content-type") == b"application/json"
    assert 0 < whole.first_s <= whole.last_s
    assert streamed.header(b"transfer-encoding") == b"chunked"
    with pytest.raises(Refused, match="no such"):
        await wire.ask(asked(url, "unheard-of"))
    wire.close()
    stream = await Stream.open(url, asked(url, "stream"))
    await until(lambda: stream.events == TOKENS + 2)  # with usage and end
    stream.close()


async def test_a_wire_whose_server_is_gone() -> None:
    async with serving(Engine()) as url:
        wire = await Wire.connect(url)
    wire.close()
    await until(lambda: wire.closed)
    with pytest.raises(ConnectionError):
        await wire.ask(asked(url, "whole"))


async def test_a_flood_is_events_of_one_size_each_in_a_chunk_and_stops_at_who_does_not_read(
    engine: tuple[Engine, str],
) -> None:
    made, url = engine
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(asked(url, "flood"))
    await reader.readuntil(b"\r\n\r\n")
    with made.flooding():
        for _ in range(50):
            chunk = await reader.readuntil(b"\n\n\r\n")
            assert chunk.startswith(b"%x\r\ndata: " % EVENT_BYTES)
            assert len(chunk) == EVENT_BYTES + len(b"fa\r\n\r\n")
        await until(lambda: made._full)  # what is on the way is bounded
    writer.close()
    await until(lambda: made.streams == 0)


async def test_single_events_wait_for_the_client(engine: tuple[Engine, str]) -> None:
    made, url = engine
    stream = await Stream.open(url, asked(url, "single:7"))
    for events in (1, 2, 3):
        await until(lambda events=events: stream.events == events)
        await asyncio.sleep(0.01)
        assert stream.events == events
        made.again(7)
    stream.close()


async def test_paced_events_say_when_they_were_written(engine: tuple[Engine, str]) -> None:
    made, url = engine
    delays: list[float] = []
    begin = time.monotonic()
    streams = [await Stream.connect(url) for _ in range(5)]
    for stream in streams:
        stream.delays_s = delays
        stream.send(asked(url, "paced:20"))
    await until(lambda: all(stream.events >= 5 for stream in streams))
    assert time.monotonic() - begin >= 0.08
    assert len(delays) == sum(stream.events for stream in streams)
    assert all(0 <= delay < 1 for delay in delays)
    for stream in streams:
        stream.close()
    await until(lambda: made.streams == 0)


async def test_events_are_counted_wherever_reads_cut_them() -> None:
    data = b"fa\r\ndata: one\n\n\r\nfa\r\ndata: @%020d@\n\n\r\n" % time.monotonic_ns()
    for first, second in itertools.combinations(range(len(data) + 1), 2):
        stream = Stream()
        stream.delays_s = []
        for part in (data[:first], data[first:second], data[second:]):
            if part:
                stream.data_received(part)
        assert (stream.events, len(stream.delays_s)) == (2, 1)


async def test_held_tasks_are_answered_in_turn_and_freed_slots_are_timed(engine: tuple[Engine, str]) -> None:
    made, url = engine
    wires = [await Wire.connect(url) for _ in range(3)]
    answers = [asyncio.create_task(wire.ask(asked(url, f"hold:{n}"))) for n, wire in enumerate(wires)]
    await until(lambda: len(made.held) == 3)
    made.free_slots(0.01)
    await asyncio.gather(*answers)
    done = [made.notes[n].done.result() for n in range(3)]
    assert done == sorted(done)
    assert done[2] - done[0] >= 0.015
    await wires[0].ask(asked(url, "hold:3"))
    assert len(made.idle_s) == 1
    made.free_slots(None)
    for wire in wires:
        wire.close()


@pytest.mark.parametrize("model", ["silent", "mute", "hushed"])
async def test_a_bare_relay_passes_a_clients_leaving_on(engine: tuple[Engine, str], tmp_path: Path, model: str) -> None:
    made, url = engine
    async with bare_relay(url, Cores(pin=False), tmp_path) as relay:
        stream = await Stream.open(relay.url, asked(relay.url, f"{model}:1"))
        noted = made.note(1)
        await noted.came.wait()
        if model == "hushed":
            await until(lambda: stream.events == 1)
        assert not noted.done.done()
        stream.close()
        async with asyncio.timeout(5):
            await noted.done


def test_a_share_of_a_histogram_by_hand() -> None:
    def exposed(*counts: int) -> str:
        lines = zip(("0.001", "0.002", "+Inf"), counts, strict=True)
        return "\n".join(f'justitia_gateway_overhead_seconds_bucket{{le="{le}"}} {count}.0' for le, count in lines)

    assert _p99(exposed(5, 5, 5), exposed(5, 105, 105)) == pytest.approx(0.00199)
    assert _p99(exposed(0, 0, 0), exposed(0, 0, 100)) == 0.002
    assert _p99("", "") != _p99("", "")


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target(3, " ms"), 3.0, True),
        (Target(3, " ms"), 3.1, False),
        (Target(2500, at_least=True), 2500, True),
        (Target(2500, at_least=True), 2499, False),
    ],
)
def test_what_meets_a_target(target: Target, value: float, met: bool) -> None:
    assert Line("it", value, target=target).met is met
    assert Line("it", -1, target=target, judged=value).met is met
    assert Line("it", value).met is None


@pytest.mark.timeout(120)
async def test_a_quick_run_measures_every_row(tmp_path: Path) -> None:
    told: list[str] = []
    record = await measure(replace(QUICK, pin=False), tmp_path, lambda row, _: told.append(row))
    rows = record["rows"]
    assert set(rows) == {*ROWS, "latency_sqlite", "throughput_sqlite"} == set(told)
    for row in ("latency", "latency_sqlite"):
        assert all(set(rows[row][kind]["p99"]) == WAYS for kind in ("short", "long", "first_chunk"))
    for row in ("throughput", "throughput_sqlite", "flood", "single"):
        assert all(rows[row][way] > 0 for way in WAYS)
        assert rows[row]["of_bare"] > 0
    assert set(rows["paced"]["p99"]) == WAYS
    assert all(set(rows["leaving"][kind]["worst"]) == WAYS for kind in ("whole", "stream", "mid_stream"))
    assert all(rows["waiting"]["requests"][state] > 0 for state in ("empty", "full"))
    assert set(rows["memory"]) == {BARE, GATEWAY}
    assert record["machine"]["cores"] >= 1
    assert "python" in record["versions"]
    judged = [line for row in rows for line in lines_of(row, rows[row], record["settings"]) if line.target]
    assert [target["what"] for target in record["targets"]] == [line.what for line in judged]
    assert all(target["met"] in (True, False) for target in record["targets"])
    record = msgspec.json.decode(msgspec.json.encode(record))  # it is read again
    Console(quiet=True).print(report.table(record))
    section = report.section(record)
    assert all(line.what in section for line in report.lines(record))


async def test_more_connections_than_the_system_allows_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (100, 200))
    with pytest.raises(TooFewFiles, match="200 allowed"):
        await measure(QUICK, tmp_path, lambda *_: None)


def test_the_page_says_what_the_results_say() -> None:
    text = report.PAGE.read_text()
    record = msgspec.json.decode(report.RESULTS.read_bytes())
    assert report.rewritten(text, record) == text, "out of date: python -m tests.benchmarks.speed.report"
    assert report.rewritten("# A\n\n## Overhead\n\nold\n\n## B\n", record).endswith("\n## B\n")
    with pytest.raises(ValueError, match="Overhead"):
        report.rewritten("# A\n", record)
