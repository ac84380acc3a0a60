"""W3C Trace Context: the trace that a request belongs to, by its headers. https://www.w3.org/TR/trace-context/

A malformed header is treated as absent, and is not passed on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
MAX_MEMBERS = 32

# A later version may add to the four fields that we know.
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MEMBER = re.compile(
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """What the caller of a request sends about its trace."""

    trace_id: str  # as it is written, in lower-case hexadecimal; so is the next
    parent_id: str
    sampled: bool  # the caller keeps its spans
    state: str = ""  # what each tracing system recorded for itself, in one line


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
    """In one line, without empty members; empty if any of it is malformed."""
    members = [member for part in value.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > MAX_MEMBERS or len(keys) < len(members):
        return ""
    return ",".join(members) if all(map(_MEMBER.fullmatch, members)) else ""


def take_trace_context(headers: dict[str, str], raw: list[tuple[bytes, bytes]]) -> TraceContext | None:
    """headers: by lower-case name; malformed ones are removed. raw: the headers as they came, since the state may be spread
    over several; a parent that is given twice counts as malformed."""
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
