"""One task, from its place in the queue to its last byte.

Who relays a task owns its turn, and watches for its client's leaving from the start. However it ends, the turn is settled
without awaiting, so that nothing can come between. Only a response that is made in the background outlives its client.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
from starlette.types import Scope, Send

from engine.hints import PRIORITY_HEADER, Hints, to_tag
from gateway.flowcontrol.agents import AgentRecord
from gateway.flowcontrol.estimate import Estimate, estimate_agent, estimate_arrival
from gateway.flowcontrol.fairqueue import KvTokenIterations, Release, Spent, Task, TaskId
from gateway.http import writing as answers
from gateway.http.disconnect import Client
from gateway.http.reading import HeldBody
from gateway.http.writing import Headers
from gateway.learning.accuracy import NOBODY
from gateway.parts import Parts
from gateway.protocol.body import Body
from gateway.protocol.errors import RESTART_S, EngineLost, GatewayError, Outcome, ShuttingDown, outcome_of
from gateway.protocol.sse import UsageFilter
from gateway.protocol.texts import texts_of
from gateway.protocol.usage import Usage, UsageSearch, finished_task, parse_usage
from gateway.relay.dispatcher import Turn
from gateway.relay.engine_client import EVENTS, Answer, EngineUnreachable, Health
from gateway.relay.responses import outcome_of_response, unfinished, until_finished
from gateway.state import TenantUsage
from gateway.telemetry.request_span import RequestSpan
from gateway.tenancy.tenants import Tenant
from predictor.cost import task_cost

logger = logging.getLogger(__name__)

# Of an answer that is no stream. A larger one is gathered while there is room, else passed on as it comes; then it keeps its
# turn for as long as its client takes, and is not tried again when the engine is lost.
SMALL_BYTES = 2**18
# Of all that are larger together.
GATHERED_BYTES = 2**22


class TaskRequest(msgspec.Struct, frozen=True):
    """One task as it came. headers: by lower-case name. weight: of its agent. arrived_s: on the monotonic clock. final: the
    client says that it is its agent's last. span: told of what becomes of it. answer_id: by which the engine is to keep its
    answer, where it keeps any."""

    id: TaskId
    body: Body
    headers: dict[str, str]
    tenant: Tenant
    record: AgentRecord
    weight: float
    arrived_s: float
    final: bool
    span: RequestSpan
    held: HeldBody
    answer_id: str | None = None


class Relay:
    """Waits for the task's turn, lets the engine do it, relays the answer, and settles what it cost."""

    def __init__(self, parts: Parts, request: TaskRequest) -> None:
        self._parts = parts
        self._request = request
        self._outcome = Outcome.FAILED
        self._turn: Turn | None = None
        self._estimate: Estimate | None = None
        self._usage: Usage | None = None
        self._own_headers: Headers = [
            (b"x-agent-id", request.record.name.encode("ascii")),
            (b"x-agent-source", request.record.source.encode("ascii")),
        ]
        self._events = 0
        self._released_at: float | None = None  # on the service clock
        self._started = False  # bytes have left for the client
        self._streams = False  # and they are events
        self._made = False  # the engine is done with it, though it has not all come
        self._goes_on = False  # at the engine, whatever becomes of the client
        self._charged = self._settled = False
        self._cost: float | None = None  # in token·iterations, once it is charged
        self._engine_s = 0.0  # spent waiting for the engine

    async def serve(self, scope: Scope, send: Send) -> None:
        client = Client(scope)
        try:
            await self._serve(send)
        except asyncio.CancelledError:
            if not client.left:  # the gateway ends
                await self._send_error(ShuttingDown("the gateway is shutting down", retry_after_s=RESTART_S), send)
                raise
            self._outcome = Outcome.CANCELLED
            if not client.cancelled():
                raise
        finally:
            client.done()
            if not self._goes_on:
                self._settle()

    async def _serve(self, send: Send) -> None:
        try:
            turn = self._turn = self._enqueue()
            while True:
                limit_s = self._request.tenant.settings.max_queue_s or self._parts.settings.max_queue_s
                release = await turn.wait(limit_s)
                self._note_release(release, turn)
                try:
                    with turn.at_engine():
                        return await self._exchange(release, send)
                except EngineLost as lost:
                    self._request.span.engine_lost()
                    self._parts.engine_lost_a_task()
                    if self._started or not turn.requeue(sent=not isinstance(lost, EngineUnreachable)):
                        raise
                    self._request.span.queued()
                    self._released_at = None
        except GatewayError as error:
            self._outcome = error.outcome
            if error.reason is not None:
                self._parts.metrics.tenants.rejected(self._request.tenant.name, error.reason)
            await self._send_error(error, send)
        except Exception:
            logger.exception("a task failed")
            self._outcome = Outcome.FAILED
            await self._send_error(GatewayError("internal error"), send)

    def _enqueue(self) -> Turn:
        """Raises what `Dispatcher.submit` raises; then the agent's record is as it was."""
        request, parts = self._request, self._parts
        agent_id = request.record.id
        known = parts.queue.agents.get(agent_id)
        progress = request.record.progress(known.arrived if known else 0.0)
        begun_s = time.perf_counter()
        estimate = self._estimate = estimate_arrival(
            parts.predictor, request.body, progress, parts.engine.max_model_len
        )
        parts.metrics.learning.predicted(time.perf_counter() - begun_s, failed=estimate.agent.source == NOBODY)
        request.span.predicted(estimate.cost)
        task = Task(
            request.id,
            agent_id,
            KvTokenIterations(estimate.cost),
            estimate.memory_tokens,
            estimate.prompt_tokens,
            request.body.sequences,
        )
        try:
            turn = parts.dispatcher.submit(
                task, estimate.agent.cost, request.tenant, weight=request.weight, body_bytes=request.body.size
            )
        except Exception:
            parts.feedback.withdrawn(request.record)
            raise
        request.span.queued()
        parts.feedback.accepted(request.record, estimate, final=request.final)
        return turn

    def _note_release(self, release: Release, turn: Turn) -> None:
        agent = self._parts.queue.agents[release.task.agent_id]
        self._released_at = self._parts.engine.iterations
        self._parts.feedback.released(self._request.record, agent.predicted)
        self._request.span.released(agent.finish_tag)
        self._own_headers[2:] = [
            (b"x-justitia-queue-ms", b"%.1f" % (turn.queued_s * 1000)),
            (b"x-justitia-predicted-cost", b"%.0f" % agent.predicted),
            (b"x-justitia-finish-tag", b"%.0f" % agent.finish_tag),
        ]

    async def _exchange(self, release: Release, send: Send) -> None:
        """Raises `EngineLost` if the engine breaks off; nothing may have been sent by then."""
        request, client = self._request, self._parts.client
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
        held = HeldBody(self._parts.gathered)
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
            self._charge()
        await self._start(answer, send, length=len(data))
        await send(answers.body(data, more=False))

    async def _relay_large(self, answer: Answer, data: bytes, send: Send) -> None:
        """As it comes, so that an engine does not outrun who reads slowly. data: what has come already. If the client leaves,
        it has been made all the same, and is charged: by its usage, if that has come by, else by what was predicted."""
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
        self._charge()
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
                        if data.startswith(dialect.fails) and await self._parts.client.health() is not Health.UP:
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
        self._charge()

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
        self._parts.background.add(self._follow())

    async def _follow(self) -> None:
        """The engine goes on with what nobody waits for: it holds its memory until it is done."""
        answer_id, answer = self._request.answer_id, None
        assert answer_id is not None
        try:
            answer = await until_finished(self._parts.client, answer_id, self._request.headers)
        finally:
            if not self._settled:
                self._outcome = Outcome.FAILED if answer is None else outcome_of_response(answer)
                self._usage = None if answer is None else parse_usage(answer)
                self._settle()

    def _settle(self) -> None:
        """Charge what was used, if that has not been done, and say how it went, once. Awaits nothing."""
        if self._settled:
            return
        self._settled = True
        ended_s = time.monotonic()
        self._request.held.release()
        try:
            self._charge()
        finally:
            queue_s = None if self._turn is None else self._turn.queued_s
            if queue_s is not None:
                self._parts.metrics.requests.left_queue(self._outcome, queue_s)
            self._request.span.charged(self._usage, self._cost)
            self._request.span.ended(self._outcome, at_s=ended_s, queue_s=queue_s, engine_s=self._engine_s)

    def _charge(self) -> None:
        """Settle the turn, with what was used, once. Awaits nothing. Of an answer it is done before its end is sent: what a
        client has seen the end of is in the journal."""
        if self._turn is None or self._estimate is None or self._charged:
            return
        self._charged = True
        request, parts = self._request, self._parts
        agent = parts.queue.agents[request.record.id]
        finished, cost = None, 0.0
        try:
            if self._usage is not None and self._outcome is Outcome.COMPLETED:
                finished = finished_task(self._usage, request.body, parts.engine.held_by(request.id))
                if parts.settings.keep_text:
                    system, text = texts_of(request.body)
                    finished = msgspec.structs.replace(finished, prompt=text, system=system)
                finished = parts.feedback.placed(request.record, finished, request.arrived_s, self._estimate.row)
                cost = finished.cost
                arrived = max(0.0, agent.arrived - self._estimate.cost + cost)
                spent = Spent(KvTokenIterations(cost), finished.prompt_tokens, finished.decode_tokens)
                total: float = agent.predicted
                if arrived > total:  # else it stands
                    total = estimate_agent(parts.predictor, request.record.progress(arrived))
                self._turn.complete(spent, total)
            else:
                cost = self._cost_held(self._estimate)
                self._turn.cancel(Spent(KvTokenIterations(cost)))
        finally:
            self._turn.cancel(
                Spent(KvTokenIterations(0.0))
            )  # does nothing, unless the queue has refused what came before
            self._cost = cost
            told_later = parts.engine.counts_held and request.body.endpoint.xargs
            usage = self._usage
            if usage is None and self._made:
                usage = Usage(round(self._estimate.prompt_tokens), 0, 0)
            parts.feedback.ended(request.record, finished, request.id if told_later else None, _used(usage, cost))

    def _cost_held(self, estimate: Estimate) -> float:
        """Of a task that was broken off, in token·iterations: by its usage so far, if it was told; else by the engine's last
        word on it; else by the events that were relayed; else, since an engine without a link tells nothing before the
        end, by the iterations since its release, up to what was predicted. A whole answer that does not tell its usage, or
        not in the part that was passed on, has been made: by what the engine says that it held, or by what was predicted."""
        request, usage, sequences = self._request, self._usage, self._request.body.sequences
        holding = self._parts.engine.held.get(request.id)
        # A stream of Anthropic's begins with a usage that knows the prompt only.
        if usage is not None and (usage.completion_tokens or not request.body.endpoint.decodes):
            return finished_task(usage, request.body).cost
        prompt_tokens = (estimate.prompt_tokens if usage is None else usage.prompt_tokens) / sequences
        if holding is not None:
            decoded = holding.output_tokens / sequences
            return sequences * task_cost(max(0.0, holding.kv_tokens / sequences - decoded), decoded)
        if self._events:
            return sequences * task_cost(prompt_tokens, self._events / sequences)
        if self._outcome is Outcome.COMPLETED or self._made:
            return self._parts.engine.held_by(request.id) or estimate.cost
        if self._released_at is None or self._outcome is Outcome.INVALID or self._parts.engine.linked:
            return 0.0
        iterations = self._parts.engine.iterations - self._released_at
        return min(estimate.cost, sequences * task_cost(prompt_tokens, iterations))


def _used(usage: Usage | None, cost: float) -> TenantUsage:
    if usage is None:
        return TenantUsage(requests=1, kv_cost=cost)
    return TenantUsage(1, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, cost)
