"""Which agent does a request belong to, and what kind of agent is it?

Clients of many kinds say it in many ways, and none has to be configured: the first of the names below that is there counts.
A sub-agent is folded into its root, so that the same work is one agent in every client. Never a request id, and never an id
that unrelated requests would share.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Protocol

import msgspec

from gateway.errors import InvalidRequest
from predictor.shares import Shares

MAX_ID_CHARS = 255
MAX_WEIGHT = 1e6
# Of sub-agents whose roots are remembered, over all tenants.
MAX_ALIASES = 100_000

# Until API keys are configured there is one tenant, and ids are its own.
DEFAULT_TENANT = "default"

_VISIBLE = re.compile(r"[\x21-\x7e]+")
COUNT_PATTERN = "[1-9][0-9]{0,5}"
_COUNT = re.compile(COUNT_PATTERN)
_WEIGHT = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_TRUE, _FALSE = {"true", "1"}, {"false", "0"}

_OWN = ("x-agent-id", "x-agent-parent")
_OWN_FIELDS = ("agent_id", "program_id")
# Header with the id, and headers with its parent's: the first that names another counts. Ours comes first: what it says is
# checked, not guessed.
_HEADERS: dict[str, tuple[str, ...]] = {
    "x-llm-d-inference-fairness-id": (),
    "x-gateway-inference-fairness-id": (),
    "x-dynamo-session-id": ("x-dynamo-parent-session-id",),
    "x-litellm-trace-id": (),
    "x-litellm-session-id": (),
    "x-bf-session-id": (),
    "x-claude-code-session-id": (),  # its sub-agents have ids of their own beside it
    # Codex's threads have had one session, their root's, since its sub-agents did not all name the thread above them.
    "thread-id": ("session-id", "x-codex-parent-thread-id"),
    "session-id": ("x-codex-parent-thread-id",),
    "session_id": ("x-codex-parent-thread-id",),
    "x-session-affinity": ("x-parent-session-id",),
    "x-qwen-code-session-id": (),
    "x-amp-thread-id": (),
    "x-session-id": ("x-parent-session-id",),
}
ID_HEADERS = tuple(_HEADERS)
_NAMES = frozenset((*_OWN, *ID_HEADERS))
# What only sub-agents send beside their root's id.
_PARTS = {"x-claude-code-session-id": "x-claude-code-agent-id"}
_VENDOR = re.compile(r"x-[a-z0-9-]+-session-id")
ID_FIELDS = ("session_id", "metadata", "prompt_cache_key", "safety_identifier", "user")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NULL = msgspec.Raw(b"null")


class _Metadata(msgspec.Struct):
    """In the order in which they count; the last is Anthropic's word for `user`."""

    session_id: msgspec.Raw = _NULL
    agent_id: msgspec.Raw = _NULL
    user_id: msgspec.Raw = _NULL


_METADATA = _Metadata.__struct_fields__
_decode_metadata = msgspec.json.Decoder(_Metadata).decode


class Identity(msgspec.Struct, frozen=True):
    """name: what the client calls its agent; None when it names none, and the request is an agent of its own. parent: whose
    part it is, if it says so. source: where the name was found. weight: the share that is asked for."""

    name: str | None
    source: str
    agent_class: str | None
    final: bool  # the client says that no further task of this agent will come
    parent: str | None = None
    expected_tasks: int | None = None  # how many the client says there will be: nothing is built on it but a prediction
    weight: float | None = None


def identify(headers: Mapping[str, str], fields: Mapping[str, msgspec.Raw]) -> Identity:
    """`headers`: by lower-case name; `fields`: the top level of the body, undecoded. Raises `InvalidRequest` for what is
    wrong in our own headers and fields. Those of others were not meant for us: what cannot be an id is named by its hash,
    or passed over."""
    name, parent, source = _named(headers, fields)
    agent_class = headers.get("x-agent-class")
    final = _flag(headers, "x-agent-final") or (
        source == "x-dynamo-session-id" and headers.get("x-dynamo-session-final", "").lower() in _TRUE
    )
    if _PARTS.get(source) in headers:
        final = False  # a part ends, and not the whole
    return Identity(
        name=name,
        source=source,
        agent_class=None if agent_class is None else _visible(agent_class, "x-agent-class"),
        final=final,
        parent=parent,
        expected_tasks=_count(headers, "x-agent-tasks"),
        weight=_weight(headers, "x-agent-weight"),
    )


class Restored(Protocol):
    """name: of the root. aliases: of its sub-agents."""

    tenant: str
    name: str
    aliases: set[str]


class Roots:
    """Whose part a sub-agent is, by tenant. Where there are too many, those of the tenant that has most which were used least
    recently are forgotten; they would then be agents of their own, if they came back without naming their parent."""

    def __init__(self) -> None:
        self._roots: Shares[str, str] = Shares(MAX_ALIASES)

    def fold(self, tenant: str, name: str, parent: str | None) -> str:
        """The root of an agent: of its parent, if it names one, now or earlier; else itself."""
        if parent is not None and (root := self._root(tenant, parent)) != name:
            self._roots.put(tenant, name, root)
        return self._root(tenant, name)

    def restore(self, record: Restored) -> None:
        """An agent has come back after a restart, with its sub-agents."""
        for alias in record.aliases:
            self.fold(record.tenant, alias, record.name)

    def _root(self, tenant: str, name: str) -> str:
        # There is no circle: who is its own parent's root is not put below it.
        below = []
        while (above := self._roots.get(tenant, name)) is not None:
            below.append(name)
            name = above
        for descendant in below[:-1]:  # else a long chain would be gone through each time
            self._roots.put(tenant, descendant, name)
        return name


def _named(headers: Mapping[str, str], fields: Mapping[str, msgspec.Raw]) -> tuple[str | None, str | None, str]:
    """The name, its parent's, and where it was found."""
    own, own_parent = _OWN
    parent = headers.get(own_parent)
    parent = None if parent is None else _visible(parent, own_parent)
    # Ours are checked also where another goes before them.
    said = [(field, text) for field in _OWN_FIELDS if (text := _own_text(fields.get(field), field)) is not None]
    if (value := headers.get(own)) is not None:
        said.insert(0, (own, value))
    for source, text in said:
        _visible(text, source)
    if said:
        return said[0][1], parent, said[0][0]
    if not _NAMES.isdisjoint(headers):
        for header, parent_headers in _HEADERS.items():
            if value := headers.get(header):
                above = (named for name in parent_headers if (named := headers.get(name)) and named != value)
                named = next(above, None)
                return _as_id(value), parent or (_as_id(named) if named else None), header
    for header, value in headers.items():
        if value and header.endswith("-session-id") and _VENDOR.fullmatch(header) and "parent" not in header:
            return _as_id(value), parent, header
    for field in ID_FIELDS:
        if (raw := fields.get(field)) is not None:
            text, source = _in_metadata(raw) if field == "metadata" else (_text(raw), field)
            if text:
                return _as_id(text), parent, source
    return None, None, "none"


def _in_metadata(raw: msgspec.Raw) -> tuple[str | None, str]:
    try:
        metadata = _decode_metadata(raw)
    except _UNREADABLE:
        return None, ""
    for key in _METADATA:
        if text := _text(getattr(metadata, key)):
            return text, f"metadata.{key}"
    return None, ""


def _as_id(text: str) -> str:
    if len(text) <= MAX_ID_CHARS and _VISIBLE.fullmatch(text):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _visible(value: str, name: str) -> str:
    if len(value) > MAX_ID_CHARS or not _VISIBLE.fullmatch(value):
        raise InvalidRequest(f"{name} must be 1 to {MAX_ID_CHARS} visible ASCII characters", param=name)
    return value


def _text(raw: msgspec.Raw) -> str | None:
    try:
        return msgspec.json.decode(raw, type=str)
    except _UNREADABLE:
        return None


def _own_text(raw: msgspec.Raw | None, name: str) -> str | None:
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=str | None)
    except _UNREADABLE as error:
        raise InvalidRequest(f"{name} must be a string", param=name) from error


def _weight(headers: Mapping[str, str], name: str) -> float | None:
    value = headers.get(name)
    if value is None:
        return None
    weight = float(value) if _WEIGHT.fullmatch(value) else 0.0
    if not 0 < weight <= MAX_WEIGHT:
        raise InvalidRequest(
            f"{name} must be a decimal number above 0 and at most {MAX_WEIGHT:.0f}, not {value[:20]!r}", param=name
        )
    return weight


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
