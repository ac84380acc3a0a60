"""Asking an engine, and the tokens of its answers."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from tests.benchmarks.engine_check.requests import Case

ANSWER_S = 600.0


class CheckFailed(Exception):
    """An engine answered something that cannot be compared."""


class Token(NamedTuple):
    id: int
    logprob: float
    gap: float  # to the best other one, in log probability


class Answer(NamedTuple):
    """choices: the tokens of each. cached_tokens: of the prompt, found in the prefix cache."""

    choices: list[list[Token]]
    cached_tokens: int = 0


class Engine:
    """An engine that serves, as its clients see it."""

    def __init__(self, socket: Path) -> None:
        connector = aiohttp.UnixConnector(str(socket), limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        self._session = aiohttp.ClientSession("http://engine", connector=connector, timeout=timeout)

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, case: Case) -> Answer:
        """Raises `CheckFailed` for any answer but 200."""
        if case.stream:
            return await self._stream(case)
        answer = await self._post(case.body)
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        details = answer["usage"].get("prompt_tokens_details") or {}
        return Answer([tokens_of(choice) for choice in choices], int(details.get("cached_tokens") or 0))

    async def ask_all(self, cases: Sequence[Case]) -> list[Answer]:
        """At once, in the order of `cases`; but first one of those that share a beginning, for the others to find it."""
        first = next((number for number, case in enumerate(cases) if case.kind == "shared beginnings"), None)
        early = None if first is None else await self.ask(cases[first])
        rest = await asyncio.gather(*(self.ask(case) for number, case in enumerate(cases) if number != first))
        return rest if first is None or early is None else [*rest[:first], early, *rest[first:]]

    async def ask_in_turn(self, cases: Sequence[Case]) -> list[Answer]:
        return [await self.ask(case) for case in cases]

    async def tokens_per_s(self, bodies: Sequence[dict[str, Any]]) -> float:
        """Output tokens, all bodies at once."""
        start = time.perf_counter()
        answers = await asyncio.gather(*(self._post(body) for body in bodies))
        taken_s = time.perf_counter() - start
        return sum(int(answer["usage"]["completion_tokens"]) for answer in answers) / taken_s

    async def counters(self) -> dict[str, float]:
        """vLLM's counters, summed over their labels, without `vllm:` and `_total`."""
        async with self._session.get("/metrics") as response:
            text = await response.text()
        counted: dict[str, float] = {}
        for name, value in re.findall(r"^vllm:(\w+?)_total(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            counted[name] = counted.get(name, 0.0) + float(value)
        return counted

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        async with self._session.post("/v1/completions", json=body) as response:
            answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise CheckFailed(f"status {response.status}: {answer}")
        return answer

    async def _stream(self, case: Case) -> Answer:
        tokens: list[Token] = []
        chunks = 0
        async with self._session.post("/v1/completions", json=case.body | {"stream": True}) as response:
            if response.status != 200:
                raise CheckFailed(f"status {response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise CheckFailed(f"in a stream: {event['error']}")
                for choice in event["choices"]:
                    tokens += tokens_of(choice)
                chunks += 1
                if chunks == case.leave_after:
                    break
        return Answer([tokens])


def tokens_of(choice: dict[str, Any]) -> list[Token]:
    ids: list[int] = choice["token_ids"] or []
    if not ids:
        return []
    logprobs = choice["logprobs"]
    if len(logprobs["token_logprobs"]) != len(ids):
        raise CheckFailed(f"{len(ids)} tokens, and {len(logprobs['token_logprobs'])} log probabilities")
    tokens = []
    for number, logprob, best in zip(ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        others = [value for name, value in best.items() if name != f"token_id:{number}"]
        tokens.append(Token(number, logprob, abs(logprob - max(others)) if others else float("inf")))
    return tokens
