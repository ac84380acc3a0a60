"""One task, from its turn to the last byte of its answer.

The relay owns its task's turn and is cancelled as soon as the client disconnects. However the task ends, its turn is settled
without awaiting, so that nothing can come between. Only a response that is made in the background outlives its client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec
from starlette.types import Scope, Send

from engine.hints import PRIORITY_HEADER, Hints, to_tag
from gateway.config.settings import Live
from gateway.flowcontrol import Arriving, Ending, Settlement
from gateway.flowcontrol.concurrency import ConcurrencyLimit
from gateway.flowcontrol.fairqueue import Release
from gateway.http import writing as answers
from gateway.http.disconnect import Client
from gateway.http.reading import HeldBody
from gateway.http.writing import Headers
from gateway.protocol.body import Body
from gateway.protocol.errors import RESTART_S, EngineLost, GatewayError, Outcome, ShuttingDown, outcome_of
from gateway.protocol.sse import UsageFilter
from gateway.protocol.texts import texts_of
from gateway.protocol.usage import Usage, UsageSearch, parse_usage
from gateway.relay.dispatcher import Dispatcher, Turn
from gateway.relay.engine_client import EVENTS, Answer, EngineClient, EngineUnreachable, Health
from gateway.relay.responses import Background, cancel_response, outcome_of_response, unfinished, until_finished
from gateway.telemetry.request_span import RequestSpan
from gateway.tenancy.tenants import Tenant

logger = logging.getLogger(__name__)

# Of an answer that is no stream. A larger one is gathered while there is room, else passed on as it comes; then it keeps its
# turn for as long as its client takes, and is not tried again when the engine is lost.
SMALL_BYTES = 2**18
# Of all that are larger together.
GATHERED_BYTES = 2**22


class TaskRequest(msgspec.Struct, frozen=True):
    """One task as it came."""

    tenant: Tenant
    arriving: Arriving
    body: Body
    headers: dict[str, str]  # by lower-case name
    span: RequestSpan
    held: HeldBody
    answer_id: str | None = None  # by which the engine is to keep its answer, where it keeps any


@dataclass(frozen=True, slots=True)
class Engine:
    """What relays share to have the engine do their tasks."""

    dispatcher: Dispatcher
    client: EngineClient
    gathered: ConcurrencyLimit  # of large answers
    background: Background
    live: Live


class Relay:
    """Waits for the task's turn, lets the engine do it, relays the answer, and settles the turn."""

    def __init__(self, engine: Engine, request: TaskRequest) -> None:
        self._engine = engine
        self._request = request
        self._outcome = Outcome.FAILED
        self._turn: Turn | None = None
        self._usage: Usage | None = None
        self._own_headers: Headers = [
            (b"x-agent-id", request.arriving.agent.encode("ascii")),
            (b"x-agent-source", request.arriving.source.encode("ascii")),
        ]
        self._events = 0
        self._started = False  # bytes have left for the client
        self._streams = False  # and they are events
        self._made = False  # the engine is done with it, though it has not all come
        self._goes_on = False  # at the engine, whatever becomes of the client
        self._settlement: Settlement | None = None
        self._ended = False
        self._engine_s = 0.0  # spent waiting for the engine

    async def serve(self, scope: Scope, send: Send) -> None:
        client = Client(scope)
        try:
            await self._serve(send)
        except asyncio.CancelledError:
            if not client.left:  # the gateway ends
                self._outcome = ShuttingDown.outcome
                self._settle_unless_it_goes_on()
                await self._send_error(ShuttingDown("the gateway is shutting down", retry_after_s=RESTART_S), send)
                raise
            self._outcome = Outcome.CANCELLED
            if not client.cancelled():
                raise
        finally:
            client.done()
            if not self._goes_on:
                self._end()

    async def _serve(self, send: Send) -> None:
        try:
            turn = self._turn = self._engine.dispatcher.submit(self._request.arriving)
            self._request.span.predicted(turn.task.estimate.cost)
            self._request.span.queued()
            while True:
                release = await turn.wait()
                self._note_release(release, turn)
                try:
                    with turn.at_engine():
                        return await self._exchange(release, send)
                except EngineLost as lost:
                    self._request.span.engine_lost()
                    reached = not isinstance(lost, EngineUnreachable)
                    if not turn.lost(reached=reached, retry=not self._started):
                        raise
                    self._request.span.queued()
        except GatewayError as error:
            self._outcome = error.outcome
            if error.reason is not None:
                self._engine.dispatcher.metrics.tenants.rejected(self._request.tenant.name, error.reason)
            self._settle_unless_it_goes_on()
            await self._send_error(error, send)
        except Exception:
            logger.exception("a task failed")
            self._outcome = Outcome.FAILED
            self._settle_unless_it_goes_on()
            await self._send_error(GatewayError("internal error"), send)

    def _note_release(self, release: Release, turn: Turn) -> None:
        agent = self._engine.dispatcher.flow.queue.agents[release.task.agent_id]
        self._request.span.released(agent.finish_tag)
        self._own_headers[2:] = [
            (b"x-justitia-queue-ms", b"%.1f" % (turn.task.queued_s * 1000)),
            (b"x-justitia-predicted-cost", b"%.0f" % agent.predicted),
            (b"x-justitia-finish-tag", b"%.0f" % agent.finish_tag),
        ]

    async def _exchange(self, release: Release, send: Send) -> None:
        """Raises `EngineLost` if the engine breaks off; nothing may have been sent by then."""
        request, client = self._request, self._engine.client
        hints = Hints(to_tag(release.rank), release.task.agent_id, release.task.id)
        endpoint = request.body.endpoint
        own = None if endpoint.priority else {PRIORITY_HEADER: str(hints.tag)}
        body = request.body.for_engine(hints, request.answer_id)
        asked_s = time.monotonic()
        request.span.asks_engine(request.headers)
        answer = await client.ask("POST", endpoint.path, body, request.headers, own)
        try:
            self._engine_s += time.monotonic() - asked_s
            if answer.status >= 500 and await client.health() is not Health.UP:
                raise EngineLost("the engine died")
            if answer.status == 200 and answer.content_type.startswith(EVENTS):
                await self._relay_events(answer, send)
            else:
                await self._relay_whole(answer, send)
        finally:
            answer.close()

    async def _relay_whole(self, answer: Answer, send: Send) -> None:
        chunks, size = [], 0
        held = HeldBody(self._engine.gathered, self._request.tenant)
        try:
            while chunk := await self._read(answer):
                chunks.append(chunk)
                size += len(chunk)
                if size > SMALL_BYTES and not self._request.body.background:
                    if not held.has_room(size - held.size):
                        break
                    held.grow(size - held.size)
        finally:
            held.release()
        if chunk:
            await self._relay_large(answer, b"".join(chunks), send)
            return
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._usage = parse_usage(answer.metadata or data) if answer.status == 200 else None
        self._outcome = outcome_of(answer.status)
        if self._request.body.background and answer.status == 200 and unfinished(data):
            self._go_on()
        else:
            self._settle()
        await self._start(answer, send, length=len(data))
        await send(answers.body(data, more=False))

    async def _relay_large(self, answer: Answer, data: bytes, send: Send) -> None:
        """As it comes, so that an engine does not outrun a client that reads slowly. data: what has come already. If the client
        leaves, the answer has been made all the same, and is charged: by its usage, if that has come by, else by what was
        predicted."""
        search = UsageSearch()
        self._made = answer.status == 200
        if answer.metadata and self._made:
            self._usage = parse_usage(answer.metadata)
        await self._start(answer, send, length=answer.length)
        while True:
            search.feed(data)
            if self._made and not answer.metadata:
                self._usage = search.usage
            chunk = await self._read(answer)
            if not chunk:
                break
            await send(answers.body(data, more=True))
            data = chunk
        self._outcome = outcome_of(answer.status)
        self._settle()
        await send(answers.body(data, more=False))

    async def _read(self, answer: Answer) -> bytes:
        asked_s = time.monotonic()
        data = await answer.read_some()
        self._engine_s += time.monotonic() - asked_s
        return data

    async def _relay_events(self, answer: Answer, send: Send) -> None:
        body = self._request.body
        dialect = body.endpoint.dialect
        events = UsageFilter(dialect, show=body.wants_usage)
        try:
            while chunk := await self._read(answer):
                if data := events.feed(chunk):
                    if not self._started:
                        if data.startswith(dialect.fails) and await self._engine.client.health() is not Health.UP:
                            raise EngineLost("the engine died")
                        if body.background:
                            self._go_on()
                        await self._start(answer, send)
                        self._streams = True
                        self._request.span.first_token()
                    if events.done:
                        self._note_end(events)
                    await send(answers.body(data, more=True))
        finally:
            self._usage, self._events = events.usage, events.events
        if not events.done:
            raise EngineLost("the engine broke off its answer")
        await send(answers.body(b"", more=False))

    def _note_end(self, events: UsageFilter) -> None:
        self._usage, self._events = events.usage, events.events
        self._goes_on = False
        failed = events.failed or self._usage is None  # it ended with an error event
        self._outcome = Outcome.FAILED if failed else Outcome.COMPLETED
        self._settle()

    async def _start(self, answer: Answer, send: Send, *, length: int | None = None) -> None:
        self._started = True
        self._request.span.answered(answer.status)
        headers = [self._request.span.header, *self._own_headers, *answer.headers]
        await send(answers.start(answer.status, answer.content_type, headers, length))

    async def _send_error(self, error: GatewayError, send: Send) -> None:
        dialect, span = self._request.body.endpoint.dialect, self._request.span
        span.failed(error)
        if self._streams:
            await send(answers.body(dialect.error_event(error), more=False))
        elif not self._started:  # else the connection is closed in the middle of the answer, which says it all
            await answers.send_error(error, dialect, send, [span.header, *self._own_headers])

    def _go_on(self) -> None:
        """From here on the task lasts as long as the engine says, and a stream of it may not: vLLM's does not end when the
        response is cancelled."""
        self._goes_on = True
        self._engine.background.add(self._follow())

    async def _follow(self) -> None:
        """The engine goes on with a response that no client waits for: it holds its memory until it is done, or its agent is
        ended."""
        answer_id, client, headers = self._request.answer_id, self._engine.client, self._request.headers
        assert answer_id is not None and self._turn is not None
        outcome, usage = Outcome.FAILED, None
        try:
            with self._turn.at_engine():
                answer = await until_finished(client, answer_id, headers)
            if answer is not None:
                outcome, usage = outcome_of_response(answer), parse_usage(answer)
        except GatewayError as error:
            outcome = error.outcome
            await cancel_response(client, answer_id, headers)
        finally:
            if not self._ended:
                self._outcome, self._usage = outcome, usage
                self._end()

    def _end(self) -> None:
        """Settle the turn, if that has not been done, and note how the request went, once. Awaits nothing."""
        if self._ended:
            return
        self._ended = True
        ended_s = time.monotonic()
        self._request.held.release()
        try:
            self._settle()
        finally:
            task = None if self._turn is None else self._turn.task
            if task is not None:
                self._engine.dispatcher.metrics.requests.left_queue(self._outcome, task.queued_s)
            self._request.span.charged(self._usage, None if self._settlement is None else self._settlement.cost)
            queue_s = None if task is None else task.queued_s
            self._request.span.ended(self._outcome, at_s=ended_s, queue_s=queue_s, engine_s=self._engine_s)

    def _settle_unless_it_goes_on(self) -> None:
        """Before an error is sent: a client that does not read it would hold the turn."""
        if not self._goes_on:
            self._settle()

    def _settle(self) -> None:
        """Settle the turn, once. Awaits nothing. Of an answer it is done before its end is sent: what a client has seen the end
        of is in the journal."""
        if self._turn is None or self._turn.settled:
            return
        system = text = None
        if self._usage is not None and self._outcome is Outcome.COMPLETED and self._engine.live.settings.keep_text:
            system, text = texts_of(self._request.body)
        ending = Ending(self._outcome, self._usage, self._events, self._made, text, system)
        self._settlement = self._turn.settle(ending)
