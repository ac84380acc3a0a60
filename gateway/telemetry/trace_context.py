"""W3C Trace Context: of which trace a request says that it is a part.

What is malformed is as good as absent, and is not passed on either: https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
MAX_MEMBERS = 32

# A later version may say more after the four fields that we know.
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MEMBER = re.compile(
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """trace_id, parent_id: in lower-case hexadecimal, as they are written. sampled: the caller keeps its spans. state: what
    each tracing system wrote down for itself, in one line; empty if there is none."""

    trace_id: str
    parent_id: str
    sampled: bool
    state: str = ""


def parse_traceparent(value: str) -> TraceContext | None:
    found = _PARENT.fullmatch(value)
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not parent_id.strip("0"):
        return None
    return TraceContext(trace_id, parent_id, bool(int(flags, 16) & 1))


def parse_tracestate(value: str) -> str:
    """In one line, without empty members; nothing, if anything in it is wrong."""
    members = [member for part in value.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > MAX_MEMBERS or len(keys) < len(members):
        return ""
    return ",".join(members) if all(map(_MEMBER.fullmatch, members)) else ""


def take_trace_context(headers: dict[str, str], raw: list[tuple[bytes, bytes]]) -> TraceContext | None:
    """headers: by lower-case name; what is wrong is taken out. raw: the same as they came, since the state may be spread over
    several, and a parent that is given twice is none."""
    parent, state = headers.get(TRACEPARENT), headers.pop(TRACESTATE, None)
    if parent is None:
        return None
    context = parse_traceparent(parent)
    if context is None or sum(name == b"traceparent" for name, _ in raw) > 1:
        del headers[TRACEPARENT]
        return None
    if state is None:
        return context
    whole = ",".join(value.decode("latin-1") for name, value in raw if name == b"tracestate")
    if state := parse_tracestate(whole):
        headers[TRACESTATE] = state
    return TraceContext(context.trace_id, context.parent_id, context.sampled, state)
