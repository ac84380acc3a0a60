"""What the predictor learns of a request: its texts, and some numbers."""

from __future__ import annotations

import msgspec

from gateway.protocol.body import Body
from predictor.types import TaskContent

# Larger texts are not parsed: the predictor reads only their beginning and end.
LARGEST_BYTES = 2**18
_FORMS = ("response_format", "structured_outputs", "guided_json")
_INSTRUCTING = frozenset(("system", "developer"))
_INSTRUCTIONS, _CONVERSATIONS = frozenset(("instructions", "system")), frozenset(("messages", "input"))
# The parser of the body, called from less deep in the stack, may have accepted what recurses too far here.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Part(msgspec.Struct):
    text: str | None = None


class _Message(msgspec.Struct):
    role: str = ""
    content: str | list[_Part] | None = None


_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode_content = msgspec.json.Decoder(str | list[_Part] | None).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def content_of(body: Body) -> TaskContent:
    """Takes any body: what cannot be read as text is used as bytes."""
    tools = body.fields.get("tools")
    system, text, messages = _texts(body)
    return TaskContent(
        prompt_bytes=body.prompt_bytes // body.prompts,
        system=system,
        text=text,
        messages=messages,
        tools=_count(tools),
        tool_bytes=0 if tools is None else len(memoryview(tools)),
        max_tokens=body.max_tokens,
        sequences=body.sequences,
        structured=any(name in body.fields for name in _FORMS),
    )


def texts_of(body: Body) -> tuple[str | None, str | None]:
    """The instructions and the question, to be stored. None for a text that is missing or too large."""
    system, text, _ = _texts(body)
    return _kept(system), _kept(text)


def _texts(body: Body) -> tuple[bytes, bytes, int]:
    """The instructions, the question, and the number of messages."""
    instructs: list[bytes] = []
    asked: list[bytes] = []
    messages = 1
    for name in body.endpoint.texts:
        raw = body.fields.get(name)
        if raw is None or name == "tools":
            continue
        data = bytes(memoryview(raw))
        if name in _INSTRUCTIONS:
            instructs.append(_plain(data))
        elif name in _CONVERSATIONS:
            system, text, messages = _conversation(data)
            instructs.append(system)
            asked.append(text)
        else:
            asked.append(_plain(data))
    return _joined(instructs), _joined(asked), messages


def _joined(texts: list[bytes]) -> bytes:
    return texts[0] if len(texts) == 1 else b"\n".join(text for text in texts if text)


def _conversation(data: bytes) -> tuple[bytes, bytes, int]:
    if len(data) > LARGEST_BYTES:
        return b"", data, 1
    if data.lstrip()[:1] != b"[":
        return b"", _plain(data), 1
    try:
        messages = _decode_messages(data)
    except _UNREADABLE:
        return b"", data, 1
    system = [_text(message.content) for message in messages if message.role in _INSTRUCTING]
    asked = [_text(message.content) for message in messages if message.role not in _INSTRUCTING]
    return _encode(system), _encode(asked), len(messages)


def _plain(data: bytes) -> bytes:
    """The text of a string, or of parts with texts; anything else unchanged."""
    if len(data) > LARGEST_BYTES:
        return data
    try:
        return _encode([_text(_decode_content(data))])
    except _UNREADABLE:
        return data


def _kept(text: bytes) -> str | None:
    return text.decode("utf-8", "replace") if 0 < len(text) <= LARGEST_BYTES else None


def _text(content: str | list[_Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if part.text)


def _encode(texts: list[str]) -> bytes:
    return "\n".join(texts).encode("utf-8", "surrogatepass")


def _count(tools: msgspec.Raw | None) -> int:
    if tools is None or len(memoryview(tools)) > LARGEST_BYTES:
        return 0
    try:
        return len(_decode_list(tools))
    except _UNREADABLE:
        return 0
