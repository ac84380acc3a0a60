"""The engine's answers, whole and as streams: the first bytes say in which dialect, and where the stream is cut."""

from __future__ import annotations

import atheris

from tests.fuzz.harness import fuzz

with atheris.instrument_imports(include=["gateway"]):
    from gateway.protocol.dialects import ANTHROPIC, OPENAI, RESPONSES
    from tests.fuzz.properties import stream_holds, usage_holds

_WORDS = (
    *("data: ", "event: ", "\n\n", "\n", "[DONE]", "message_stop", "response.completed", "error"),
    *('"usage":{', '"choices":[]', '"response":{', '"message":{', '"prompt_tokens":', '"completion_tokens":'),
    *(
        '"input_tokens":',
        '"output_tokens":',
        '"cache_read_input_tokens":',
        '"prompt_tokens_details":',
        '"cached_tokens":',
    ),
    *("-1", "1e9", "99999999999999999999", "null"),
)
_HEAD = 4


def one(data: bytes) -> None:
    head, rest = data[:_HEAD], data[_HEAD:]
    if len(head) == _HEAD:
        dialect = (OPENAI, RESPONSES, ANTHROPIC)[head[0] % 3]
        stream_holds(rest, [byte * len(rest) // 255 for byte in head[1:]], dialect, show=head[0] >= 128)
        usage_holds(rest)


if __name__ == "__main__":
    fuzz("answers", one, _WORDS)
