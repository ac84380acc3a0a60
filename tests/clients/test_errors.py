"""What goes wrong is, for each SDK, the error that it has for it; and what can be tried again is, when it was said to be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anthropic
import openai
import pytest

from tests.clients.conftest import anthropic_client, openai_client
from tests.wire.conftest import GatewayUnderTest, StartGateway
from tests.wire.scripted_dialects import BODIES, error_event, events_of, in_dialect, in_dialect_when_told
from tests.wire.scripted_engine import ScriptedEngine, push
from tests.wire.scripted_engine import start as start_answer

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
ONE_SLOT = {"max_in_flight": 1, "max_engine_waiting": 0}


@pytest.fixture(autouse=True)
def answers(scripted: ScriptedEngine) -> None:
    scripted.default = in_dialect


WAYS = ("chat", "responses", "messages")
every_way = pytest.mark.parametrize("way", WAYS)


class Sdks:
    """Both, and one way to ask either."""

    def __init__(self) -> None:
        self._open = AsyncExitStack()

    async def ask(self, way: str, gateway: GatewayUnderTest, *, max_retries: int = 0, **fields: Any) -> Any:
        if way == "messages":
            other = await self.anthropic(gateway, max_retries)
            return await other.messages.create(model="tiny", max_tokens=5, messages=MESSAGES, **fields)
        sdk = await self.openai(gateway, max_retries)
        if way == "chat":
            return await sdk.chat.completions.create(model="tiny", messages=MESSAGES, **fields)
        return await sdk.responses.create(model="tiny", input="Hello", **fields)

    async def refused(self, way: str, gateway: GatewayUnderTest, **fields: Any) -> Any:
        with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as raised:
            await self.ask(way, gateway, **fields)
        return raised.value

    async def openai(self, gateway: GatewayUnderTest, max_retries: int = 0) -> openai.AsyncOpenAI:
        return await self._open.enter_async_context(openai_client(gateway.url, max_retries=max_retries))

    async def anthropic(self, gateway: GatewayUnderTest, max_retries: int = 0) -> anthropic.AsyncAnthropic:
        return await self._open.enter_async_context(anthropic_client(gateway.url, max_retries=max_retries))

    async def close(self) -> None:
        await self._open.aclose()


@pytest.fixture
async def sdks(start: StartGateway) -> AsyncIterator[Sdks]:
    one = Sdks()
    yield one
    await one.close()


def told(raised: openai.APIStatusError | anthropic.APIStatusError, kind: str) -> str:
    """The message, where each SDK looks for it; `kind` is how Anthropic names it."""
    body: Any = raised.response.json()
    if isinstance(raised, openai.APIStatusError):
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    else:
        assert set(body) == {"type", "error"}
        assert body["type"] == "error"
        assert body["error"]["type"] == kind
    return str(body["error"]["message"])


@every_way
async def test_a_body_that_is_wrong(sdks: Sdks, gateway: GatewayUnderTest, way: str) -> None:
    error = await sdks.refused(way, gateway, extra_body={"stream": "yes"})
    assert isinstance(error, openai.BadRequestError | anthropic.BadRequestError)
    assert "stream" in told(error, "invalid_request_error")


@every_way
async def test_a_header_that_is_wrong(sdks: Sdks, gateway: GatewayUnderTest, way: str) -> None:
    error = await sdks.refused(way, gateway, extra_headers={"X-Agent-ID": "two words"})
    assert isinstance(error, openai.BadRequestError | anthropic.BadRequestError)
    assert "x-agent-id" in told(error, "invalid_request_error")


@every_way
async def test_a_body_that_is_too_large(sdks: Sdks, start: StartGateway, way: str) -> None:
    gateway = await start(max_body_mib=1)
    error = await sdks.refused(way, gateway, extra_body={"padding": "x" * 2**20})
    assert error.status_code == 413
    assert way != "messages" or isinstance(error, anthropic.RequestTooLargeError)
    assert "larger than" in told(error, "request_too_large")


async def test_a_response_that_nobody_knows(sdks: Sdks, gateway: GatewayUnderTest) -> None:
    sdk = await sdks.openai(gateway)
    with pytest.raises(openai.NotFoundError, match="resp_unknown"):
        await sdk.responses.retrieve("resp_unknown")
    with pytest.raises(openai.NotFoundError, match="resp_unknown"):
        await sdk.responses.cancel("resp_unknown")
    with pytest.raises(openai.BadRequestError, match="resp_unknown"):
        await sdks.ask("responses", gateway, previous_response_id="resp_unknown")


async def test_what_is_not_relayed(sdks: Sdks, gateway: GatewayUnderTest) -> None:
    sdk, other = await sdks.openai(gateway), await sdks.anthropic(gateway)
    with pytest.raises(openai.NotFoundError):
        await sdk.audio.speech.create(model="tiny", voice="alloy", input="Hello")
    with pytest.raises(openai.NotFoundError):
        await sdk.files.list()
    with pytest.raises(openai.NotFoundError):
        await sdk.images.generate(prompt="a dot")
    with pytest.raises(anthropic.NotFoundError):
        await other.messages.batches.list()


@pytest.mark.parametrize(
    ("status", "raised"),
    [
        (401, (openai.AuthenticationError, anthropic.AuthenticationError)),
        (404, (openai.NotFoundError, anthropic.NotFoundError)),
        (422, (openai.UnprocessableEntityError, anthropic.UnprocessableEntityError)),
        (500, (openai.InternalServerError, anthropic.InternalServerError)),
    ],
)
@every_way
async def test_what_the_engine_says_is_said_in_its_words(
    sdks: Sdks,
    gateway: GatewayUnderTest,
    scripted: ScriptedEngine,
    way: str,
    status: int,
    raised: tuple[type[Exception], ...],
) -> None:
    words = b'{"error": {"message": "as the engine has it", "own": [1, 2.50]}}'

    async def refuse(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start_answer(send, b"application/json", status=status)
        await push(send, words, more=False)

    scripted.default = refuse
    error = await sdks.refused(way, gateway)
    assert isinstance(error, raised)
    assert error.response.content == words


@every_way
async def test_a_full_queue(sdks: Sdks, start: StartGateway, scripted: ScriptedEngine, way: str) -> None:
    gateway = await start(**ONE_SLOT, max_waiting=1)
    kept = await _fill(gateway, scripted)
    error = await sdks.refused(way, gateway)
    assert isinstance(error, openai.RateLimitError | anthropic.RateLimitError)
    assert 1 <= int(error.response.headers["retry-after"]) <= 30
    assert "waiting" in told(error, "rate_limit_error")
    scripted.go.set()
    await asyncio.gather(*kept)


@every_way
async def test_a_queue_that_takes_too_long(sdks: Sdks, start: StartGateway, scripted: ScriptedEngine, way: str) -> None:
    gateway = await start(**ONE_SLOT, max_queue_s=0.1)
    scripted.default = in_dialect_when_told
    first = asyncio.create_task(gateway.chat("first"))
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    error = await sdks.refused(way, gateway)
    assert error.status_code == 504
    assert isinstance(
        error, openai.InternalServerError | anthropic.InternalServerError | anthropic.DeadlineExceededError
    )
    told(error, "timeout_error")
    scripted.go.set()
    await first


@every_way
async def test_no_engine(sdks: Sdks, start: StartGateway, scripted: ScriptedEngine, way: str) -> None:
    gateway = await start()
    scripted.healthy = False
    await gateway.until(lambda: not gateway.app.flow.engine.up)
    error = await sdks.refused(way, gateway)
    assert error.status_code == 503
    assert isinstance(
        error, openai.InternalServerError | anthropic.InternalServerError | anthropic.ServiceUnavailableError
    )
    assert int(error.response.headers["retry-after"]) > 0
    told(error, "overloaded_error")


@every_way
async def test_an_engine_that_dies_twice(
    sdks: Sdks, gateway: GatewayUnderTest, scripted: ScriptedEngine, way: str
) -> None:
    async def die(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        send.__self__.transport.abort()  # uvicorn's request cycle

    scripted.answers = [die, die]
    error = await sdks.refused(way, gateway)
    assert error.status_code == 502
    told(error, "api_error")


@every_way
@pytest.mark.parametrize("breaks", [True, False], ids=["the engine dies", "the engine says so"])
async def test_a_stream_that_fails_in_the_middle(
    sdks: Sdks, gateway: GatewayUnderTest, scripted: ScriptedEngine, way: str, breaks: bool
) -> None:
    """After the text that came before."""

    async def half(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        events = events_of(body, send)
        await start_answer(send)
        await push(send, b"".join(events[:-2]) if way == "chat" else b"".join(events[: len(events) // 2 + 1]))
        if breaks:
            send.__self__.transport.abort()
        elif way == "chat":
            await push(send, b'data: {"error": {"message": "out of luck"}}\n\ndata: [DONE]\n\n', more=False)
        else:
            await push(send, error_event(), more=False)

    scripted.default = half
    events: list[Any] = []

    async def read() -> None:
        async for event in await sdks.ask(way, gateway, stream=True):
            events.append(event)
            if getattr(event, "type", "") == "error":  # for responses the SDK has an event, and no exception
                raise openai.OpenAIError(event.message)

    with pytest.raises((openai.OpenAIError, anthropic.APIStatusError), match=None if breaks else "out of luck"):
        await read()
    assert len(events) >= 2
    assert gateway.is_empty()
    assert {
        sample.labels["outcome"]: sample.value
        for family in gateway.app.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "justitia_requests_total"
    } == {"failed": 1}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_an_error_that_the_engine_has_told_is_told_once(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, path: str
) -> None:
    async def half(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start_answer(send)
        await push(send, b"".join(events_of(body, send)[:3]))
        await push(send, error_event(), more=False)

    scripted.default = half
    answer = await gateway.client.post(path, json={**BODIES[path], "stream": True})
    assert answer.content.count(b"event: error\n") == 1
    assert answer.content.endswith(error_event())


@every_way
async def test_the_sdk_tries_a_full_queue_again_when_it_was_told_to(
    sdks: Sdks, start: StartGateway, scripted: ScriptedEngine, waits: Waits, way: str
) -> None:
    gateway = await start(**ONE_SLOT, max_waiting=1)
    for _ in range(3):  # so that it is known how fast the queue drains
        await gateway.chat("before")
    kept = await _fill(gateway, scripted)
    again = asyncio.ensure_future(sdks.ask(way, gateway, max_retries=1))
    await gateway.until(lambda: waits.begun == [1], *kept, again)  # as Retry-After is a second
    scripted.go.set()
    await asyncio.gather(*kept)
    waits.over.set()
    await again
    assert _rejected(gateway) == 1


async def test_the_sdks_try_again_when_the_engine_is_to_be_back(
    sdks: Sdks, start: StartGateway, scripted: ScriptedEngine, waits: Waits
) -> None:
    gateway = await start()
    scripted.healthy = False
    await gateway.until(lambda: not gateway.app.flow.engine.up)
    again = [asyncio.ensure_future(sdks.ask(way, gateway, max_retries=1)) for way in WAYS]
    await gateway.until(lambda: waits.begun == [5, 5, 5], *again)  # as Retry-After is five seconds
    scripted.healthy = True
    await gateway.until(lambda: gateway.app.flow.engine.up, *again)
    waits.over.set()
    await asyncio.gather(*again)
    assert _rejected(gateway) == 3


class Waits:
    """Those of the SDKs before they try again."""

    def __init__(self) -> None:
        self.begun: list[float] = []  # for so many seconds
        self.over = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.begun.append(seconds)
        await self.over.wait()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()
    for sdk in (openai, anthropic):
        monkeypatch.setattr(sdk._base_client.anyio, "sleep", waits.sleep)
    return waits


async def _fill(gateway: GatewayUnderTest, engine: ScriptedEngine) -> list[asyncio.Task[Any]]:
    """The one slot, and the one place in the queue."""
    engine.default = in_dialect_when_told
    kept = [asyncio.create_task(gateway.chat("kept"))]
    await gateway.until(lambda: gateway.app.flow.queue.in_flight == 1, *kept)
    kept.append(asyncio.create_task(gateway.chat("kept")))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1, *kept)
    return kept


def _rejected(gateway: GatewayUnderTest) -> float:
    return sum(
        sample.value
        for family in gateway.app.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "justitia_requests_total" and sample.labels["outcome"] == "rejected"
    )
