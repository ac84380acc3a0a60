"""Replays an agent trace against a live OpenAI-compatible URL, as the agents' own programs would send it.

Every task is a streamed chat completion, sent when its agent has arrived, the tasks before it have ended and the
thinking is over. Light on purpose: the client shares the machine with what it measures, so chunks are not parsed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import aiohttp
import msgspec

from gateway.agent_trace import AgentTrace, TaskTrace
from gateway.replay.texts import english as text

# Enough of a stream's end for its last events: the usage, or the error, and [DONE].
TAIL_BYTES = 16_384


class TaskResult(msgspec.Struct, frozen=True):
    """One task. Times in seconds since the replay's start; token counts are the engine's, None when it sent none."""

    agent_id: str
    task_id: str
    submit_s: float
    end_s: float
    first_token_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    queue_s: float | None = None  # from the gateway's headers, like the next
    predicted_cost: float | None = None
    error: str | None = None


class ReplayResult(msgspec.Struct, frozen=True):
    """What became of a trace: all its tasks, those that failed as well."""

    tasks: list[TaskResult]
    duration_s: float

    @property
    def errors(self) -> list[TaskResult]:
        return [task for task in self.tasks if task.error is not None]


class Watcher(Protocol):
    """Receives the progress of a replay. A task that cannot be sent ends without having been sent."""

    def task_sent(self) -> None: ...

    def task_ended(self, result: TaskResult) -> None: ...

    def agent_ended(self, agent_id: str) -> None: ...


class Unwatched:
    def task_sent(self) -> None:
        pass

    def task_ended(self, result: TaskResult) -> None:
        pass

    def agent_ended(self, agent_id: str) -> None:
        pass


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """url: `http://…` or `unix:/path`, without `/v1`. length_key: agent id and task id to the opaque key under which a
    benchmark engine finds the output's length; None leaves the length to the model. api_key: sent as a bearer token."""

    url: str
    model: str
    length_key: Callable[[str, str], str] | None = None
    api_key: str | None = None
    task_timeout_s: float = 900.0
    watcher: Watcher = field(default_factory=Unwatched)


async def replay(agents: Sequence[AgentTrace], options: ReplayOptions) -> ReplayResult:
    """Sends every agent of the trace. Failed tasks are in the result with their error, and so are those that waited for
    them and could not be sent; nothing is raised for them, and nothing is tried twice."""
    connector, base = _connector(options.url)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=options.task_timeout_s, sock_connect=30)
    async with aiohttp.ClientSession(base, connector=connector, timeout=timeout, headers=headers) as session:
        start = time.monotonic()
        replays = [_AgentReplay(agent, session, options, start) for agent in agents]
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(each.run()) for each in replays]
        duration_s = time.monotonic() - start
    return ReplayResult([result for run in runs for result in run.result()], duration_s)


def _connector(url: str) -> tuple[aiohttp.BaseConnector, str]:
    # A new connection for each task: a server may close an idle one just when a task is sent on it, and the task fails.
    if url.startswith("unix:"):
        return aiohttp.UnixConnector(url.removeprefix("unix:"), limit=0, force_close=True), "http://localhost"
    return aiohttp.TCPConnector(limit=0, force_close=True), url.rstrip("/")


class _AgentReplay:
    """One agent's program."""

    def __init__(self, agent: AgentTrace, session: aiohttp.ClientSession, options: ReplayOptions, start: float) -> None:
        self._agent = agent
        self._session = session
        self._options = options
        self._start = start
        self._unsent = len(agent.tasks)
        self._failed: set[str] = set()

    async def run(self) -> list[TaskResult]:
        ended = {task.id: asyncio.Event() for task in self._agent.tasks}
        await asyncio.sleep(self._agent.arrival_s - self._now())
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._when_due(task, ended)) for task in self._agent.tasks]
        self._options.watcher.agent_ended(self._agent.agent_id)
        return [task.result() for task in tasks]

    def _now(self) -> float:
        return time.monotonic() - self._start  # uvloop's own clock counts whole milliseconds

    async def _when_due(self, task: TaskTrace, ended: dict[str, asyncio.Event]) -> TaskResult:
        for name in task.after:
            await ended[name].wait()
        if task.think_s:
            await asyncio.sleep(task.think_s)
        self._unsent -= 1
        failed = [name for name in task.after if name in self._failed]
        if failed:
            now = self._now()
            result = TaskResult(
                self._agent.agent_id, task.id, now, now, error=f"not sent: task {failed[0]} before it failed"
            )
        else:
            # The program knows that no request will follow this one, though others may still be running.
            result = await self._send(task, final=self._unsent == 0)
        if result.error is not None:
            self._failed.add(task.id)
        self._options.watcher.task_ended(result)
        ended[task.id].set()
        return result

    async def _send(self, task: TaskTrace, *, final: bool) -> TaskResult:
        headers = {"Content-Type": "application/json", "X-Agent-ID": self._agent.agent_id}
        if self._agent.agent_class:
            headers["X-Agent-Class"] = self._agent.agent_class
        if self._agent.weight != 1:
            headers["X-Agent-Weight"] = str(self._agent.weight)
        if final:
            headers["X-Agent-Final"] = "true"
        body = _body(self._agent.agent_id, task, self._options)
        self._options.watcher.task_sent()
        submit_s, first_token_s, tail = self._now(), None, b""
        found: dict[str, Any] = {}
        try:
            async with self._session.post("/v1/chat/completions", data=body, headers=headers) as response:
                found = _from_headers(response)
                if response.status != 200:
                    raise _TaskFailed(f"HTTP {response.status}: {_message(await response.read())}")
                async for chunk in response.content.iter_any():
                    tail = (tail + chunk)[-TAIL_BYTES:]
                    if first_token_s is None and b"data:" in chunk:
                        first_token_s = self._now()
            found |= _from_tail(tail)
        except _TaskFailed as error:
            found["error"] = str(error)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            found["error"] = f"{type(error).__name__}: {error}".rstrip(": ")
        return TaskResult(self._agent.agent_id, task.id, submit_s, self._now(), first_token_s, **found)


class _TaskFailed(Exception):
    """The answer came, and was none."""


def _body(agent_id: str, task: TaskTrace, options: ReplayOptions) -> bytes:
    body: dict[str, Any] = {
        "model": options.model,
        "messages": [{"role": "user", "content": task.prompt if task.prompt is not None else _filler(agent_id, task)}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.length_key is not None:
        body["vllm_xargs"] = {"forced_length_key": options.length_key(agent_id, task.id)}
    return msgspec.json.encode(body)


def _filler(agent_id: str, task: TaskTrace) -> str:
    """A prompt for a task that was recorded without one: about a word for each token, shared prefix included."""
    shared = task.prefix.tokens if task.prefix else 0
    beginning = _words(f"prefix {task.prefix.id}", shared) if task.prefix else []
    return " ".join([*beginning, *_words(f"{agent_id} {task.id}", task.prompt_tokens - shared)])


def _words(seed: str, count: int) -> list[str]:
    rng = Random(seed)
    return text.document(rng, text.topic(rng), 2 * count).split()[:count] if count else []


def _from_headers(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """What our gateway adds; another server adds nothing."""
    found = {}
    for name, header, factor in (
        ("queue_s", "X-Justitia-Queue-Ms", 1e-3),
        ("predicted_cost", "X-Justitia-Predicted-Cost", 1.0),
    ):
        try:
            found[name] = float(response.headers[header]) * factor
        except (KeyError, ValueError):
            continue
    return found


def _from_tail(tail: bytes) -> dict[str, Any]:
    """Token counts from the last events of a stream. Raises `_TaskFailed` for one that broke off or failed."""
    events = [line[5:].strip() for line in tail.splitlines() if line.startswith(b"data:")]
    for event in reversed(events):
        if b'"error"' in event and _decoded(event).get("error"):
            raise _TaskFailed(f"in the stream: {_message(event)}")
        if b'"usage"' not in event:
            continue
        usage = _decoded(event).get("usage") or {}
        if "completion_tokens" in usage:
            if events[-1] != b"[DONE]":
                break
            return {
                "prompt_tokens": usage.get("prompt_tokens"),
                "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
                "output_tokens": usage["completion_tokens"],
            }
    raise _TaskFailed(
        "the stream broke off" if not events or events[-1] != b"[DONE]" else "the stream ended without usage"
    )


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _message(body: bytes) -> str:
    """The message of an error body, or as much of the body as fits on a line."""
    error = _decoded(body).get("error")
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return body[:200].decode(errors="replace")
