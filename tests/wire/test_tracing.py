"""Traces as a collector gets them, over a real socket: spans, parents, times, attributes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.launcher import EngineProcess, EngineSpec
from gateway.telemetry.request_span import open_tracing
from tests.conftest import START_TIMEOUT_S
from tests.wire.collector import Collector, Told
from tests.wire.conftest import GatewayUnderTest, StartGateway, running_gateway
from tests.wire.scripted_engine import ScriptedEngine, wait_for_word
from tests.wire.test_failures import break_at_once, stream_then_wait

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CONTEXT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=1,b@c=2"}
INTERNAL, SERVER, CLIENT = 1, 2, 3
CHAT = "POST /v1/chat/completions"


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    async with Collector().serving() as collector:
        yield collector


@pytest.fixture
async def gateway(start: StartGateway, collector: Collector) -> GatewayUnderTest:
    return await start(otlp_endpoint=collector.url, request_log="none")


async def traced(collector: Collector, name: str = CHAT, count: int = 1) -> Told:
    """The last request of that name."""
    await collector.until(lambda: len(collector.named(name)) == count)
    return collector.named(name)[-1]


def dropped(gateway: GatewayUnderTest) -> float:
    value = gateway.app.metrics.registry.get_sample_value("justitia_spans_dropped_total")
    assert value is not None
    return value


async def test_a_request_is_a_span_with_its_parts_in_order(
    gateway: GatewayUnderTest, collector: Collector, scripted: ScriptedEngine
) -> None:
    before = time.time_ns()
    headers = {**CONTEXT, "X-Agent-Class": "c", "X-Request-ID": "mine"}
    await gateway.chat("run-17", headers=headers, stream=True)
    after = time.time_ns()
    span = await traced(collector)
    assert (span.trace_id, span.parent_id, span.kind, span.failed) == (TRACE, PARENT, SERVER, False)
    assert span.service == "justitia"
    identify, queue, engine = parts = collector.below(span)
    assert [part.name for part in parts] == ["identify", "queue", "engine"]
    assert [part.kind for part in parts] == [INTERNAL, INTERNAL, CLIENT]
    assert {part.trace_id for part in parts} == {TRACE}
    times = [before, span.begin_ns, identify.begin_ns, identify.end_ns, queue.end_ns, engine.end_ns, span.end_ns, after]
    assert times == sorted(times)
    assert identify.begin_ns == span.begin_ns
    assert queue.begin_ns == identify.end_ns
    assert engine.begin_ns == queue.end_ns
    assert engine.end_ns == span.end_ns
    assert engine.events == ["first token"]
    told = span.attributes
    for name, value in {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "tiny",
        "gen_ai.agent.id": "run-17",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 4,
        "justitia.request_id": "mine",
        "justitia.outcome": "completed",
        "justitia.tenant": "default",
        "justitia.agent_class": "c",
        "justitia.agent_source": "x-agent-id",
        "justitia.observed_cost": 50.0,
        "justitia.retries": 0,
    }.items():
        assert told[name] == value
    assert told["justitia.predicted_cost"] > 0
    assert told["justitia.finish_tag"] > 0
    assert told["justitia.queue_ms"] == pytest.approx((queue.end_ns - queue.begin_ns) / 1e6, abs=5)
    assert "error.type" not in told


async def test_the_engines_spans_hang_below_ours(
    gateway: GatewayUnderTest, collector: Collector, scripted: ScriptedEngine
) -> None:
    await gateway.chat(headers=CONTEXT)
    await gateway.chat()
    await gateway.client.post("/v1/messages", json={"model": "tiny", "messages": []})
    await traced(collector, "POST /v1/messages")
    engines = sorted(collector.named("engine"), key=lambda span: span.begin_ns)
    told = [headers["traceparent"] for headers in scripted.headers]
    assert told == [f"00-{span.trace_id}-{span.span_id}-01" for span in engines]
    assert engines[0].trace_id == TRACE
    assert scripted.headers[0]["tracestate"] == "a=1,b@c=2"
    assert "tracestate" not in scripted.headers[1]
    assert len({span.trace_id for span in engines}) == 3


async def test_an_engine_that_loses_a_task_is_two_spans(
    gateway: GatewayUnderTest, collector: Collector, scripted: ScriptedEngine
) -> None:
    scripted.answers = [break_at_once]
    await gateway.chat()
    span = await traced(collector)
    parts = collector.below(span)
    assert [part.name for part in parts] == ["identify", "queue", "engine", "queue", "engine"]
    assert [part.failed for part in parts] == [False, False, True, False, False]
    assert parts[2].attributes["error.type"] == "engine_lost"
    assert [headers["traceparent"].split("-")[2] for headers in scripted.headers] == [
        parts[2].span_id,
        parts[4].span_id,
    ]
    assert (span.failed, span.attributes["justitia.retries"]) == (False, 1)
    scripted.answers = [break_at_once, break_at_once]
    await gateway.chat()
    span = await traced(collector, count=2)
    assert (span.failed, span.attributes["error.type"]) == (True, "engine_lost")
    assert [part.name for part in collector.below(span)] == ["identify", "queue", "engine", "queue", "engine"]


async def test_how_it_ended_is_told(start: StartGateway, collector: Collector, scripted: ScriptedEngine) -> None:
    gateway = await start(otlp_endpoint=collector.url, max_in_flight=1, max_engine_waiting=0, max_queue_s=0.2)
    scripted.default = wait_for_word
    first = asyncio.create_task(gateway.chat("first"))
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    await gateway.chat()
    expired = await traced(collector)
    assert [part.name for part in collector.below(expired)] == ["identify", "queue"]
    assert [part.failed for part in collector.below(expired)] == [False, True]
    holds(expired, failed=True, error="waited_too_long", status=504, outcome="expired")
    first.cancel()
    cancelled = await traced(collector, count=2)
    holds(cancelled, failed=False, error="cancelled", status=None, outcome="cancelled")
    assert [(part.name, part.failed) for part in collector.below(cancelled)][-1] == ("engine", False)
    await gateway.client.post("/v1/chat/completions", content=b"{")
    invalid = await traced(collector, count=3)
    holds(invalid, failed=False, error="invalid_request", status=400, outcome="invalid")
    assert [part.name for part in collector.below(invalid)] == ["identify"]
    await gateway.client.get("/v1/models")
    passed = await traced(collector, "GET /v1/models")
    holds(passed, failed=False, error=None, status=200, outcome="completed")
    assert [part.name for part in collector.below(passed)] == ["identify", "engine"]


def holds(span: Told, *, failed: bool, error: str | None, status: int | None, outcome: str) -> None:
    assert span.failed is failed
    told = ("error.type", "http.response.status_code", "justitia.outcome")
    assert tuple(map(span.attributes.get, told)) == (error, status, outcome)


async def test_a_client_that_does_not_keep_its_spans_has_none_kept(
    gateway: GatewayUnderTest, collector: Collector, scripted: ScriptedEngine
) -> None:
    await gateway.chat(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    version, trace_id, span_id, flags = scripted.headers[0]["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", TRACE, "00")
    assert span_id != "0" * 16
    await gateway.chat()
    await traced(collector)
    assert {span.trace_id for span in collector.spans} & {TRACE} == set()
    assert dropped(gateway) == 0


async def test_standard_variables_choose_endpoint_sample_name_and_headers(
    start: StartGateway, collector: Collector, scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=k")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "team-gateway")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    gateway = await start(request_log="none")
    await gateway.chat()
    await gateway.chat(headers=CONTEXT)
    span = await traced(collector)
    assert (span.trace_id, span.service) == (TRACE, "team-gateway")
    assert collector.headers[0]["x-key"] == "k"
    assert scripted.headers[0]["traceparent"].endswith("-00")


async def test_a_disabled_sdk_is_no_tracing(
    start: StartGateway, collector: Collector, scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    gateway = await start(otlp_endpoint=collector.url)
    await gateway.chat(headers=CONTEXT)
    assert gateway.app.observer.tracing is None
    assert scripted.headers[0]["traceparent"] == CONTEXT["traceparent"]


async def test_what_has_ended_leaves_before_the_gateway_does(
    start: StartGateway, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    gateway = await start(otlp_endpoint=collector.url)
    await gateway.chat()
    await gateway.running.stop()
    assert len(collector.spans) == 4


@pytest.mark.parametrize("status", [400, 503])
async def test_a_collector_that_takes_nothing_costs_a_count(
    start: StartGateway,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    collector.status = status
    gateway = await start(otlp_endpoint=collector.url)
    for _ in range(2):
        before = dropped(gateway)
        assert (await gateway.chat()).status_code == 200
        await gateway.until(lambda before=before: dropped(gateway) == before + 4)  # type: ignore[misc]
    assert caplog.text.count("the collector does not take spans") == 1
    collector.status = 200
    await gateway.chat()
    await traced(collector)
    assert dropped(gateway) == 8


async def test_a_dead_collector_holds_nobody_up_and_what_is_too_much_is_counted(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, scripted: ScriptedEngine
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    gateway = await start(otlp_endpoint="http://127.0.0.1:9")
    begun = time.monotonic()
    for _ in range(20):
        assert (await gateway.chat()).status_code == 200
    assert dropped(gateway) >= 80 - 8 - 4
    await gateway.running.stop()
    assert time.monotonic() - begun < 30


async def test_a_task_that_is_cut_off_mid_stream_is_told(
    gateway: GatewayUnderTest, collector: Collector, scripted: ScriptedEngine
) -> None:
    scripted.default = stream_then_wait
    body = {"stream": True, "messages": []}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            break
    span = await traced(collector)
    holds(span, failed=False, error="cancelled", status=200, outcome="cancelled")
    assert collector.below(span)[-1].events == ["first token"]


def printed(code: str) -> str:
    """By a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_gateway_does_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    said = printed(
        """
import asyncio, sys
sys.modules["opentelemetry"] = None  # it cannot be imported
from gateway.app import create_app
from gateway.telemetry.request_span import NoOpenTelemetry
from gateway.config.settings import GatewaySettings

async def main():
    settings = {"engine": "http://127.0.0.1:1", "state": "memory:"}
    app = await create_app(GatewaySettings(**settings))
    print(app.observer.tracing)
    try:
        await create_app(GatewaySettings(**settings, otlp_endpoint="http://127.0.0.1:1"))
    except NoOpenTelemetry as error:
        print(error)

asyncio.run(main())
"""
    )
    assert said.startswith("None\ntraces need the extra `otel`: pip install 'justitia[otel]'")


def test_nothing_of_opentelemetry_is_loaded_unless_it_is_wanted() -> None:
    assert printed("import gateway.cli.main, sys; print('opentelemetry' in sys.modules)") == "False\n"


def test_no_endpoint_is_no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert open_tracing(None, "1", lambda spans: None) is None


@pytest.mark.engine
async def test_vllms_own_spans_hang_below_ours(
    collector: Collector, session_dir: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    spec = EngineSpec(
        model=str(tiny_model_dir),
        runtime_dir=session_dir / "traced",
        kv_blocks=64,
        max_model_len=512,
        extra_args=("--served-model-name", "tiny", "--otlp-traces-endpoint", f"{collector.url}/v1/traces"),
    )
    process = EngineProcess(spec)
    await process.start()
    running = asyncio.create_task(process.run())
    try:
        await process.wait_ready(START_TIMEOUT_S)
        link = spec.link_address
        async with running_gateway(engine=spec.url, link=link, otlp_endpoint=collector.url) as gateway:
            await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)
            assert (await gateway.chat(max_tokens=4, headers=CONTEXT)).status_code == 200
            await collector.until(lambda: collector.named(CHAT) and collector.named("llm_request"))
    finally:
        await process.stop()
        await running
    (engine,), (own,) = collector.named("engine"), collector.named("llm_request")
    assert (own.trace_id, own.parent_id) == (TRACE, engine.span_id)
    assert own.attributes["gen_ai.usage.completion_tokens"] == 4
