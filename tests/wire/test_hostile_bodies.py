"""Bodies: too large, too deep, not JSON, not what they say, not coming, too many at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

from tests.wire.hostile import (
    CHAT,
    GatewayProcess,
    Hostile,
    Neighbour,
    chat,
    gateway_process,
    head,
    post,
    stand_in_engine,
)

MIB = 2**20
MAX_BODY_MIB, MAX_HELD_MIB = 4, 16


@pytest.fixture(scope="module")
def stand_in() -> Iterator[str]:
    with stand_in_engine() as url:
        yield url


@pytest.fixture(scope="module")
def gateway(stand_in: str) -> Iterator[GatewayProcess]:
    with gateway_process(
        stand_in, client_stall_s=1, max_body_mib=MAX_BODY_MIB, max_held_mib=MAX_HELD_MIB, keep_text="true"
    ) as running:
        yield running


def message(value: bytes) -> bytes:
    """A body with something odd in the place of a message's content."""
    return b'{"model": "m", "messages": [{"role": "user", "content": ' + value + b"}]}"


@pytest.mark.parametrize("depth", [1000, 100_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_harms_nobody(gateway: GatewayProcess, depth: int, opening: bytes) -> None:
    closing = (b"]" if opening == b"[" else b"}") * depth
    for body in (opening * depth, message(opening * depth + b"1" + closing), opening * depth + b"1" + closing):
        reply = gateway.ask(post(body))
        assert reply.status in (200, 400)
        if reply.status == 400:
            assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\x00" * 100,
        b"\xff\xfe{\x00}\x00",
        b'{"model": "m", "messages": [',
        b'{"model": "m",, "messages": []}',
        b'{"messages": [NaN]}',
        b'{"messages": [Infinity]}',
        b'{"messages": [-Infinity]}',
        b'{"max_tokens": NaN}',
        b'{"max_tokens": 1e999}',
        b'{"max_tokens": 1.5}',
        b'{"max_tokens": -1}',
        b'{"max_tokens": "5"}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"n": ' + b"9" * 30 + b"}",
        b'{"n": 1e999}',
        b'{"stream": 1}',
        b'{"vllm_xargs": []}',
        b'{"stream_options": 5}',
        b'{"\xff": 1}',
        b"{'model': 'm'}",
        b'{"model": "m"} {"model": "m"}',
    ],
    ids=lambda body: repr(body[:32]),
)
def test_what_is_no_request_is_refused_in_openais_shape(gateway: GatewayProcess, body: bytes) -> None:
    reply = gateway.ask(post(body))
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        message(b'"\xff\xfe\xed\xa0\x80"'),  # not UTF-8
        message(b'"\\ud800"'),  # half of a character
        message(b'"\\u0000"'),
        message(b"1e999"),
        message(b"9" * 5000),
        message(b"-0"),
        message(b"[" + b"1," * 100_000 + b"1]"),
        message(b'{"type": "text", "text": 5}'),
        b'{"messages": {"0": "hello"}}',
        b'{"messages": null, "model": null, "max_tokens": null, "stream": null, "n": null}',
        b'{"messages": [], "messages": [{"role": "user", "content": "twice"}], "model": "a", "model": "b"}',
        b'{"messages": [], "max_tokens": 1, "max_tokens": 2}',
        b'{"prompt_cache_key": {"a": 1}, "user": [], "metadata": "none", "agent_id": 7}',
        b'{"prompt": [[]]}',
        b'{"prompt": ["", []]}',
        b'{"messages": [], "temperature": 1e999, "seed": ' + b"9" * 400 + b"}",
        b'{"messages": [], "tools": 7}',
        b'{"messages": [], "' + b"k" * 100_000 + b'": 1}',
        b"{" + b",".join(b'"%d":1' % number for number in range(50_000)) + b"}",
        b"\xef\xbb\xbf{}",
        b" " * 1000 + b"{}",
    ],
    ids=lambda body: repr(body[:60]),
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_odd_values_are_the_engines_to_judge_and_surprise_nobody(
    gateway: GatewayProcess, body: bytes, path: str
) -> None:
    reply = gateway.ask(post(body, path=path))
    assert reply.status in (200, 400, 404)  # the stand-in serves chats only
    if reply.status == 400:
        assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("tokens", [10**9, 2**63 - 1, 2**63, 10**18, 10**19])
def test_huge_limits_are_a_wish_like_any_other(gateway: GatewayProcess, tokens: int) -> None:
    """The stand-in would take them at their word: it is asked for something that it refuses."""
    for field in ("max_tokens", "max_completion_tokens"):
        reply = gateway.ask(
            post(b'{"prompt": "x", "n": 1024, "%s": %d}' % (field.encode(), tokens), path="/v1/completions")
        )
        assert reply.status in (400, 404)
        assert reply.error["message"]
    agents = gateway.get("/v1/agents")
    assert "NaN" not in str(agents)


def test_two_keys_of_one_name_are_read_as_they_are_passed_on(gateway: GatewayProcess) -> None:
    """The stand-in counts what it is asked for: the last, and we no other."""
    reply = gateway.ask(post(b'{"messages": [], "max_tokens": 3, "max_tokens": 5, "stream": true, "stream": false}'))
    assert reply.status == 200
    assert reply.body.count(b"word ") == 5


# Size


def test_a_large_body_is_refused_before_it_is_sent(gateway: GatewayProcess) -> None:
    with gateway.memory_bounded(4), gateway.connect() as client:
        client.send(head(f"Content-Length: {100 * MIB}"))
        reply = client.reply()
        assert reply.status == 413
        assert reply.error["code"] == "body_too_large"
        assert reply.headers["connection"] == "close"
        assert client.rest() == b""


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_100_mb_without_listening_is_told_and_nothing_is_held(
    gateway: GatewayProcess, chunked: bool
) -> None:
    block = b" " * MIB
    with gateway.memory_bounded(3 * MAX_BODY_MIB), gateway.connect() as client:
        client.send(head("Transfer-Encoding: chunked" if chunked else f"Content-Length: {100 * MIB}"))
        for _ in range(100):
            if not client.send(b"%x\r\n%s\r\n" % (MIB, block) if chunked else block):
                break
        reply = client.reply()
        assert reply.status == 413
        assert reply.error["code"] == "body_too_large"


@pytest.mark.parametrize("declared", [2**64 - 1, 10**15])
def test_absurd_lengths_are_refused(gateway: GatewayProcess, declared: int) -> None:
    assert gateway.ask(head(f"Content-Length: {declared}")).status == 413


def test_the_rest_of_a_body_that_was_refused_is_no_request(gateway: GatewayProcess) -> None:
    with gateway.connect() as client:
        client.send(head(f"Content-Length: {100 * MIB}"))
        client.send(head(path="/v1/agents", method="GET"))
        assert client.reply().status == 413
        assert client.rest() == b""


def test_an_early_answer_to_a_body_that_nobody_wants_ends_the_connection(gateway: GatewayProcess) -> None:
    with gateway.connect() as client:
        client.send(head(f"Content-Length: {MIB}", path="/nowhere") + b" " * 1000)
        reply = client.reply()
        assert reply.status == 404
        assert reply.headers["connection"] == "close"
        assert client.rest() == b""


# Lies, and slowness


@pytest.mark.parametrize("said", [b"", b"{", chat()[:-1]])
def test_a_body_that_ends_before_its_length_is_nobodys_task(gateway: GatewayProcess, said: bytes) -> None:
    with gateway.connect() as client:
        client.send(head(f"Content-Length: {len(said) + 10}") + said)
    assert gateway.serves()
    assert gateway.metric("justitia_tasks") == 0


def test_a_body_that_stops_coming_is_answered_408(gateway: GatewayProcess) -> None:
    for opening in (head("Content-Length: 100"), head("Transfer-Encoding: chunked") + b"64\r\n"):
        with gateway.connect() as client:
            client.send(opening + b'{"model"')
            reply = client.reply()
            assert reply.status == 408
            assert reply.error["code"] == "request_timeout"
            assert client.rest() == b""


def test_anthropics_clients_are_told_so_in_their_shape(gateway: GatewayProcess) -> None:
    with gateway.connect() as client:
        client.send(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n")
        reply = client.reply()
        assert reply.status == 400
        told = json.loads(reply.body)
        assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
        assert client.rest() == b""


def test_a_body_longer_than_its_length_is_cut_there(gateway: GatewayProcess) -> None:
    with gateway.connect() as client:
        client.send(post(chat()) + b"and more")
        assert client.reply().status == 200
        client.rest()


def test_bodies_that_drip_are_cut_off_and_slow_ones_that_get_on_are_not(gateway: GatewayProcess) -> None:
    body = chat()
    padded = b" " * 40_000 + body
    with gateway.connect() as dripping, gateway.connect() as slow, Neighbour(gateway) as neighbour:
        dripping.send(head(f"Content-Length: {len(body)}"))
        slow.send(head(f"Content-Length: {len(padded)}"))
        sent = 0
        while not dripping.has_come(within_s=0.15):  # each byte is in time, and a second without more of them is not
            dripping.send(body[sent : sent + 1])
            slow.send(padded[2000 * sent : 2000 * (sent + 1)])
            sent += 1
        assert dripping.reply().status == 408
        slow.send(padded[2000 * sent :])
        assert slow.reply().status == 200
    neighbour.was_unharmed()


def test_many_slow_bodies_leave_the_neighbour_alone(gateway: GatewayProcess) -> None:
    clients = [gateway.connect() for _ in range(200)]
    with gateway.memory_bounded(16), Neighbour(gateway) as neighbour:
        for client in clients:
            client.send(head("Content-Length: 1000") + b"{")
        assert {client.reply().status for client in clients} == {408}
    for client in clients:
        client.close()
    neighbour.was_unharmed()


# All bodies together


def test_bodies_that_are_sent_at_once_are_held_up_to_a_limit(gateway: GatewayProcess) -> None:
    """40 clients send 4 MB each, as far as they are let, and not to the end."""
    size = MAX_BODY_MIB * MIB
    clients = [gateway.connect() for _ in range(40)]
    refused = []

    def send(client: Hostile) -> None:
        client.send(head("Transfer-Encoding: chunked"))
        for _ in range(15):
            if not client.send(b"%x\r\n%s\r\n" % (size // 16, b" " * (size // 16))):
                break
            time.sleep(0.01)

    with gateway.memory_bounded(2 * MAX_HELD_MIB + 16):
        threads = [threading.Thread(target=send, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            reply = client.reply()  # the rest made no progress
            if reply.status != 408:
                refused.append(reply)
    for client in clients:
        client.close()
    assert len(refused) >= 30
    for reply in refused:
        assert reply.status == 429
        assert reply.error["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) > 0
    assert gateway.ask(post(b" " * (size - 1000) + chat())).status == 200, "all is given back"


def test_what_is_only_announced_takes_no_room(gateway: GatewayProcess) -> None:
    clients = [gateway.connect() for _ in range(20)]
    for client in clients:
        client.send(head(f"Content-Length: {MAX_BODY_MIB * MIB}") + b"{")
    assert gateway.ask(post(b" " * MIB + chat())).status == 200
    for client in clients:
        client.close()


def test_a_body_for_which_there_is_no_room_is_refused_before_it_is_sent(stand_in: str) -> None:
    with gateway_process(stand_in, max_body_mib=4, max_held_mib=1) as gateway, gateway.connect() as client:
        client.send(head(f"Content-Length: {2 * MIB}"))
        reply = client.reply()
        assert reply.status == 429
        assert reply.headers["connection"] == "close"
