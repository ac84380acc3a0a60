"""What a body costs to be read: a hostile one is as large as it may be, and made of what costs most."""

from __future__ import annotations

import tracemalloc

import pytest

from gateway.protocol.body import parse_body
from gateway.protocol.endpoints import CHAT, COMPLETIONS, Endpoint
from gateway.protocol.errors import InvalidRequest

SIZE = 2**20


def peak_bytes(data: bytes, endpoint: Endpoint = CHAT) -> int:
    """What it takes to read it, be it refused or not."""
    tracemalloc.start()
    try:
        parse_body(data, endpoint)
    except InvalidRequest:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("field", [b"vllm_xargs", b"stream_options"])
def test_fields_that_are_taken_apart_are_small(field: bytes) -> None:
    data = b'{"%s": {"a": [%s[]]}}' % (field, b"[]," * (SIZE // 3))
    assert peak_bytes(data) < SIZE // 2
    with pytest.raises(InvalidRequest, match="must be at most 65536 bytes") as refused:
        parse_body(data)
    assert refused.value.param == field.decode()
    assert parse_body(b'{"%s": {"a": "%s"}}' % (field, b"x" * 60_000))


def test_long_texts_cost_nothing() -> None:
    assert peak_bytes(b'{"messages": ["%s"]}' % (b"x" * SIZE)) < SIZE // 8
    assert peak_bytes(b'{"messages": [%s{}]}' % (b"{}," * (SIZE // 3))) < SIZE // 8


def test_many_keys_cost_no_more_than_they_are_large() -> None:
    keys = b",".join(b'"%d":1' % number for number in range(SIZE // 11))
    assert peak_bytes(b"{" + keys + b"}") < SIZE // 4


def test_many_prompts_cost_no_more_than_they_are_large() -> None:
    assert peak_bytes(b'{"prompt": [%s[]]}' % (b"[]," * (SIZE // 3)), COMPLETIONS) < SIZE // 4
    assert peak_bytes(b'{"prompt": [[%s1]]}' % (b"1," * (SIZE // 2)), COMPLETIONS) < SIZE // 4
    assert peak_bytes(b'{"prompt": ["%s"]}' % ("\u00e9".encode() * (SIZE // 2)), COMPLETIONS) < SIZE // 2
