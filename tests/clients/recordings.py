"""What coding agents put on the wire, in shape: their headers, and the fields of their bodies. The texts are made up.

Each does the same work in its own way: eight requests of a main agent (`root`), which first has a title made for the session,
and of three sub-agents, of which the last (`inner`) is started by the first (`outer`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

ROOT = "root"
PARTS = ("outer", "other", "inner")


@dataclass(frozen=True)
class Request:
    """part: whose it is, the root's or a sub-agent's."""

    part: str
    path: str
    headers: dict[str, str]
    body: Body


@dataclass(frozen=True)
class CodingAgent:
    """record: all that a session sends, in order. source: the header by which its agent is known."""

    name: str
    record: Callable[[str], list[Request]]
    source: str


_WORK = ("Find out why the build is slow.", "Look at the cache.", "Look at the compiler.", "Look at one flag of it.")
_FOUND = "It is compiled twice."
_TOOLS = {
    "read_file": {"path": {"type": "string"}},
    "run": {"command": {"type": "string"}, "seconds": {"type": "integer"}},
    "ask_agent": {"task": {"type": "string"}},
}


def _schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _steps() -> Iterable[tuple[str, str, str]]:
    """Part, what it is asked, and what for: a title, a turn, or a turn that follows the answer of a tool."""
    yield ROOT, _WORK[0], "title"
    yield ROOT, _WORK[0], "turn"
    yield PARTS[0], _WORK[1], "turn"
    yield PARTS[1], _WORK[2], "turn"
    yield PARTS[2], _WORK[3], "turn"
    yield PARTS[0], _WORK[1], "result"
    yield PARTS[1], _WORK[2], "result"
    yield ROOT, _WORK[0], "result"


# Claude Code: Anthropic's messages. A session has one id, sub-agents name themselves beside it, and who started them only if
# that was a sub-agent too.


def claude_code(session: str, *, older: bool = False) -> list[Request]:
    """older: before it sent headers of its own, the session was to be found in the body only."""
    recorded = []
    for part, task, kind in _steps():
        headers = {
            "user-agent": "claude-cli/2.1.300 (external, cli)",
            "x-app": "cli",
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
            "x-stainless-lang": "js",
            "x-stainless-retry-count": "0",
            "x-client-request-id": str(uuid.uuid4()),
        }
        if not older:
            headers["x-claude-code-session-id"] = session
            if part != ROOT:
                headers["x-claude-code-agent-id"] = f"agent-{part}"
            if part == "inner":
                headers["x-claude-code-parent-agent-id"] = "agent-outer"
        recorded.append(Request(part, "/v1/messages", headers, _claude_body(session, task, kind)))
    return recorded


def _claude_body(session: str, task: str, kind: str) -> Body:
    if kind == "title":
        return {
            "model": "small",
            "max_tokens": 64,
            "system": [{"type": "text", "text": "Name the conversation in three words."}],
            "messages": [{"role": "user", "content": task}],
            "metadata": {"user_id": _claude_user(session)},
            "stream": True,
        }
    cached = {"cache_control": {"type": "ephemeral"}}
    messages: list[Body] = [{"role": "user", "content": [{"type": "text", "text": task, **cached}]}]
    if kind == "result":
        call = {"type": "tool_use", "id": "toolu_1", "name": "run", "input": {"command": "make", "seconds": 9}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": _FOUND, **cached}
        messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    return {
        "model": "large",
        "max_tokens": 32000,
        "system": [{"type": "text", "text": "You work in a terminal. Use the tools.", **cached}],
        "messages": messages,
        "tools": [
            {"name": name, "description": f"Can {name}.", "input_schema": _schema(properties)}
            for name, properties in _TOOLS.items()
        ],
        "metadata": {"user_id": _claude_user(session)},
        "stream": True,
    }


def _claude_user(session: str) -> str:
    return json.dumps({"device_id": "d" * 64, "account_uuid": "", "session_id": session}, separators=(",", ":"))


# Codex: OpenAI's responses. Each agent is a thread, whose session is its root's. A sub-agent that was spawned names the thread
# above it; one that reviews does not. Earlier the session's id was the thread's, of whatever depth.


def codex(session: str, *, older: bool = False) -> list[Request]:
    threads = {part: session if part == ROOT else f"{session}-{part}" for part in (ROOT, *PARTS)}
    recorded = []
    for part, task, kind in _steps():
        thread = threads[part]
        headers = {
            "user-agent": "codex_cli_rs/0.150.0 (Linux; x86_64)",
            "originator": "codex_cli_rs",
            "accept": "text/event-stream",
            "x-client-request-id": thread,
            "x-codex-window-id": f"{thread}:0",
            "x-codex-turn-metadata": json.dumps({"session_id": session, "thread_id": thread, "request_kind": "turn"}),
        }
        if older:
            headers["session_id"] = thread
        else:
            headers |= {"session-id": session, "thread-id": thread}
        if part != ROOT:
            reviews = part == "other" and not older
            headers["x-openai-subagent"] = "review" if reviews else "collab_spawn"
            if not reviews:
                headers["x-codex-parent-thread-id"] = threads["outer" if part == "inner" else ROOT]
        recorded.append(Request(part, "/v1/responses", headers, _codex_body(session, task, kind)))
    return recorded


def _codex_body(session: str, task: str, kind: str) -> Body:
    items: list[Body] = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": task}]}]
    if kind == "result":
        items += [
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "run",
                "arguments": '{"command":"make","seconds":9}',
            },
            {"type": "function_call_output", "call_id": "call_1", "output": _FOUND},
        ]
    tools = [
        {
            "type": "function",
            "name": name,
            "description": f"Can {name}.",
            "strict": False,
            "parameters": _schema(properties),
        }
        for name, properties in _TOOLS.items()
    ]
    return {
        "model": "small" if kind == "title" else "large",
        "instructions": "You work in a terminal. Use the tools.",
        "input": items,
        "tools": [] if kind == "title" else tools,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": session,
        "client_metadata": {"x-codex-installation-id": "i" * 32},
    }


# OpenCode: OpenAI's chats. Each sub-agent is a session of its own, that names the one above it.


def opencode(session: str) -> list[Request]:
    sessions = {part: session if part == ROOT else f"{session}-{part}" for part in (ROOT, *PARTS)}
    recorded = []
    for part, task, kind in _steps():
        headers = {
            "user-agent": "opencode/1.20.0",
            "x-session-affinity": sessions[part],
            "X-Session-Id": sessions[part],
        }
        if part != ROOT:
            headers["x-parent-session-id"] = sessions["outer" if part == "inner" else ROOT]
        recorded.append(Request(part, "/v1/chat/completions", headers, _opencode_body(task, kind)))
    return recorded


def _opencode_body(task: str, kind: str) -> Body:
    system = {"role": "system", "content": "You work in a terminal. Use the tools."}
    if kind == "title":
        instructs = {"role": "system", "content": "Name the conversation in three words."}
        return {"model": "small", "messages": [instructs, {"role": "user", "content": task}], "stream": True}
    messages: list[Body] = [system, {"role": "user", "content": task}]
    if kind == "result":
        call = {"name": "run", "arguments": '{"command":"make","seconds":9}'}
        messages += [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": _FOUND},
        ]
    return {
        "model": "large",
        "max_tokens": 32000,
        "messages": messages,
        "tools": [
            {
                "type": "function",
                "function": {"name": name, "description": f"Can {name}.", "parameters": _schema(properties)},
            }
            for name, properties in _TOOLS.items()
        ],
        "tool_choice": "auto",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


CODING_AGENTS = (
    CodingAgent("Claude Code", claude_code, "x-claude-code-session-id"),
    CodingAgent("Claude Code, older", lambda session: claude_code(session, older=True), "metadata.user_id"),
    CodingAgent("Codex", codex, "thread-id"),
    CodingAgent("Codex, older", lambda session: codex(session, older=True), "session_id"),
    CodingAgent("OpenCode", opencode, "x-session-affinity"),
)
