"""What is drawn: JSON that is right, nearly right, or absurd, as the bytes that a client would send."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from gateway.protocol.endpoints import ENDPOINTS, Endpoint
from gateway.protocol.identify import ID_FIELDS, ID_HEADERS

ABSURD_NUMBERS = (
    "1e400",
    "-1e400",
    "9" * 30,
    "-" + "9" * 30,
    "9" * 4299,
    "9" * 4301,
    "1.0",
    "5e0",
    "0.1e1",
    "-0",
    "2.5",
)
ABSURD_STRINGS = (
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    '"a\\r\\nb"',
    '"\u202e\u0663"',
    '"\ud800"',  # as no UTF-8
    '"a/b"',
    '"red/a"',
    '""',
    '"' + "x" * 300 + '"',
)
_DEEP = tuple(o * depth + "0" + c * depth for depth in (100, 995, 3000) for o, c in (("[", "]"), ('{"a":', "}")))
_MANY = (
    "[" + '"",' * 3000 + '""]',
    "[" + "[1]," * 2047 + "[2]]",
    "{" + ",".join(f'"{n}":0' for n in range(1025)) + "}",
)

# As text: what `json.dumps` would not write too.
json_text: st.SearchStrategy[str] = st.one_of(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    ).map(lambda value: json.dumps(value, allow_nan=True)),
    st.sampled_from(ABSURD_NUMBERS + ABSURD_STRINGS),
    st.sampled_from(("NaN", "Infinity", "01", "+1", "{", "[", '"', "", "nul", "'a'", '{"a":1,"a":2}')),
    st.sampled_from(_DEEP + _MANY),
)

_MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
]
_RIGHT: dict[str, Any] = {
    "model": "tiny",
    "messages": _MESSAGES,
    "prompt": ["one", "two"],
    "input": ["one", "two"],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "n": 2,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": False},
    "background": True,
    "vllm_xargs": {"mine": 1.50, "justitia_tag": -9},
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "max_output_tokens": 5,
    "temperature": 0.5,
    "agent_id": "a",
    "program_id": "p",
    "priority": -9,
    "request_id": "mine",
    "previous_response_id": None,
    "metadata": {"user_id": "u", "other": [1]},
    **{name: "someone" for name in ID_FIELDS if name != "metadata"},
}

# Those that are checked.
_NARROW = ("n", "max_tokens", "max_completion_tokens", "stream", "stream_options", "vllm_xargs", "agent_id", "metadata")


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Some fields of a right body, none to three of them replaced; now and then one that is there twice."""
    names = draw(st.lists(st.sampled_from(sorted(_RIGHT)), unique=True, max_size=8))
    fields = [(json.dumps(name), json.dumps(_RIGHT[name])) for name in names]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(_NARROW) | st.sampled_from(sorted(_RIGHT)) | st.text(max_size=5))
        values = st.sampled_from(ABSURD_NUMBERS) | json_text if type(_RIGHT.get(name)) is int else json_text
        fields.insert(draw(st.integers(0, len(fields))), (json.dumps(name), draw(values)))
    space = draw(st.sampled_from(("", " ", "\n\t")))
    text = "{" + ",".join(f"{space}{name}{space}:{space}{value}" for name, value in fields) + "}"
    return text.encode("utf-8", "surrogatepass")


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A body with some bytes cut out, put in or doubled."""
    data = bytearray(draw(bodies()))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        end = min(len(data), place + draw(st.integers(0, 8)))
        data[place:end] = draw(st.binary(max_size=4) | st.just(bytes(data[place:end]) * 2))
    return bytes(data)


any_body: st.SearchStrategy[bytes] = st.one_of(
    bodies(),
    bodies(),
    spoiled(),
    json_text.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=64),
)
endpoints: st.SearchStrategy[Endpoint] = st.sampled_from([e for e in ENDPOINTS if e.decodes]) | st.sampled_from(
    ENDPOINTS
)

# By lower-case name: all that `identify` looks at, and some that it must not.
HEADERS = (
    *("x-agent-id", "x-agent-class", "x-agent-parent", "x-agent-weight", "x-agent-tasks", "x-agent-final"),
    *ID_HEADERS,
    *("x-dynamo-parent-session-id", "x-codex-parent-thread-id", "x-parent-session-id", "x-dynamo-session-final"),
    *("x-any-session-id", "x-any-parent-session-id", "x-request-id"),
)
# All that a header can hold, once decoded.
header_values = st.one_of(
    st.sampled_from(
        ("a", "a/b", "1", "0", "true", "FALSE", "0.5", "1e3", "²", "\xa0", "x" * 256, "", "task-1", "default/a")
    ),
    st.text(st.characters(max_codepoint=0xFF), max_size=20),
    st.from_regex(r"[0-9]{1,12}(\.[0-9]{1,12})?", fullmatch=True),
)
