"""The line that each request leaves in the request log, however it ends; and what no log may ever hold."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from gateway.demo.processes import free_port
from gateway.telemetry.request_log import Line
from gateway.tenancy.keys import add_key
from tests.wire.conftest import StartGateway, running_gateway
from tests.wire.scripted_engine import ScriptedEngine, push, wait_for_word
from tests.wire.scripted_engine import start as start_answer
from tests.wire.test_commands import justitia
from tests.wire.test_failures import break_at_once, stream_then_break, stream_then_wait

Row = dict[str, Any]
Lines = Callable[[int], Awaitable[list[Row]]]

NAMES = [field.encode_name for field in msgspec.structs.fields(Line)]
TASK = {"tenant": "default", "agent": "a", "source": "x-agent-id", "model": "tiny", "endpoint": "/v1/chat/completions"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


@pytest.fixture
def lines(log: Path) -> Lines:
    def whole() -> list[bytes]:
        return log.read_bytes().splitlines() if log.exists() else []

    async def read(count: int) -> list[Row]:
        """So many, when they are there; all of the one shape."""
        async with asyncio.timeout(10):
            while len(whole()) < count:
                await asyncio.sleep(0.01)
        rows: list[Row] = [json.loads(text) for text in whole()]
        assert len(rows) == count
        for row in rows:
            assert list(row) == NAMES
            ended = datetime.fromisoformat(row["time"])
            assert ended.tzinfo is not None
            assert timedelta() <= datetime.now(UTC) - ended < timedelta(minutes=1)
        return rows

    return read


def holds(row: Row, **told: Any) -> None:
    assert {name: row[name] for name in told} == told


async def test_a_completed_task(start: StartGateway, log: Path, lines: Lines) -> None:
    gateway = await start(request_log=str(log))
    headers = {"X-Agent-Class": "c", "X-Request-ID": "mine-1"}
    answer = await gateway.chat(headers=headers)
    (row,) = await lines(1)
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    holds(row, **TASK, status=200, outcome="completed", streaming=False, request_id="mine-1", retries=0, error=None)
    holds(row, prompt_tokens=10, cached_tokens=0, completion_tokens=4, first_token_ms=None, trace_id=None)
    assert row["class"] == "c"
    assert row["observed_cost"] == 10 * 4 + 4 * 5 / 2
    assert row["predicted_cost"] > 0
    assert row["finish_tag"] > 0
    assert int(row["task"]) > 10**18
    parts = [row[name] for name in ("queue_ms", "engine_ms", "overhead_ms")]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(row["total_ms"], abs=0.01)


async def test_a_stream(start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines) -> None:
    gateway = await start(request_log=str(log))
    answer = await gateway.chat(stream=True)
    (row,) = await lines(1)
    holds(row, **TASK, status=200, outcome="completed", streaming=True, prompt_tokens=10, completion_tokens=4)
    assert 0 < row["first_token_ms"] <= row["total_ms"]
    assert answer.headers["x-request-id"] == row["request_id"] == scripted.headers[0]["x-request-id"]
    assert len(row["request_id"]) == 32, "it was made"


async def test_a_client_that_leaves_mid_stream(
    start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines
) -> None:
    gateway = await start(request_log=str(log))
    scripted.default = stream_then_wait
    body = {"stream": True, "model": "tiny", "messages": []}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body, headers={"X-Agent-ID": "a"}) as answer:
        async for _ in answer.aiter_bytes():
            break
    (row,) = await lines(1)
    holds(row, **TASK, status=200, outcome="cancelled", error=None, prompt_tokens=None, overhead_ms=None)
    assert row["observed_cost"] > 0
    assert row["engine_ms"] > 0


async def test_a_client_that_leaves_the_queue_and_one_that_waits_too_long(
    start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines
) -> None:
    gateway = await start(request_log=str(log), max_in_flight=1, max_engine_waiting=0, max_queue_s=0.3)
    scripted.default = wait_for_word
    first = asyncio.create_task(gateway.chat("first"))
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    second = asyncio.create_task(gateway.chat())
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    second.cancel()
    await lines(1)
    assert (await gateway.chat()).status_code == 504
    scripted.go.set()
    await first
    cancelled, expired, _ = await lines(3)
    holds(cancelled, **TASK, status=None, outcome="cancelled", engine_ms=None, finish_tag=None, observed_cost=0.0)
    holds(expired, **TASK, status=504, outcome="expired", error="waited_too_long", engine_ms=None)
    assert cancelled["queue_ms"] > 0
    assert expired["queue_ms"] == pytest.approx(300, abs=150)


async def test_a_task_for_which_there_is_no_place(
    start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines
) -> None:
    gateway = await start(request_log=str(log), max_in_flight=1, max_engine_waiting=0, max_waiting=1)
    scripted.default = wait_for_word
    kept = [asyncio.create_task(gateway.chat("b"))]
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    kept.append(asyncio.create_task(gateway.chat("c")))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    answer = await gateway.chat()
    (row,) = await lines(1)
    assert answer.headers["x-request-id"] == row["request_id"]
    holds(row, **TASK, status=429, outcome="rejected", error="queue_full", queue_ms=None, engine_ms=None)
    scripted.go.set()
    await asyncio.gather(*kept)


async def test_an_engine_that_loses_a_task(
    start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines
) -> None:
    gateway = await start(request_log=str(log))
    scripted.answers = [break_at_once]
    assert (await gateway.chat()).status_code == 200
    scripted.answers = [break_at_once, break_at_once]
    assert (await gateway.chat()).status_code == 502
    scripted.answers = [stream_then_break]
    scripted.go.set()
    assert (await gateway.chat(stream=True)).status_code == 200
    again, failed, broken = await lines(3)
    holds(again, **TASK, status=200, outcome="completed", retries=1, error=None)
    holds(failed, **TASK, status=502, outcome="failed", retries=1, error="engine_lost")
    holds(broken, **TASK, status=200, outcome="failed", retries=0, error="engine_lost")
    assert {headers["x-request-id"] for headers in scripted.headers[:2]} == {again["request_id"]}


async def test_what_the_engine_refuses(start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines) -> None:
    async def refuse(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start_answer(send, b"application/json", status=404)
        await push(send, b'{"error": {"message": "no such model"}}', more=False)

    gateway = await start(request_log=str(log))
    scripted.answers.append(refuse)
    await gateway.chat()
    (row,) = await lines(1)
    holds(row, **TASK, status=404, outcome="invalid", error=None)


@pytest.mark.parametrize(
    ("content", "headers", "status", "error"),
    [
        (b"{", {}, 400, "invalid_request"),
        (b"{}", {"X-Agent-ID": "two words"}, 400, "invalid_request"),
        (b" " * 2_000_000, {}, 413, "body_too_large"),
    ],
)
async def test_what_never_becomes_a_task(
    start: StartGateway, log: Path, lines: Lines, content: bytes, headers: dict[str, str], status: int, error: str
) -> None:
    gateway = await start(request_log=str(log), max_body_mib=1)
    answer = await gateway.client.post("/v1/chat/completions", content=content, headers=headers)
    (row,) = await lines(1)
    holds(row, status=status, outcome="invalid", error=error, tenant="default", agent=None, task=None)
    assert row["queue_ms"] is row["engine_ms"] is None
    assert answer.headers["x-request-id"] == row["request_id"]


async def test_a_key_is_its_tenant_and_one_that_is_unknown_nobody(
    start: StartGateway, log: Path, lines: Lines, tmp_path: Path
) -> None:
    _, secret = add_key(tmp_path / "keys.json", "red", "", datetime.now(UTC))
    gateway = await start(request_log=str(log), keys=tmp_path / "keys.json")
    for key in (secret, secret[:-1] + "_"):
        headers = {"Authorization": f"Bearer {key}"}
        await gateway.chat(headers=headers)
        await gateway.client.get("/v1/models", headers=headers)
    task, models, refused, models_refused = await lines(4)
    holds(task, status=200, tenant="red", agent="a")
    holds(models, status=200, tenant="red")
    for row in (refused, models_refused):
        holds(row, status=401, outcome="invalid", error="invalid_api_key", tenant=None, agent=None)
    assert secret.rpartition("_")[2] not in json.dumps([task, models, refused, models_refused])


async def test_what_passes_by_the_queue_and_what_is_not_there_but_no_scrapes(
    start: StartGateway, log: Path, lines: Lines
) -> None:
    gateway = await start(request_log=str(log))
    for path in ("/health", "/ready", "/metrics"):
        await gateway.client.get(path)
    passed = await gateway.client.get("/v1/models")
    missing = await gateway.client.get("/v1/responses/resp_1")
    unknown = await gateway.client.post("/chat/completions", json={})
    agent = await gateway.client.delete("/v1/agents/a")
    usage = await gateway.client.get("/v1/usage", params={"by": "year"})
    models, response, path, no_agent, no_usage = await lines(5)
    holds(no_agent, endpoint="/v1/agents/{name}", status=404, outcome="invalid", error="not_found", tenant="default")
    holds(no_usage, endpoint="/v1/usage", status=400, outcome="invalid", error="invalid_request", tenant="default")
    holds(models, endpoint="/v1/models", status=200, outcome="completed", agent=None, overhead_ms=None)
    holds(response, endpoint="/v1/responses/{id}", status=404, outcome="invalid", error="not_found")
    holds(path, endpoint="unknown", status=404, outcome="invalid")
    told = [answer.headers["x-request-id"] for answer in (passed, missing, unknown, agent, usage)]
    assert told == [row["request_id"] for row in (models, response, path, no_agent, no_usage)]
    assert models["engine_ms"] > 0


async def test_without_an_engine(log: Path, lines: Lines) -> None:
    async with running_gateway(engine="unix:/tmp/no-engine-is-here.sock", request_log=str(log)) as gateway:
        await gateway.chat()
        await gateway.client.get("/v1/models")
        task, models = await lines(2)
    holds(task, **TASK, status=503, outcome="rejected", error="no_engine")
    holds(models, status=503, outcome="rejected", error="no_engine")


async def test_what_is_cut_off_at_the_end_is_in_the_log(
    start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines
) -> None:
    gateway = await start(request_log=str(log), drain_s=0.1)
    scripted.default = wait_for_word
    in_flight = asyncio.create_task(gateway.chat())
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    await gateway.running.stop()
    await in_flight
    (row,) = await lines(1)
    holds(row, **TASK, status=503, error="shutting_down")


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, 'quo"te', "päron"])
async def test_an_absurd_request_id_is_replaced(
    start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines, given: str
) -> None:
    gateway = await start(request_log=str(log))
    body = json.dumps({"model": "tiny", "messages": []}).encode()
    await gateway.client.post(
        "/v1/chat/completions", content=body, headers=[(b"x-request-id", given.encode("latin-1"))]
    )
    (row,) = await lines(1)
    assert len(row["request_id"]) == 32
    assert scripted.headers[0]["x-request-id"] == row["request_id"]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("m\n\x1b\x9b\u2028", "m\\n\\x1b\\x9b\\u2028"),
        ("x" * 300, "x" * 255),
        ("x" * 5000, None),
        (5, None),
        (None, None),
    ],
)
async def test_an_absurd_model(start: StartGateway, log: Path, lines: Lines, model: Any, told: str | None) -> None:
    gateway = await start(request_log=str(log))
    await gateway.chat(model=model)
    (row,) = await lines(1)
    assert row["model"] == told


async def test_trace_context_goes_through_and_what_is_malformed_does_not(
    start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines
) -> None:
    gateway = await start(request_log=str(log))
    good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for parent in (good, good.upper()):
        await gateway.chat(headers={"traceparent": parent, "tracestate": "a=1"})
    first, second = await lines(2)
    assert first["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert second["trace_id"] is None
    assert (scripted.headers[0]["traceparent"], scripted.headers[0]["tracestate"]) == (good, "a=1")
    assert not {"traceparent", "tracestate"} & set(scripted.headers[1])


async def test_a_response_in_the_background_is_logged_when_it_is_done(
    start: StartGateway, scripted: ScriptedEngine, log: Path, lines: Lines
) -> None:
    gateway = await start(request_log=str(log))

    async def begin(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start_answer(send, b"application/json")
        await push(send, b'{"status": "queued"}', more=False)

    scripted.default = begin
    body = {"model": "tiny", "input": "x", "background": True}
    answer = await gateway.client.post("/v1/responses", json=body, headers={"X-Agent-ID": "a"})
    assert answer.status_code == 200
    (row,) = await lines(1)
    holds(row, endpoint="/v1/responses", status=200, agent="a")


SECRET = "MARKER-7f3a"


@pytest.mark.parametrize("form", ["text", "json"])
async def test_no_log_at_any_level_holds_a_prompt_or_a_key(form: str, tmp_path: Path) -> None:
    async def break_with_secrets(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start_answer(send, b"application/json", status=500)
        await push(send, f'{{"error": {{"message": "{SECRET}"}}}}'.encode(), more=False)

    port, log, keys = free_port(), tmp_path / "log", tmp_path / "keys.json"
    _, key = add_key(keys, "red", "", datetime.now(UTC))
    secrets = {
        "Authorization": f"Bearer {SECRET}",
        "X-API-Key": SECRET,
        "api-key": key,
        "Cookie": SECRET,
        "User-Agent": SECRET,
        "X-Request-ID": f"{SECRET} is no id",
        "traceparent": SECRET,
        "tracestate": SECRET,
        "X-Something": SECRET,
    }
    prompts: list[Row] = [
        {"messages": [{"role": "user", "content": SECRET}]},
        {"messages": [{"role": "user", "content": SECRET}], "stream": True},
        {"messages": SECRET, "max_tokens": SECRET},
        {"messages": SECRET, "vllm_xargs": SECRET},
        {"messages": [{"role": "user", "content": "\ud800" + SECRET}], "tools": [{"name": SECRET}]},
        {"model": {"name": SECRET}, "messages": []},
    ]
    async with ScriptedEngine().serving() as engine:
        arguments = ("--engine", engine.url, "--port", str(port), "--state", "memory:", "--keys", str(keys))
        logs = ("--log-level", "debug", "--log-format", form, "--request-log", str(log))
        # A collector that is not there: what is said of that must not tell more.
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.2"}
        async with justitia("gateway", *arguments, *logs, **environment) as command:
            await command.until_said("the engine is up")
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=url, headers=secrets, timeout=60) as client:
                paths = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize")
                for path in paths:
                    for prompt in prompts:
                        await client.post(path, content=json.dumps({"prompt": SECRET, "input": SECRET, **prompt}))
                    for broken in (b"{" + SECRET.encode(), b'{"x": "' + SECRET.encode() + b"\xff", SECRET.encode()):
                        await client.post(path, content=broken)
                    engine.answers = [break_with_secrets, break_at_once, break_at_once, stream_then_break]
                    engine.go.set()
                    for _ in range(2):
                        await client.post(path, json={**prompts[1], "prompt": SECRET, "input": SECRET})
                    engine.answers = []
                    await command_is_up(client)
                await client.get(f"/v1/responses/{SECRET}?key={SECRET}")
                await client.get(f"/{SECRET}?key={SECRET}")
                engine.healthy = False
                await client.post("/v1/completions", json={"prompt": SECRET})
            assert await command.end(signal.SIGTERM) == 0
    assert "shutting down" in command.said
    assert "the collector does not take spans" in command.said
    if form == "json":
        assert all(json.loads(line)["level"] for line in command.said.splitlines())
    written = log.read_text()
    assert len(written.splitlines()) > 50
    for secret in (SECRET, key.rpartition("_")[2]):
        assert secret not in command.said
        assert secret not in written


async def command_is_up(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(30):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)


async def test_a_log_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    arguments = ("--engine", "http://127.0.0.1:1", "--port", "0", "--state", "memory:")
    async with justitia("gateway", *arguments, "--request-log", str(tmp_path / "no" / "log")) as command:
        assert command.process.stderr is not None
        said = (await command.process.stderr.read()).decode()
        assert await command.process.wait() == 1
    assert "cannot write the request log to" in said
    assert "Traceback" not in said


async def test_lines_go_to_standard_output_by_default(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with running_gateway(engine="unix:/tmp/no-engine-is-here.sock") as gateway:
        await gateway.chat()
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["error"] == "no_engine"
