"""What must hold of the parsers whatever they are given: asked by Hypothesis with what is nearly right, by atheris with what
reaches new code. Each raises an `AssertionError` or whatever went wrong."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import msgspec

from engine.hints import Hints
from gateway.flowcontrol.engine_state import EngineState
from gateway.flowcontrol.settlement import cost_of_finished
from gateway.http.writing import ascii_headers
from gateway.protocol.body import LARGEST_LIMIT, MAX_SEQUENCES, Body, parse_body
from gateway.protocol.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect
from gateway.protocol.endpoints import Endpoint
from gateway.protocol.errors import InvalidRequest
from gateway.protocol.identify import MAX_ID_CHARS, MAX_WEIGHT, Identity, identify
from gateway.protocol.sse import UsageFilter
from gateway.protocol.texts import content_of, texts_of
from gateway.protocol.usage import parse_usage
from gateway.relay.stock_metrics import MOST_COUNTED, StockMetrics
from predictor.cost import task_cost
from predictor.learned import Learned
from predictor.types import AgentProgress, FinishedTask

HINTS = Hints(tag=-5, agent="default/a", task=7)
OURS = {"priority", "vllm_xargs", "stream_options", "request_id", "agent_id", "program_id"}
_END = b"\n\n"
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_predictor = Learned()


def strict_json(data: bytes) -> Any:
    """By another parser. Raises `ValueError`, or `RecursionError`. Whole numbers may be of any length."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(data.decode(), parse_constant=refuse, parse_int=lambda digits: int(digits[:400]))


def body_holds(data: bytes, endpoint: Endpoint) -> None:
    """An accepted body leaves as valid JSON, byte for byte but for what is ours; a refused one says so in every dialect."""
    try:
        body = parse_body(data, endpoint)
    except InvalidRequest as refused:
        _can_be_told(refused)
        return
    try:
        told = strict_json(data)
    except RecursionError:
        return
    assert type(told) is dict
    assert 1 <= body.prompts <= body.sequences <= MAX_SEQUENCES
    assert body.max_tokens is None or 0 <= body.max_tokens <= LARGEST_LIMIT
    assert 0 <= body.prompt_bytes <= body.size == len(data)
    for request_id in (None, "resp_0"):
        _leaves_as_it_came(body, _raw(data), request_id)
    _can_be_predicted(body)
    identity_holds({}, body.fields)


def _leaves_as_it_came(body: Body, came: Mapping[str, msgspec.Raw], request_id: str | None) -> None:
    sent = body.for_engine(HINTS, request_id)
    told, left = strict_json(sent), _raw(sent)
    assert left.keys() - came.keys() <= OURS
    assert came.keys() - left.keys() <= {"agent_id", "program_id"}
    for name, raw in came.items():
        if name not in OURS:
            assert bytes(left[name]) == bytes(raw)
    for name in came.keys() & left.keys() & {"vllm_xargs", "stream_options"}:
        inner, sent_inner = _inner(came[name]), _inner(left[name])
        for key in inner.keys() - {"justitia_agent", "justitia_task", "justitia_tag", "include_usage"}:
            assert bytes(sent_inner[key]) == bytes(inner[key])
    endpoint = body.endpoint
    if endpoint.priority:
        assert told["priority"] == HINTS.tag
    if endpoint.xargs:
        xargs = told["vllm_xargs"]
        assert (xargs["justitia_agent"], xargs["justitia_task"]) == (HINTS.agent, HINTS.task)
        assert xargs.get("justitia_tag", HINTS.tag) == HINTS.tag
    if body.stream and endpoint.dialect.hides_usage:
        assert told["stream_options"]["include_usage"] is True
    if request_id is not None:
        assert told["request_id"] == request_id


def _inner(raw: msgspec.Raw) -> Mapping[str, msgspec.Raw]:
    return {} if bytes(raw) == b"null" else _raw(raw)


def _can_be_predicted(body: Body) -> None:
    texts_of(body)
    arrival = _predictor.arrive(content_of(body), AgentProgress("class", "default"))
    for number in (arrival.task.cost, arrival.task.memory_tokens, arrival.agent.cost, arrival.agent.p90):
        assert math.isfinite(number)
        assert number >= 0


def identity_holds(headers: Mapping[str, str], fields: Mapping[str, msgspec.Raw]) -> Identity | None:
    """Names are short and visible, or hashes; nothing is raised but `InvalidRequest`."""
    try:
        identity = identify(headers, fields)
    except InvalidRequest as refused:
        _can_be_told(refused)
        return None
    for name in (identity.name, identity.parent, identity.agent_class):
        assert name is None or _is_visible(name)
    assert identity.weight is None or 0 < identity.weight <= MAX_WEIGHT
    assert identity.expected_tasks is None or 0 < identity.expected_tasks < 10**6
    ascii_headers({"x-agent-id": identity.name or "task-1", "x-agent-source": identity.source})
    return identity


def _is_visible(name: str) -> bool:
    return 0 < len(name) <= MAX_ID_CHARS and all("!" <= character <= "~" for character in name)


def _can_be_told(refused: InvalidRequest) -> None:
    for dialect in (OPENAI, RESPONSES, ANTHROPIC):
        assert json.loads(dialect.error(refused))["error"]["message"] == refused.message
        assert dialect.error_event(refused).endswith(_END)


def stream_holds(data: bytes, cuts: Sequence[int], dialect: Dialect, *, show: bool) -> None:
    """However a stream is cut, the same leaves: its whole events in their order, but for those with usage alone."""
    at_once = UsageFilter(dialect, show=show)
    out = at_once.feed(data)
    in_parts = UsageFilter(dialect, show=show)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [in_parts.feed(data[begin:end]) for begin, end in itertools.pairwise(places)]
    assert b"".join(parts) == out
    for attribute in ("usage", "events", "done", "failed"):
        assert getattr(in_parts, attribute) == getattr(at_once, attribute)
    *events, _ = data.split(_END)
    left = 0
    for event in events:
        if out[left:].startswith(event + _END):
            left += len(event) + len(_END)
            continue
        assert not show
        assert dialect.hides_usage
        assert b'"usage"' in event
        assert b'"choices"' in event
    assert left == len(out)
    assert at_once.events <= data.count(b"\n")


def usage_holds(data: bytes) -> None:
    usage = parse_usage(data)
    if usage is None:
        return
    assert 0 <= usage.cached_tokens <= usage.prompt_tokens
    assert usage.completion_tokens >= 0
    for sequences in (1, 2048):
        done = FinishedTask(
            2, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, sequences, sequences=sequences
        )
        cost = cost_of_finished(done, task_cost)
        assert math.isfinite(cost)
        assert cost >= 0


def metrics_hold(expositions: Sequence[str]) -> None:
    """One after the other: what is refused changes nothing, and the clock never goes back."""
    view, stock = EngineState(), StockMetrics()
    for now_s, exposition in enumerate(expositions):
        before, iterations = deepcopy(vars(stock)), view.iterations
        try:
            messages = stock.messages(exposition)
        except ValueError:
            assert vars(stock) == before
        else:
            for message in messages:
                view.take(message, float(now_s), linked=False)
            assert view.reporting
        assert iterations <= view.iterations <= iterations + MOST_COUNTED
        for number in (view.capacity_tokens, view.held_tokens, float(view.running), float(view.waiting)):
            assert math.isfinite(number)
            assert number >= 0
