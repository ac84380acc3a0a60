"""The client, against a server on a real socket: what it sends, when, and what it makes of good and bad answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.agent_trace import AgentTrace, Prefix, TaskTrace
from gateway.demo.client import ReplayOptions, TaskResult, replay
from gateway.demo.workload import length_key, length_table
from tests.benchmarks.stand_in import StandIn

pytestmark = pytest.mark.wire


@dataclass
class Recorder:
    """Notes every request, then hands it to an engine, or answers with `events` as they stand."""

    engine: StandIn = field(default_factory=StandIn)
    status: int = 200
    events: bytes | None = None
    hang_up: bool = False
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        self.bodies.append(json.loads(message["body"]))
        if self.events is None:

            async def again() -> Any:
                return message

            await self.engine(scope, again, send)
            return
        await send(
            {"type": "http.response.start", "status": self.status, "headers": [(b"x-justitia-queue-ms", b"250")]}
        )
        await send({"type": "http.response.body", "body": self.events, "more_body": self.hang_up})
        if self.hang_up:
            raise ConnectionAbortedError("on purpose")

    def final(self) -> list[bool]:
        return ["x-agent-final" in headers for headers in self.headers]


def agent(*tasks: TaskTrace, agent_id: str = "a", arrival_s: float = 0.0) -> AgentTrace:
    return AgentTrace(agent_id, arrival_s, tasks, "map-reduce")


Run = Callable[..., Awaitable[list[TaskResult]]]


@pytest.fixture
def run(serving: Any) -> Run:
    """`await run(app, *agents, **options)`: the results of a replay against `app`."""

    async def run(app: Any, *agents: AgentTrace, **options: Any) -> list[TaskResult]:
        async with serving(app) as url:
            return (await replay(agents, ReplayOptions(url, "tiny", **options))).tasks

    return run


async def test_a_task_is_a_streamed_chat_completion_with_an_opaque_key_and_no_length(run: Run) -> None:
    app = Recorder()
    await run(
        app, agent(TaskTrace("t", 5, 7, prompt="Hello")), length_key=lambda agent_id, task_id: f"{agent_id}+{task_id}"
    )
    (body,), (headers,) = app.bodies, app.headers
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "vllm_xargs": {"forced_length_key": "a+t"},
    }
    assert (headers["x-agent-id"], headers["x-agent-class"], headers["x-agent-final"]) == ("a", "map-reduce", "true")


async def test_the_engine_s_table_gives_the_length(run: Run) -> None:
    mix = [agent(TaskTrace("t", 5, 7), TaskTrace("u", 5, 31))]
    app = StandIn(lengths=length_table([mix], "salt"))
    results = await run(app, *mix, length_key=lambda *names: length_key("salt", *names))
    assert [(task.task_id, task.output_tokens, task.error) for task in results] == [("t", 7, None), ("u", 31, None)]


async def test_times_are_in_order(run: Run) -> None:
    (task,) = await run(StandIn(output_tokens=5, token_s=0.02), agent(TaskTrace("t", 5, 5), arrival_s=0.1))
    assert task.first_token_s is not None
    assert 0.1 <= task.submit_s < task.first_token_s < task.end_s
    assert task.end_s - task.first_token_s >= 0.06


async def test_stages_wait_for_those_before_them_and_think(run: Run) -> None:
    first, second, last = await run(
        StandIn(output_tokens=2, token_s=0.02),
        agent(TaskTrace("m1", 5, 5), TaskTrace("m2", 5, 5), TaskTrace("r", 5, 5, after=("m1", "m2"), think_s=0.1)),
    )
    assert last.submit_s >= max(first.end_s, second.end_s) + 0.1
    assert max(first.submit_s, second.submit_s) < min(first.end_s, second.end_s), "neither waits for the other"


async def test_the_last_request_of_a_fan_out_is_final_though_others_run(run: Run) -> None:
    app = Recorder(StandIn(token_s=0.01))
    await run(app, agent(*(TaskTrace(f"t{i}", 5, 5) for i in range(3))))
    assert sorted(app.final()) == [False, False, True]


async def test_the_last_stage_is_final_and_none_before_it(run: Run) -> None:
    app = Recorder()
    await run(app, agent(TaskTrace("m", 5, 5), TaskTrace("n", 5, 5), TaskTrace("r", 5, 5, after=("m", "n"))))
    assert app.final() == [False, False, True]


async def test_a_prompt_that_was_not_recorded_is_made_up_with_its_shared_beginning(run: Run) -> None:
    app = Recorder()
    prefix = Prefix("sys", 20)
    await run(
        app, agent(TaskTrace("t", 50, 5, prefix=prefix), TaskTrace("u", 60, 5, prefix=prefix), TaskTrace("v", 30, 5))
    )
    words = sorted((body["messages"][0]["content"].split() for body in app.bodies), key=len)
    assert [len(each) for each in words] == [30, 50, 60]
    assert words[1][:20] == words[2][:20]
    assert words[1][20:] != words[2][20:50]


DONE = b"data: [DONE]\n\n"
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
)


async def test_what_engine_and_gateway_tell_is_kept(run: Run) -> None:
    (task,) = await run(Recorder(events=USAGE + DONE), agent(TaskTrace("t", 5, 5)))
    assert (task.prompt_tokens, task.cached_tokens, task.output_tokens, task.queue_s) == (3, 1, 2, 0.25)


@pytest.mark.parametrize(
    ("app", "error"),
    [
        (Recorder(status=429, events=b'{"error":{"message":"queue full"}}'), "HTTP 429: queue full"),
        (Recorder(status=500, events=b"oops"), "HTTP 500: oops"),
        (Recorder(events=b'data: {"error":{"message":"engine died"}}\n\n' + DONE), "in the stream: engine died"),
        (Recorder(events=USAGE), "the stream broke off"),
        (Recorder(events=b""), "the stream broke off"),
        (Recorder(events=b'data: {"choices":[]}\n\n' + DONE), "the stream ended without usage"),
        (Recorder(events=USAGE, hang_up=True), "ClientPayloadError"),
    ],
)
async def test_a_bad_answer_is_an_error_and_never_a_result(run: Run, app: Recorder, error: str) -> None:
    (task,) = await run(app, agent(TaskTrace("t", 5, 5)))
    assert task.error is not None
    assert error in task.error
    assert task.output_tokens is None


async def test_tasks_after_one_that_failed_are_counted_too(run: Run) -> None:
    chain = agent(TaskTrace("t", 5, 5), TaskTrace("u", 5, 5, after=("t",)))
    results = await run(Recorder(status=503, events=b"{}"), chain)
    assert [task.error for task in results] == ["HTTP 503: {}", "not sent: task t before it failed"]


async def test_nobody_there() -> None:
    result = await replay([agent(TaskTrace("t", 5, 5))], ReplayOptions("http://127.0.0.1:9", "tiny"))
    assert len(result.errors) == 1
    assert "Connect" in (result.errors[0].error or "")


async def test_a_task_that_takes_too_long(run: Run) -> None:
    (task,) = await run(StandIn(output_tokens=2, token_s=0.5), agent(TaskTrace("t", 5, 5)), task_timeout_s=0.2)
    assert task.error == "TimeoutError"


async def test_progress_is_told(run: Run) -> None:
    told: list[str] = []

    class Watch:
        def task_sent(self) -> None:
            told.append("sent")

        def task_ended(self, result: TaskResult) -> None:
            told.append(result.task_id)

        def agent_ended(self, agent_id: str) -> None:
            told.append(agent_id)

    await run(StandIn(), agent(TaskTrace("t", 5, 5), TaskTrace("u", 5, 5, after=("t",))), watcher=Watch())
    assert told == ["sent", "t", "sent", "u", "a"]


async def test_a_cancelled_replay_leaves_nothing_behind(serving: Any) -> None:
    app = StandIn(token_s=0.05)
    async with serving(app) as url:
        before = asyncio.all_tasks()
        replaying = asyncio.create_task(replay([agent(TaskTrace("t", 5, 5))], ReplayOptions(url, "tiny")))
        while not app.running:
            await asyncio.sleep(0)
        replaying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await replaying
        leftover = {task for task in asyncio.all_tasks() - before if "replay" in repr(task.get_coro())}
        assert not leftover
