"""What a body costs to be read: a hostile one is as large as it may be, and made of what costs most."""

from __future__ import annotations

import tracemalloc

import pytest

from gateway.body import parse_body
from gateway.endpoints import CHAT, COMPLETIONS, Endpoint
from gateway.errors import InvalidRequest

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


@pytest.mark.parametrize("field", [b"vllm_xargs", b"stream_options", b"metadata"])
def test_fields_that_are_taken_apart_cost_no_more_than_they_are_large(field: bytes) -> None:
    assert peak_bytes(b'{"%s": {"a": [%s[]]}}' % (field, b"[]," * (SIZE // 3))) < 2 * SIZE


def test_long_texts_cost_no_more_than_they_are_large() -> None:
    assert peak_bytes(b'{"messages": ["%s"]}' % (b"x" * SIZE)) < 2 * SIZE
    assert peak_bytes(b'{"messages": [%s{}]}' % (b"{}," * (SIZE // 3))) < 2 * SIZE


def test_many_keys_cost_no_more_than_they_are_large() -> None:
    keys = b",".join(b'"%d":1' % number for number in range(SIZE // 11))
    assert peak_bytes(b"{" + keys + b"}") < 2 * SIZE


def test_many_prompts_cost_no_more_than_they_are_large() -> None:
    assert peak_bytes(b'{"prompt": [%s[]]}' % (b"[]," * (SIZE // 3)), COMPLETIONS) < 2 * SIZE
