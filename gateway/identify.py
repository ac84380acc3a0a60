"""Which agent does a request belong to, and what kind of agent is it?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from gateway.errors import InvalidRequest

MAX_ID_CHARS = 255
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_COUNT = re.compile(r"[1-9][0-9]{0,5}")
_TRUE, _FALSE = {"true", "1"}, {"false", "0"}

# Until API keys are configured there is one tenant, and ids are its own.
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Identity:
    """agent_id: None when the request names no agent, and so is one of its own. source: where the id was found."""

    agent_id: str | None
    source: str
    agent_class: str | None
    tenant: str
    final: bool  # the client says that no further task of this agent will come
    expected_tasks: int | None = None  # how many the client says there will be: nothing is built on it but a prediction


def identify(headers: Mapping[str, str], fields: Mapping[str, msgspec.Raw]) -> Identity:
    """`headers`: case-insensitive; `fields`: the top level of the body, undecoded. Raises `InvalidRequest`.

    In this order: `X-Agent-ID`, `X-Session-ID`, `prompt_cache_key` in the body. Never a request id, and never an id that
    unrelated requests would share.
    """
    agent_id, source = None, "none"
    for header in ("x-agent-id", "x-session-id"):
        if (value := headers.get(header)) is not None:
            agent_id, source = _visible(value, header), header
            break
    else:
        key = _string(fields, "prompt_cache_key")
        if key:
            # Any text will do for OpenAI; what cannot be an id is named by its hash.
            is_id = len(key) <= MAX_ID_CHARS and _VISIBLE.fullmatch(key)
            agent_id = key if is_id else hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
            source = "prompt_cache_key"
    agent_class = headers.get("x-agent-class")
    return Identity(
        agent_id=agent_id,
        source=source,
        agent_class=None if agent_class is None else _visible(agent_class, "x-agent-class"),
        tenant=DEFAULT_TENANT,
        final=_flag(headers, "x-agent-final"),
        expected_tasks=_count(headers, "x-agent-tasks"),
    )


def _visible(value: str, name: str) -> str:
    if len(value) > MAX_ID_CHARS or not _VISIBLE.fullmatch(value):
        raise InvalidRequest(f"{name} must be 1 to {MAX_ID_CHARS} visible ASCII characters", param=name)
    return value


def _string(fields: Mapping[str, msgspec.Raw], name: str) -> str | None:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=str | None)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{name} must be a string", param=name) from error


def _count(headers: Mapping[str, str], name: str) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not _COUNT.fullmatch(value):
        raise InvalidRequest(f"{name} must be a whole number from 1 to 999999, not {value[:20]!r}", param=name)
    return int(value)


def _flag(headers: Mapping[str, str], name: str) -> bool:
    value = headers.get(name, "false").lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise InvalidRequest(f"{name} must be true or false, not {value[:20]!r}", param=name)
