"""The official SDKs, each twice: before a gateway, and before the engine itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import anthropic
import openai
import pytest

from gateway.flowcontrol import agent_id_of
from gateway.protocol.identify import DEFAULT_TENANT
from predictor.types import FinishedTask
from tests.engine.live import LiveEngine
from tests.wire.conftest import GatewayUnderTest, gateway, running_gateway, scripted, start

__all__ = ["gateway", "scripted", "start"]  # fixtures

# What the SDKs take for an agent in these tests, unless a test says otherwise.
RUN = "run-1"

Sdk = TypeVar("Sdk")


@dataclass(frozen=True)
class Both(Generic[Sdk]):
    """through: the gateway. direct: to the engine."""

    through: Sdk
    direct: Sdk


@pytest.fixture
async def real(engine: LiveEngine) -> AsyncIterator[GatewayUnderTest]:
    engine.wait_ready()
    async with running_gateway(engine=engine.url, link=engine.link_address) as one:
        await one.until(lambda: one.app.flow.engine.up and one.app.flow.engine.reporting)
        yield one


@pytest.fixture
async def engine_url(engine: LiveEngine) -> AsyncIterator[str]:
    """The engine's Unix socket as a port, which every SDK can be told: bytes go to and fro."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_unix_connection(engine.socket)
        await asyncio.gather(_pass_on(reader, there_writer), _pass_on(there_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def openai_sdk(real: GatewayUnderTest, engine_url: str) -> AsyncIterator[Both[openai.AsyncOpenAI]]:
    async with (
        openai_client(real.url, default_headers={"X-Agent-ID": RUN}) as through,
        openai_client(engine_url) as direct,
    ):
        yield Both(through, direct)


@pytest.fixture
async def anthropic_sdk(real: GatewayUnderTest, engine_url: str) -> AsyncIterator[Both[anthropic.AsyncAnthropic]]:
    async with (
        anthropic_client(real.url, default_headers={"X-Agent-ID": RUN}) as through,
        anthropic_client(engine_url) as direct,
    ):
        yield Both(through, direct)


def openai_client(url: str, *, max_retries: int = 0, **options: object) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=max_retries, **options)  # type: ignore[arg-type]


def anthropic_client(url: str, *, max_retries: int = 0, **options: object) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=max_retries, **options)  # type: ignore[arg-type]


async def charged(one: GatewayUnderTest, agent: str = RUN) -> list[FinishedTask]:
    """The tasks of an agent, when the engine has said of each what it held: it knows their numbers, so it was told them."""
    record = one.app.flow.agents.by_id[agent_id_of(DEFAULT_TENANT, agent)]
    await one.until(lambda: bool(record.tasks) and all(task.held is not None for task in record.tasks))
    return record.tasks


def tokens(task: FinishedTask) -> tuple[float, float, float]:
    """Of the prompt, cached ones among them, and decoded."""
    return task.prompt_tokens, task.cached_tokens, task.decode_tokens
