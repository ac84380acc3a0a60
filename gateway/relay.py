"""One task, from its place in the queue to its last byte, as an ASGI response.

The response owns the turn, since a handler may be gone before a byte is sent, and a generator that never starts never
cleans up. It watches for the client's leaving from the start. However it ends, the turn is settled without awaiting, so that
nothing can come between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from engine.hints import Hints, to_tag
from gateway.accuracy import NOBODY
from gateway.body import Body
from gateway.content import texts_of
from gateway.engine_client import Answer, EngineUnreachable, Health
from gateway.errors import RESTART_S, ClientStuck, EngineLost, GatewayError, Outcome, ShuttingDown
from gateway.estimate import Estimate, estimate_agent, estimate_arrival
from gateway.fairness import AgentId, KvTokenIterations, Release, Spent, Task, TaskId
from gateway.feedback import AgentRecord
from gateway.intake import HeldBody
from gateway.parts import Parts
from gateway.release import Turn
from gateway.sse import UsageFilter, begins_with_error, error_event
from gateway.usage import Usage, finished_task, parse_usage
from predictor.cost import task_cost

logger = logging.getLogger(__name__)

# Seconds that a chunk may wait for the client to read it.
SEND_S = 60.0
# The same, for the last word of a gateway that ends.
FAREWELL_S = 1.0


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """One task as it came. arrived_s: on the monotonic clock. final: the client says that it is its agent's last."""

    id: TaskId
    path: str
    body: Body
    headers: dict[str, str]
    record: AgentRecord
    arrived_s: float
    final: bool
    held: HeldBody


class TaskResponse(Response):
    """Waits for the task's turn, lets the engine do it, relays the answer, and settles what it cost.

    A `Response` for FastAPI's sake, which only calls it; nothing of the base class is used.
    """

    background = None

    def __init__(self, parts: Parts, request: TaskRequest) -> None:
        self._parts = parts
        self._request = request
        self._outcome = Outcome.FAILED
        self._turn: Turn | None = None
        self._estimate: Estimate | None = None
        self._usage: Usage | None = None
        self._own_headers: list[tuple[bytes, bytes]] = _ascii(
            {"x-agent-id": request.record.id, "x-agent-source": request.record.source}
        )
        self._events = 0
        self._released_at: float | None = None  # on the service clock
        self._started = False  # bytes have left for the client
        self._left = False
        self._engine_s = 0.0  # spent waiting for the engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        watch = asyncio.create_task(self._watch(receive, serving))
        try:
            await self._serve(send)
        except asyncio.CancelledError:
            if self._left:
                self._outcome = Outcome.CANCELLED
            else:
                await self._cut_off(send)
            if serving.uncancel():
                raise
        finally:
            watch.cancel()
            self._request.held.release()
            self._settle()

    async def _cut_off(self, send: Send) -> None:
        """The gateway ends. A client that does not read is not waited for."""
        self._outcome = Outcome.FAILED if self._started else Outcome.REJECTED
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._send_error(ShuttingDown("the gateway is shutting down", retry_after_s=RESTART_S), send)

    async def _watch(self, receive: Receive, serving: asyncio.Task[None]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left = True
        serving.cancel()

    async def _serve(self, send: Send) -> None:
        try:
            turn = self._turn = self._enqueue()
            while True:
                release = await turn.wait(self._parts.max_queue_s)
                self._note_release(release, turn)
                try:
                    return await self._exchange(release, send)
                except EngineLost as lost:
                    self._parts.engine_lost_a_task()
                    if self._started or not turn.requeue(sent=not isinstance(lost, EngineUnreachable)):
                        raise
                    self._released_at = None
        except GatewayError as error:
            self._outcome = error.outcome
            await self._send_error(error, send)
        except Exception:
            logger.exception("a task failed")
            self._outcome = Outcome.FAILED
            await self._send_error(GatewayError("internal error"), send)

    def _enqueue(self) -> Turn:
        """Raises what `Dispatcher.submit` raises; then the agent's record is as it was."""
        request, parts = self._request, self._parts
        agent_id = AgentId(request.record.id)
        known = parts.queue.agents.get(agent_id)
        progress = request.record.progress(known.arrived if known else 0.0)
        begun_s = time.perf_counter()
        estimate = self._estimate = estimate_arrival(
            parts.predictor, request.body, progress, parts.engine.max_model_len
        )
        parts.metrics.predicted(time.perf_counter() - begun_s, failed=estimate.agent.source == NOBODY)
        task = Task(
            request.id,
            agent_id,
            KvTokenIterations(estimate.cost),
            estimate.memory_tokens,
            estimate.prompt_tokens,
            request.body.sequences,
        )
        try:
            turn = parts.dispatcher.submit(task, estimate.agent.cost)
        except Exception:
            parts.feedback.withdrawn(request.record)
            raise
        parts.feedback.accepted(request.record, estimate, final=request.final)
        return turn

    def _note_release(self, release: Release, turn: Turn) -> None:
        agent = self._parts.queue.agents[release.task.agent_id]
        self._released_at = self._parts.engine.iterations
        self._parts.feedback.released(self._request.record, agent.predicted)
        self._own_headers = _ascii(
            {
                "x-agent-id": agent.id,
                "x-agent-source": self._request.record.source,
                "x-justitia-queue-ms": f"{turn.queued_s * 1000:.1f}",
                "x-justitia-predicted-cost": f"{agent.predicted:.0f}",
                "x-justitia-finish-tag": f"{agent.finish_tag:.0f}",
            }
        )

    async def _exchange(self, release: Release, send: Send) -> None:
        """Raises `EngineLost` if the engine breaks off; nothing may have been sent by then."""
        request = self._request
        hints = Hints(to_tag(release.rank), release.task.agent_id, release.task.id)
        asked_s = time.monotonic()
        async with self._parts.client.post(request.path, request.body.for_engine(hints), request.headers) as answer:
            self._engine_s += time.monotonic() - asked_s
            if answer.status >= 500 and await self._parts.client.health() is not Health.UP:
                raise EngineLost("the engine died")
            if answer.status == 200 and answer.content_type.startswith("text/event-stream"):
                await self._relay_events(answer, send)
            else:
                await self._relay_whole(answer, send)

    async def _relay_whole(self, answer: Answer, send: Send) -> None:
        asked_s = time.monotonic()
        data = await answer.read()
        self._engine_s += time.monotonic() - asked_s
        self._usage = parse_usage(data) if answer.status == 200 else None
        self._outcome = _outcome(answer.status)
        await self._start(answer, send, length=len(data))
        await send(_body(data, more=False))

    async def _relay_events(self, answer: Answer, send: Send) -> None:
        events = UsageFilter(show=self._request.body.wants_usage)
        since_s = time.monotonic()
        try:
            async for chunk in answer.chunks():
                self._engine_s += time.monotonic() - since_s
                if data := events.feed(chunk):
                    if not self._started:
                        if begins_with_error(data) and await self._parts.client.health() is not Health.UP:
                            raise EngineLost("the engine died")
                        await self._start(answer, send)
                        self._parts.metrics.first_token(time.monotonic() - self._request.arrived_s)
                    await self._send_chunk(data, send)
                since_s = time.monotonic()
        finally:
            self._usage, self._events = events.usage, events.events
        if not events.done:
            raise EngineLost("the engine broke off its answer")
        self._outcome = Outcome.COMPLETED if self._usage is not None else Outcome.FAILED  # it ended with an error event
        await send(_body(b"", more=False))

    async def _start(self, answer: Answer, send: Send, *, length: int | None = None) -> None:
        self._started = True
        headers = [(b"content-type", answer.content_type.encode("latin-1")), *self._own_headers]
        headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers.items()]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})

    async def _send_chunk(self, data: bytes, send: Send) -> None:
        """A client that reads nothing for long is taken for one that has left: its task holds memory meanwhile."""
        try:
            async with asyncio.timeout(SEND_S):
                await send(_body(data, more=True))
        except TimeoutError:
            raise ClientStuck(f"the client read nothing for {SEND_S:g} s") from None

    async def _send_error(self, error: GatewayError, send: Send) -> None:
        if self._started:
            await send(_body(error_event(error), more=False))
            return
        data = error.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data)), *self._own_headers]
        headers += _ascii(error.headers())
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send(_body(data, more=False))

    def _settle(self) -> None:
        """Charge what was used and say how it went. Awaits nothing."""
        request, parts = self._request, self._parts
        ended_s = time.monotonic() - request.arrived_s
        parts.metrics.request_ended(request.path, self._outcome, ended_s)
        if self._turn is None or self._estimate is None:
            return
        agent = parts.queue.agents[AgentId(request.record.id)]
        finished = None
        try:
            if self._usage is not None and self._outcome is Outcome.COMPLETED:
                finished = finished_task(self._usage, request.body, parts.engine.held_by(request.id))
                if parts.keep_text:
                    system, text = texts_of(request.body)
                    finished = msgspec.structs.replace(finished, prompt=text, system=system)
                finished = parts.feedback.placed(request.record, finished, request.arrived_s, self._estimate.row)
                arrived = max(0.0, agent.arrived - self._estimate.cost + finished.cost)
                spent = Spent(KvTokenIterations(finished.cost), finished.prompt_tokens, finished.decode_tokens)
                total: float = agent.predicted
                if arrived > total:  # else it stands
                    total = estimate_agent(parts.predictor, request.record.progress(arrived))
                self._turn.complete(spent, total)
            else:
                self._turn.cancel(Spent(KvTokenIterations(self._cost_held(self._estimate))))
        finally:
            self._turn.cancel(
                Spent(KvTokenIterations(0.0))
            )  # does nothing, unless the queue has refused what came before
            parts.feedback.ended(request.record, finished, request.id if parts.engine.counts_held else None)
        parts.metrics.left_queue(self._outcome, self._turn.queued_s)
        if self._outcome is Outcome.COMPLETED:
            parts.metrics.overhead(ended_s - self._turn.queued_s - self._engine_s)

    def _cost_held(self, estimate: Estimate) -> float:
        """Of a task that was broken off, in token·iterations: by its usage so far, if it was told; else by the engine's last
        word on it; else by the events that were relayed; else, since an engine without a link tells nothing before the
        end, by the iterations since its release, up to what was predicted."""
        request, sequences = self._request, self._request.body.sequences
        prompt_tokens = estimate.prompt_tokens / sequences
        holding = self._parts.engine.held.get(request.id)
        if self._usage is not None:
            return finished_task(self._usage, request.body).cost
        if holding is not None:
            decoded = holding.output_tokens / sequences
            return sequences * task_cost(max(0.0, holding.kv_tokens / sequences - decoded), decoded)
        if self._events:
            return sequences * task_cost(prompt_tokens, self._events / sequences)
        if self._released_at is None or self._outcome is Outcome.INVALID or self._parts.engine.linked:
            return 0.0
        iterations = self._parts.engine.iterations - self._released_at
        return min(estimate.cost, sequences * task_cost(prompt_tokens, iterations))


def _outcome(status: int) -> Outcome:
    if status < 400:
        return Outcome.COMPLETED
    return Outcome.INVALID if status < 500 else Outcome.FAILED


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _ascii(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
