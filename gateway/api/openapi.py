"""The gateway's OpenAPI document: what can be asked of it, and what it answers.

FastAPI knows nothing of the endpoints that clients use. Here they are described from what they are made of: the tables of
endpoints, the tree of errors, the dialects, and what `identify` and `body` look at. The rest of a body, and of an answer, is
the engine's, and is described by the engine.
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
Headers = dict[str, tuple[str, str]]  # by name: pattern, and what it says

# Asked by who watches over the gateway, and without a key.
OPEN = ("/health", "/ready", "/metrics")
# Errors that say when to try again; and those of requests that were in the queue, from here on.
TRY_AGAIN, QUEUED = (429, 503), 429

_DESCRIPTION = """\
Schedules whole agents in front of vLLM. Of a request's body only what the gateway itself reads and checks is described here;
everything else goes to the engine as it came, and what the engine answers, its errors too, comes back as it is."""

_ID = f"^[!-~]{{1,{MAX_ID_CHARS}}}$"
_HEADERS_IN: Headers = {
    "X-Agent-ID": (_ID, "The agent that the request is a part of: the unit of fairness."),
    "X-Agent-Class": (_ID, "What kind of agent it is: what the predictor learns by."),
    "X-Agent-Parent": (_ID, "The agent whose part this one is: both count as one."),
    "X-Agent-Weight": (
        # Above 0, and at most 1,000,000.
        r"^(?=.*[1-9])(0{0,3}[0-9]{1,6}(\.[0-9]{1,9})?|0{0,2}1000000(\.0{1,9})?)$",
        "Its share, relative to the tenant's other agents.",
    ),
    "X-Agent-Tasks": (f"^{COUNT_PATTERN}$", "How many requests the agent will send in all."),
    "X-Agent-Final": ("^([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]|[01])$", "Whether this is the agent's last request."),
}
_HEADERS_OUT: Headers = {
    "X-Agent-ID": ("", "The agent that the request was counted to: the root of the one that it named."),
    "X-Agent-Source": ("", "Where the name was found: a header, a field of the body, or `none`."),
    "X-Justitia-Queue-Ms": (r"^[0-9]+\.[0-9]$", "Milliseconds spent in the queue."),
    "X-Justitia-Predicted-Cost": ("^[0-9]+$", "Of the agent, in KV token·iterations."),
    "X-Justitia-Finish-Tag": ("^-?[0-9]+$", "The agent's virtual finish time."),
    "Retry-After": ("^[0-9]+$", "Seconds after which to try again."),
}
AGENT_HEADERS = ("X-Agent-ID", "X-Agent-Source")
TURN_HEADERS = ("X-Justitia-Queue-Ms", "X-Justitia-Predicted-Cost", "X-Justitia-Finish-Tag")
RETRY_AFTER = ("Retry-After",)

_FLAG: Json = {"type": ["boolean", "null"]}
_OBJECT: Json = {"type": ["object", "null"], "maxProperties": MAX_FIELDS}
_NAME: Json = {"type": ["string", "null"], "pattern": _ID}
_FIELDS: Json = {
    "stream": {**_FLAG, "description": "Whether the answer is to be a stream of events."},
    "stream_options": {**_OBJECT, "description": "With `include_usage`: whether the stream is to tell the usage."},
    "background": {**_FLAG, "description": "Whether the answer is to be fetched later (responses only)."},
    "vllm_xargs": {**_OBJECT, "description": "For the engine. The gateway adds its own, which begin with `justitia_`."},
    "agent_id": {**_NAME, "description": "As the header `X-Agent-ID`, which counts before it."},
    "program_id": {**_NAME, "description": "As `agent_id`, which counts before it."},
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
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI's clients send a key."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "As Anthropic's clients do."},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key", "description": "As Azure's clients do."},
}


def describe(app: FastAPI) -> None:
    """From now on this is the document that the application tells."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> Json:
    told = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    # With no keys configured none is wanted.
    told["security"] = [*({name: []} for name in _KEYS), {}]
    shared = told.setdefault("components", {})
    shared.setdefault("schemas", {}).update(_SCHEMAS)
    shared |= {
        "securitySchemes": _KEYS,
        "parameters": {name: _parameter(name, *said) for name, said in _HEADERS_IN.items()},
        "headers": {name: _header(*said) for name, said in _HEADERS_OUT.items()},
        "responses": {},
    }
    errors = _Errors(shared["responses"])
    paths: Json = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})["post"] = _task(endpoint, errors)
    for passthrough in PASSTHROUGH:
        paths.setdefault(passthrough.path, {})[passthrough.method.lower()] = _passthrough(passthrough, errors)
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            paths.setdefault(path, {})[method] = _operation(method, path, operation, errors)
    return {**told, "paths": paths}


class _Errors:
    """Those of the gateway, by status. shared: where each is described once."""

    def __init__(self, shared: Json) -> None:
        self._shared = shared
        self._by_status: dict[int, dict[str, type[GatewayError]]] = {}
        for error in sorted(_below(GatewayError), key=lambda error: (error.status, error.code)):
            self._by_status.setdefault(error.status, {}).setdefault(error.code, error)
        self.statuses = tuple(self._by_status)

    def told(self, dialect: Dialect, *, queued: bool = False, but: Iterable[int] = ()) -> Json:
        """queued: of requests that may have been in the queue. but: statuses that are not among them."""
        return {str(status): self._told(dialect, status, queued) for status in self.statuses if status not in but}

    def _told(self, dialect: Dialect, status: int, queued: bool) -> Json:
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
                **({"headers": _told(headers)} if headers else {}),
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
        "summary": "Waits for its turn, and is then done by the engine",
        "description": f"Without `X-Agent-ID` an agent is named by the first that is there of {_listed(ID_HEADERS)}, any header"
        f" `x-<vendor>-session-id`, {_listed(ID_FIELDS)}. Else the request is an agent of its own.",
        "tags": ["tasks"],
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in _HEADERS_IN],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {
                "description": "The engine's answer.",
                "headers": _told([*AGENT_HEADERS, *TURN_HEADERS]),
                "content": answers,
            },
            **errors.told(endpoint.dialect, queued=True, but=(NotFound.status,)),
            **_others(endpoint.dialect),
        },
    }


def _fields(endpoint: Endpoint) -> Json:
    """What of a body is read, and how it is checked."""
    fields: Json = {name: {"description": "A part of the prompt."} for name in endpoint.texts}
    for name in endpoint.batch:
        fields[name] = {"description": f"A part of the prompt. A list may hold several, at most {MAX_SEQUENCES}."}
    if endpoint.decodes:
        fields["n"] = {
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": MAX_SEQUENCES,
            "description": f"Answers to each prompt; over all of them at most {MAX_SEQUENCES}.",
        }
    for name in endpoint.limits:
        fields[name] = {"type": ["integer", "null"], "minimum": 0, "description": "Tokens to decode at most."}
    fields |= _FIELDS
    if endpoint.dialect is RESPONSES:
        fields["previous_response_id"] = {
            "type": ["string", "null"],
            "pattern": f"^{ID_PATTERN}$",
            "description": "A response of one's own, from which this one goes on.",
        }
    for name in ID_FIELDS:
        fields.setdefault(name, {"description": "May name the agent."})
    return fields


def _passthrough(endpoint: PassthroughEndpoint, errors: _Errors) -> Json:
    operation: Json = {
        "operationId": _name(endpoint.method, endpoint.path),
        "summary": "Is done by the engine at once",
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
        **errors.told(endpoint.dialect, but=never),
        **_others(endpoint.dialect),
    }
    return operation


def _operation(method: str, path: str, operation: Json, errors: _Errors) -> Json:
    """One of FastAPI's own."""
    responses = operation["responses"]
    responses.pop("422", None)  # told as 400, as all that is wrong
    operation |= {"operationId": _name(method, path), "tags": ["operations"]}
    if path in OPEN:
        return {**operation, "security": []}
    told = {401, 403} | {int(status) for status in responses}
    if "parameters" in operation:
        told.add(InvalidRequest.status)
    if "{" in path:
        told.add(NotFound.status)
    never = [status for status in errors.statuses if status not in told]
    return {**operation, "responses": {**responses, **errors.told(OPENAI, but=never)}}


def _others(dialect: Dialect) -> Json:
    return {"default": {"description": "Whatever else the engine answers.", "content": _error_content(dialect)}}


def _error_content(dialect: Dialect) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{_schema(dialect)}"}}}


def _schema(dialect: Dialect) -> str:
    return "AnthropicError" if dialect is ANTHROPIC else "Error"


def _example(dialect: Dialect, error: type[GatewayError]) -> Json:
    told: Json = msgspec.json.decode(dialect.error(error(error.code.replace("_", " "))))
    return told


def _below(error: type[GatewayError]) -> Iterator[type[GatewayError]]:
    for below in error.__subclasses__():
        yield below
        yield from _below(below)


def _parameter(name: str, pattern: str, says: str) -> Json:
    return {"name": name, "in": "header", "schema": {"type": "string", "pattern": pattern}, "description": says}


def _header(pattern: str, says: str) -> Json:
    return {"schema": {"type": "string", **({"pattern": pattern} if pattern else {})}, "description": says}


def _told(headers: Iterable[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _name(method: str, path: str) -> str:
    words = path.translate(str.maketrans("/{}.-", "     ")).split()
    return "_".join([method.lower(), *words])
