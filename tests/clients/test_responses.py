"""OpenAI's responses: made, streamed, kept, gone on from, made in the background, and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.clients.comparing import plain, plain_events
from tests.clients.conftest import RUN, Both, charged, openai_client, tokens
from tests.engine.live import LiveEngine
from tests.wire.conftest import GatewayUnderTest

pytestmark = pytest.mark.engine

Sdks = Both[openai.AsyncOpenAI]

CASES: dict[str, dict[str, Any]] = {
    "text": {"input": "Hello"},
    "instructions": {"instructions": "Hm", "input": "Hi", "metadata": {"a": "b"}, "user": "u"},
    "items": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]},
    "tools that are not to be used": {
        "input": "Hello",
        "tools": [{"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}}],
        "tool_choice": "none",
    },
}


def of_length(engine: LiveEngine, length: int) -> dict[str, Any]:
    """A request whose answer has so many tokens."""
    key = f"response-{length}"  # the engine reads no key twice
    engine.lengths({key: length})
    return {"input": "Hello", "max_output_tokens": 1900, "extra_body": {"vllm_xargs": {"forced_length_key": key}}}


def usage_of(response: Response) -> tuple[int, int, int]:
    usage = response.usage
    assert usage is not None
    return usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens


async def create(sdk: openai.AsyncOpenAI, **fields: Any) -> Response:
    answer = await sdk.responses.create(**{"model": "tiny", "temperature": 0, "max_output_tokens": 6, **fields})
    assert isinstance(answer, Response)
    return answer


async def events_of(sdk: openai.AsyncOpenAI, **fields: Any) -> AsyncIterator[ResponseStreamEvent]:
    async for event in await sdk.responses.create(
        **{"model": "tiny", "temperature": 0, "max_output_tokens": 6, **fields}, stream=True
    ):
        yield event


async def ended(sdk: openai.AsyncOpenAI, response: Response) -> Response:
    async with asyncio.timeout(30):
        while response.status in ("queued", "in_progress"):
            response = await sdk.responses.retrieve(response.id)
            await asyncio.sleep(0.02)
    return response


@pytest.mark.parametrize("case", CASES)
async def test_responses(openai_sdk: Sdks, real: GatewayUnderTest, case: str) -> None:
    direct = await create(openai_sdk.direct, **CASES[case])
    through = await create(openai_sdk.through, **CASES[case])
    assert plain(through) == plain(direct)
    (task,) = await charged(real)
    assert tokens(task) == usage_of(through) == (through.usage.input_tokens, 0, 6)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", CASES)
async def test_streams(openai_sdk: Sdks, real: GatewayUnderTest, case: str) -> None:
    direct = [event async for event in events_of(openai_sdk.direct, **CASES[case])]
    through = [event async for event in events_of(openai_sdk.through, **CASES[case])]
    assert plain_events(through) == plain_events(direct)
    assert [event.sequence_number for event in through] == list(range(len(through)))
    last = through[-1]
    assert last.type == "response.completed"
    (task,) = await charged(real)
    assert tokens(task) == usage_of(last.response)


async def test_the_sdks_own_reading_of_a_stream(openai_sdk: Sdks) -> None:
    async with openai_sdk.through.responses.stream(model="tiny", input="Hello", max_output_tokens=6) as stream:
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        assert "".join(texts) == (await stream.get_final_response()).output_text


async def test_what_is_kept_can_be_fetched_and_gone_on_from(openai_sdk: Sdks, real: GatewayUnderTest) -> None:
    sdk = openai_sdk.through
    first = await create(sdk, input="Hello")
    assert plain(await sdk.responses.retrieve(first.id)) == plain(first)
    second = await create(sdk, input="And then?", previous_response_id=first.id)
    third = [event async for event in events_of(sdk, input="And then?", previous_response_id=second.id)][-1]
    assert third.type == "response.completed"
    prompts = [usage_of(first)[0], usage_of(second)[0], usage_of(third.response)[0]]
    assert prompts == sorted(set(prompts)), "each has what was said before in it"
    tasks = await charged(real)
    assert [tokens(task) for task in tasks] == [usage_of(first), usage_of(second), usage_of(third.response)]


async def test_nobody_elses(openai_sdk: Sdks) -> None:
    """The engine knows it, and its other clients too. Who asks through the gateway gets what was made through it."""
    made = await create(openai_sdk.direct, input="Hello")
    assert (await openai_sdk.direct.responses.retrieve(made.id)).id == made.id
    with pytest.raises(openai.NotFoundError):
        await openai_sdk.through.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await openai_sdk.through.responses.cancel(made.id)
    with pytest.raises(openai.BadRequestError):
        await create(openai_sdk.through, input="And then?", previous_response_id=made.id)


async def test_one_that_is_not_kept_any_more(openai_sdk: Sdks) -> None:
    """The engine's own word for it."""
    made = await create(openai_sdk.through, input="Hello")
    unknown = made.id[:-4] + ("0000" if made.id[-4:] != "0000" else "1111")
    with pytest.raises(openai.NotFoundError) as refused:
        await openai_sdk.through.responses.retrieve(unknown)
    assert unknown in refused.value.message


async def test_one_in_the_background_holds_its_turn_until_it_is_done(
    openai_sdk: Sdks, real: GatewayUnderTest, engine: LiveEngine
) -> None:
    sdk = openai_sdk.through
    started = await create(sdk, **of_length(engine, 60), background=True)
    assert started.status == "queued"
    assert real.app.flow.queue.in_flight == 1, "its client has been answered, and it is at the engine all the same"
    done = await ended(sdk, started)
    assert done.status == "completed"
    (task,) = await charged(real)
    assert tokens(task) == usage_of(done)
    assert task.decode_tokens == 60
    assert real.is_empty()


async def test_one_in_the_background_can_be_watched_and_left(
    openai_sdk: Sdks, real: GatewayUnderTest, engine: LiveEngine
) -> None:
    sdk = openai_sdk.through
    async with openai_client(real.url, default_headers={"X-Agent-ID": RUN}) as leaves:
        stream = events_of(leaves, **of_length(engine, 700), background=True)
        first = await anext(stream)
        assert first.type == "response.created"
        await anext(stream)
    assert real.app.flow.queue.in_flight == 1, "nobody watches, and the engine goes on"
    done = await ended(sdk, await sdk.responses.retrieve(first.response.id))
    assert done.status == "completed"
    (task,) = await charged(real)
    assert tokens(task) == usage_of(done)
    again = [event async for event in await sdk.responses.retrieve(done.id, stream=True, starting_after=3)]
    assert again[0].sequence_number == 4
    assert again[-1].type == "response.completed"


async def test_one_that_is_cancelled_frees_its_turn_and_is_charged_what_it_held(
    openai_sdk: Sdks, real: GatewayUnderTest, engine: LiveEngine
) -> None:
    sdk = openai_sdk.through
    started = await create(sdk, **of_length(engine, 1800), background=True)
    await real.until(lambda: real.app.flow.engine.held_tokens > 0)
    cancelled = await sdk.responses.cancel(started.id)
    assert cancelled.status == "cancelled"
    await real.until(real.is_empty)
    await real.until(lambda: real.app.flow.engine.held_tokens == 0 and real.app.flow.engine.running == 0)
    record = real.app.flow.agents.by_id[f"default/{RUN}"]  # type: ignore[index]
    assert (record.tasks, record.record.whole) == ((), False)
    assert outcomes_of_responses(real) == {"cancelled": 1}


async def test_one_that_is_cancelled_while_it_is_watched(
    openai_sdk: Sdks, real: GatewayUnderTest, engine: LiveEngine
) -> None:
    """vLLM's stream of it does not end then, and whoever watches it goes on waiting. The turn is free all the same."""
    sdk = openai_sdk.through
    stream = events_of(sdk, **of_length(engine, 1800), background=True)
    first = await anext(stream)
    assert first.type == "response.created"
    await anext(stream)
    watching = asyncio.ensure_future(_rest(stream))
    await real.until(lambda: real.app.flow.engine.held_tokens > 0)
    await sdk.responses.cancel(first.response.id)
    await real.until(real.is_empty)
    assert outcomes_of_responses(real) == {"cancelled": 1}
    watching.cancel()
    await asyncio.wait([watching])
    assert (await create(sdk, input="Hello")).status == "incomplete", "which was as much as it was allowed"
    assert outcomes_of_responses(real) == {"cancelled": 1, "completed": 1}


async def _rest(stream: AsyncIterator[ResponseStreamEvent]) -> None:
    async for _ in stream:
        pass


def outcomes_of_responses(real: GatewayUnderTest) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for family in real.app.metrics.registry.collect()
        if family.name == "justitia_requests"
        for sample in family.samples
        if sample.name == "justitia_requests_total" and sample.labels["endpoint"] == "/v1/responses"
    }
