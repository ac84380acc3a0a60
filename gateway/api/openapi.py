"""The gateway's OpenAPI document: its endpoints, and what they answer.

FastAPI does not know the endpoints that clients use. They are described here from what they are made of: the tables of
endpoints, the tree of errors, the dialects, and what `identify` and `body` read. The engine describes the rest of a body and
of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gateway.api.passthrough import PASSTHROUGH, PassthroughEndpoint
from gateway.protocol.body import MAX_FIELDS, MAX_SEQUENCES
from gateway.protocol.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect
from gateway.protocol.endpoints import ENDPOINTS, Endpoint
from gateway.protocol.errors import GatewayError, InvalidRequest, NotFound, WaitedTooLong
from gateway.protocol.identify import COUNT_PATTERN, ID_FIELDS, ID_HEADERS, MAX_ID_CHARS
from gateway.relay.responses import ID_PATTERN

Json = dict[str, Any]
Headers = dict[str, tuple[str, str]]  # by name: pattern and description

# For monitoring: these need no key.
OPEN = ("/health", "/ready", "/metrics")
# The statuses with `Retry-After`; and the lowest status of a request that was in the queue.
TRY_AGAIN, QUEUED = (429, 503), 429

_DESCRIPTION = """\
Schedules whole agents in front of vLLM. Only the parts of a request's body that the gateway itself reads and validates are
described here; everything else is forwarded to the engine unchanged, and so are the engine's answers, errors included."""

_ID = f"^[!-~]{{1,{MAX_ID_CHARS}}}$"
_HEADERS_IN: Headers = {
    "X-Agent-ID": (_ID, "The agent that the request belongs to: the unit of fairness."),
    "X-Agent-Class": (_ID, "The class of the agent, by which the predictor learns."),
    "X-Agent-Parent": (_ID, "The agent of which this one is a part: both count as one."),
    "X-Agent-Weight": (
        # Above 0, and at most 1,000,000.
        r"^(?=.*[1-9])(0{0,3}[0-9]{1,6}(\.[0-9]{1,9})?|0{0,2}1000000(\.0{1,9})?)$",
        "Its share, relative to the tenant's other agents.",
    ),
    "X-Agent-Tasks": (f"^{COUNT_PATTERN}$", "The total number of requests that the agent will send."),
    "X-Agent-Final": ("^([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]|[01])$", "Whether this is the agent's last request."),
}
_HEADERS_OUT: Headers = {
    "X-Agent-ID": ("", "The agent that the request was counted towards: the root of the one that it named."),
    "X-Agent-Source": ("", "Where the agent's name was found: a header, a field of the body, or `none`."),
    "X-Justitia-Queue-Ms": (r"^[0-9]+\.[0-9]$", "Milliseconds spent in the queue."),
    "X-Justitia-Predicted-Cost": ("^[0-9]+$", "The predicted cost of the whole agent, in KV token·iterations."),
    "X-Justitia-Finish-Tag": ("^-?[0-9]+$", "The agent's virtual finish time."),
    "Retry-After": ("^[0-9]+$", "Seconds to wait before trying again."),
}
AGENT_HEADERS = ("X-Agent-ID", "X-Agent-Source")
TURN_HEADERS = ("X-Justitia-Queue-Ms", "X-Justitia-Predicted-Cost", "X-Justitia-Finish-Tag")
RETRY_AFTER = ("Retry-After",)

_FLAG: Json = {"type": ["boolean", "null"]}
_OBJECT: Json = {"type": ["object", "null"], "maxProperties": MAX_FIELDS}
_NAME: Json = {"type": ["string", "null"], "pattern": _ID}
_FIELDS: Json = {
    "stream": {**_FLAG, "description": "Whether to answer with a stream of events."},
    "stream_options": {**_OBJECT, "description": "`include_usage`: whether the stream ends with a usage event."},
    "background": {
        **_FLAG,
        "description": "Whether to answer at once and let the response be fetched later (responses only).",
    },
    "vllm_xargs": {
        **_OBJECT,
        "description": "For the engine. The gateway adds arguments of its own, which begin with `justitia_`.",
    },
    "agent_id": {**_NAME, "description": "Same as the header `X-Agent-ID`, which takes precedence."},
    "program_id": {**_NAME, "description": "Same as `agent_id`, which takes precedence."},
}

_MESSAGE: Json = {"message": {"type": "string"}, "type": {"type": "string"}}
_WRONG: Json = {"type": ["string", "null"], "description": "The field or header that was wrong."}
_SCHEMAS: Json = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type"],
                "properties": {**_MESSAGE, "param": _WRONG, "code": {"type": ["string", "integer", "null"]}},
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {"type": "object", "required": ["type", "message"], "properties": _MESSAGE},
        },
    },
}
_KEYS: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "How OpenAI's clients send a key."},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "How Anthropic's clients send a key.",
    },
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key", "description": "How Azure's clients send a key."},
}


def describe(app: FastAPI) -> None:
    """Make this the application's document."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> Json:
    document = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    # No key is needed while none are configured.
    document["security"] = [*({name: []} for name in _KEYS), {}]
    shared = document.setdefault("components", {})
    shared.setdefault("schemas", {}).update(_SCHEMAS)
    shared |= {
        "securitySchemes": _KEYS,
        "parameters": {name: _parameter(name, *described) for name, described in _HEADERS_IN.items()},
        "headers": {name: _header(*described) for name, described in _HEADERS_OUT.items()},
        "responses": {},
    }
    errors = _Errors(shared["responses"])
    paths: Json = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})["post"] = _task(endpoint, errors)
    for passthrough in PASSTHROUGH:
        paths.setdefault(passthrough.path, {})[passthrough.method.lower()] = _passthrough(passthrough, errors)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            paths.setdefault(path, {})[method] = _operation(method, path, operation, errors)
    return {**document, "paths": paths}


class _Errors:
    """The gateway's errors, by status."""

    def __init__(self, shared: Json) -> None:
        self._shared = shared  # where each is described once
        self._by_status: dict[int, dict[str, type[GatewayError]]] = {}
        for error in sorted(_below(GatewayError), key=lambda error: (error.status, error.code)):
            self._by_status.setdefault(error.status, {}).setdefault(error.code, error)
        self.statuses = tuple(self._by_status)

    def responses(self, dialect: Dialect, *, queued: bool = False, but: Iterable[int] = ()) -> Json:
        """queued: whether the request may have been in the queue. but: the statuses to leave out."""
        return {str(status): self._response(dialect, status, queued) for status in self.statuses if status not in but}

    def _response(self, dialect: Dialect, status: int, queued: bool) -> Json:
        queued = queued and status >= QUEUED
        name = f"{_schema(dialect)}{status}{'Queued' * queued}"
        if name not in self._shared:
            errors = self._by_status[status]
            content = _error_content(dialect)
            content["application/json"]["examples"] = {
                code: {"value": _example(dialect, errors[code])} for code in errors
            }
            headers = [*(AGENT_HEADERS if queued else ()), *(RETRY_AFTER if status in TRY_AGAIN else ())]
            self._shared[name] = {
                "description": " or ".join(f"`{code}`" for code in errors) + ".",
                **({"headers": _references(headers)} if headers else {}),
                "content": content,
            }
        return {"$ref": f"#/components/responses/{name}"}


def _task(endpoint: Endpoint, errors: _Errors) -> Json:
    answers: Json = {"application/json": {"schema": {"type": "object"}}}
    if endpoint.decodes:
        answers["text/event-stream"] = {"schema": {}}
    body = {
        "type": "object",
        "properties": _fields(endpoint),
        "maxProperties": MAX_FIELDS,
        "additionalProperties": True,
    }
    return {
        "operationId": _name("post", endpoint.path),
        "summary": "Waits in the queue, then runs on the engine",
        "description": f"Without `X-Agent-ID`, the first of these that is present names the agent: {_listed(ID_HEADERS)},"
        f" any header `x-<vendor>-session-id`, {_listed(ID_FIELDS)}. Otherwise the request is an agent of its own.",
        "tags": ["tasks"],
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in _HEADERS_IN],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {
                "description": "The engine's answer.",
                "headers": _references([*AGENT_HEADERS, *TURN_HEADERS]),
                "content": answers,
            },
            **errors.responses(endpoint.dialect, queued=True, but=(NotFound.status,)),
            **_others(endpoint.dialect),
        },
    }


def _fields(endpoint: Endpoint) -> Json:
    """The fields of a body that are read, and how they are validated."""
    fields: Json = {name: {"description": "A part of the prompt."} for name in endpoint.texts}
    for name in endpoint.batch:
        fields[name] = {"description": f"A part of the prompt, or a list of at most {MAX_SEQUENCES} prompts."}
    if endpoint.decodes:
        fields["n"] = {
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": MAX_SEQUENCES,
            "description": f"Answers to each prompt; at most {MAX_SEQUENCES} for all prompts together.",
        }
    for name in endpoint.limits:
        fields[name] = {
            "type": ["integer", "null"],
            "minimum": 0,
            "description": "The maximum number of tokens to decode.",
        }
    fields |= _FIELDS
    if endpoint.dialect is RESPONSES:
        fields["previous_response_id"] = {
            "type": ["string", "null"],
            "pattern": f"^{ID_PATTERN}$",
            "description": "A response of the same tenant, which this one continues.",
        }
    for name in ID_FIELDS:
        fields.setdefault(name, {"description": "May name the agent."})
    return fields


def _passthrough(endpoint: PassthroughEndpoint, errors: _Errors) -> Json:
    operation: Json = {
        "operationId": _name(endpoint.method, endpoint.path),
        "summary": "Is forwarded to the engine at once, without queuing",
        "tags": ["beside the queue"],
    }
    never = [InvalidRequest.status, WaitedTooLong.status]
    if "{id}" in endpoint.path:
        schema = {"type": "string", "pattern": f"^{ID_PATTERN}$"}
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": schema}]
    else:
        never.append(NotFound.status)
        if endpoint.method == "POST":
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": {}}}}
    operation["responses"] = {
        "200": {"description": "The engine's answer.", "content": {"application/json": {"schema": {}}}},
        **errors.responses(endpoint.dialect, but=never),
        **_others(endpoint.dialect),
    }
    return operation


def _operation(method: str, path: str, operation: Json, errors: _Errors) -> Json:
    """An endpoint that FastAPI describes."""
    responses = operation["responses"]
    responses.pop("422", None)  # answered as 400, like every invalid request
    operation |= {"operationId": _name(method, path), "tags": ["operations"]}
    if path in OPEN:
        return {**operation, "security": []}
    possible = {401, 403} | {int(status) for status in responses}
    if "parameters" in operation:
        possible.add(InvalidRequest.status)
    if "{" in path:
        possible.add(NotFound.status)
    never = [status for status in errors.statuses if status not in possible]
    return {**operation, "responses": {**responses, **errors.responses(OPENAI, but=never)}}


def _others(dialect: Dialect) -> Json:
    return {"default": {"description": "Any other answer of the engine.", "content": _error_content(dialect)}}


def _error_content(dialect: Dialect) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{_schema(dialect)}"}}}


def _schema(dialect: Dialect) -> str:
    return "AnthropicError" if dialect is ANTHROPIC else "Error"


def _example(dialect: Dialect, error: type[GatewayError]) -> Json:
    example: Json = msgspec.json.decode(dialect.error(error(error.code.replace("_", " "))))
    return example


def _below(error: type[GatewayError]) -> Iterator[type[GatewayError]]:
    for below in error.__subclasses__():
        yield below
        yield from _below(below)


def _parameter(name: str, pattern: str, description: str) -> Json:
    return {"name": name, "in": "header", "schema": {"type": "string", "pattern": pattern}, "description": description}


def _header(pattern: str, description: str) -> Json:
    return {"schema": {"type": "string", **({"pattern": pattern} if pattern else {})}, "description": description}


def _references(headers: Iterable[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _name(method: str, path: str) -> str:
    words = path.translate(str.maketrans("/{}.-", "     ")).split()
    return "_".join([method.lower(), *words])
