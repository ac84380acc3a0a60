"""What the gateway overrides, calls, reads or sets of uvicorn's own classes, most of it private, as a table.

`check()` compares the table with the uvicorn that is installed, when the gateway starts. So a release that no longer fits is
reported with its version and the range that does, instead of as an `AttributeError` in the middle of a request.

`FITS` rests on the table itself and on the tests, both run on the locked release. Another release in which every fact holds
is accepted.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterable
from importlib import metadata
from typing import Any, NamedTuple

FITS = ">=0.54,<0.55"


class UvicornDoesNotFit(Exception):
    """The installed uvicorn lacks what client connections are built on. The message holds one fact per line."""


class Call(NamedTuple):
    """A function that is overridden or called, and its parameters without self."""

    name: str
    parameters: str

    def complaint(self) -> str | None:
        """Raises as `_resolve` does."""
        found = " ".join(one for one in inspect.signature(_resolve(self.name)).parameters if one != "self")
        return None if found == self.parameters else f"takes ({found}), not ({self.parameters})"


class Fields(NamedTuple):
    """Attributes that are read or set on the instances of a class."""

    name: str
    fields: str

    def complaint(self) -> str | None:
        """Raises as `_resolve` does."""
        found = _resolve(self.name)
        methods = [one for one in vars(found).values() if inspect.isfunction(one)]
        known = {
            step.argval for method in methods for step in dis.get_instructions(method) if step.opname == "STORE_ATTR"
        }
        lacking = [field for field in self.fields.split() if field not in known and not hasattr(found, field)]
        return f"has no {', '.join(lacking)}" if lacking else None


class Lines(NamedTuple):
    """Code that a function has to contain, because the gateway's own rests on it."""

    name: str
    lines: tuple[str, ...]

    def complaint(self) -> str | None:
        """Raises as `_resolve` does."""
        source = inspect.getsource(_resolve(self.name))
        lacking = [f"`{line}`" for line in self.lines if line not in source]
        return f"does not contain {', '.join(lacking)}" if lacking else None


Fact = Call | Fields | Lines

_PROTOCOL = "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol"
_CYCLE = "uvicorn.protocols.http.httptools_impl:RequestResponseCycle"
_FLOW = "uvicorn.protocols.http.flow_control:FlowControl"
_SERVER = "uvicorn.server:Server"

FACTS: tuple[Fact, ...] = (
    # The protocol: what `ClientConnection` overrides or calls.
    Call(f"{_PROTOCOL}.__init__", "config server_state app_state _loop"),
    Call(f"{_PROTOCOL}.connection_made", "transport"),
    Call(f"{_PROTOCOL}.connection_lost", "exc"),
    Call(f"{_PROTOCOL}.data_received", "data"),
    Call(f"{_PROTOCOL}.on_message_begin", ""),
    Call(f"{_PROTOCOL}.on_headers_complete", ""),
    Call(f"{_PROTOCOL}.on_body", "body"),
    Call(f"{_PROTOCOL}.on_message_complete", ""),
    Call(f"{_PROTOCOL}.on_response_complete", ""),
    Call(f"{_PROTOCOL}.shutdown", ""),
    Call(f"{_PROTOCOL}._start_asgi_task", "cycle app"),
    # The protocol: what it reads or sets.
    Fields(_PROTOCOL, "loop transport parser flow pipeline cycle url headers client server_state"),
    Fields("uvicorn.server:ServerState", "total_requests connections tasks"),
    # A head is bounded while `url` and `headers` grow; the request keeps its headers when the attribute is replaced.
    Lines(f"{_PROTOCOL}.on_url", ("self.url += url",)),
    Lines(f"{_PROTOCOL}.on_header", ("self.headers.append((name, value))",)),
    Lines(f"{_PROTOCOL}.on_message_begin", ('"headers": self.headers', '"state": self.app_state.copy()')),
    # Requests that were sent ahead: their order, and that reading pauses for them.
    Lines(
        f"{_PROTOCOL}.on_headers_complete",
        (
            "on_response=self.on_response_complete",
            "if existing_cycle is None or existing_cycle.response_complete:",
            "self.flow.pause_reading()",
            "self.pipeline.appendleft((self.cycle, app))",
        ),
    ),
    # Reading pauses at a large body.
    Lines(f"{_PROTOCOL}.on_body", ("self.cycle.body += body", "self.flow.pause_reading()")),
    # What `ClientConnection.on_response_complete` does in its place.
    Lines(
        f"{_PROTOCOL}.on_response_complete",
        (
            "self.server_state.total_requests += 1",
            "if self.transport.is_closing():",
            "self.flow.resume_reading()",
            "= self.pipeline.pop()",
            "self.timeout_keep_alive_task = self.loop.call_later(",
        ),
    ),
    Lines(f"{_PROTOCOL}.connection_lost", ("self.cycle.message_event.set()",)),
    # One request, and the stand-ins for its transport.
    Fields(_CYCLE, "scope transport keep_alive more_body response_started disconnected message_event"),
    Lines(
        f"{_CYCLE}.send",
        (
            "if self.disconnected:",
            "self.response_started = True",
            "if not self.keep_alive:",
            "self.transport.close()",
            "self.on_response()",
        ),
    ),
    Lines(f"{_CYCLE}.receive", ("self.flow.resume_reading()", "await self.message_event.wait()")),
    Fields(_FLOW, "read_paused"),
    Call(f"{_FLOW}.resume_reading", ""),
    # The server, which `gateway.server` derives from, and where it makes a connection.
    Call(f"{_SERVER}.serve", "sockets"),
    Call(f"{_SERVER}.shutdown", "sockets"),
    Call(f"{_SERVER}.capture_signals", ""),
    Fields(_SERVER, "should_exit server_state"),
    Lines(f"{_SERVER}.startup", ("config.http_protocol_class(",)),
)


def check(facts: Iterable[Fact] = FACTS) -> None:
    """Raises `UvicornDoesNotFit`, with every fact that does not hold."""
    complaints = [f"{fact.name} {complaint}" for fact in facts if (complaint := _complaint(fact)) is not None]
    if complaints:
        raise UvicornDoesNotFit(
            f"uvicorn {metadata.version('uvicorn')} does not fit, {FITS} does:\n" + "\n".join(complaints)
        )


def _complaint(fact: Fact) -> str | None:
    try:
        return fact.complaint()
    except (ImportError, AttributeError) as error:
        return f"is missing ({error})"
    except (OSError, TypeError, ValueError) as error:  # it is not Python, or has no source
        return f"cannot be read ({error})"


def _resolve(name: str) -> Any:
    """What `module:Class.attribute` names. Raises `ImportError` and `AttributeError`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
