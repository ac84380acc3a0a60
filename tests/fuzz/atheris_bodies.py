"""Bodies: the first byte says of which endpoint, and whether the rest is one, or is fields that one is made of: each a byte for
its name and the bytes of its value, with a NUL between them."""

from __future__ import annotations

import atheris

from tests.fuzz.harness import fuzz

with atheris.instrument_imports(include=["gateway", "predictor"]):
    from gateway.protocol.endpoints import ENDPOINTS
    from gateway.protocol.identify import ID_FIELDS
    from tests.fuzz.properties import body_holds

_NAMES = (
    *(
        "stream",
        "stream_options",
        "include_usage",
        "background",
        "vllm_xargs",
        "justitia_tag",
        "n",
        "agent_id",
        "program_id",
    ),
    *("session_id", "user_id", "role", "content", "text", *ID_FIELDS),
    *sorted({name for endpoint in ENDPOINTS for name in (*endpoint.texts, *endpoint.limits)}),
)
_WORDS = (*(f'"{name}":' for name in _NAMES), "null", "true", "1e400", "[[", '{"a":', '"\\ud800"', "," + "9" * 25)


def one(data: bytes) -> None:
    if data:
        body = data[1:] if data[0] < 128 else _made_of(data[1:].split(b"\0"))
        body_holds(body, ENDPOINTS[data[0] % len(ENDPOINTS)])


def _made_of(fields: list[bytes]) -> bytes:
    made = (b'"%s":%s' % (_NAMES[field[0] % len(_NAMES)].encode(), field[1:]) for field in fields if field)
    return b"{" + b",".join(made) + b"}"


if __name__ == "__main__":
    fuzz("bodies", one, _WORDS)
