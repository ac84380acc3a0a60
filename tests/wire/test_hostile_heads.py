"""What comes before a body: garbage, floods, heads that lie or never end, requests that are not waited for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.http.client_connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, MAX_URL_BYTES
from tests.wire.hostile import CHAT, GatewayProcess, Neighbour, chat, gateway_process, head, post, stand_in_engine

HEALTH = head(path="/health", method="GET")


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with stand_in_engine() as engine, gateway_process(engine, client_stall_s=1, keep_alive_s=2) as running:
        yield running


def with_line(line: bytes) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Length: 2\r\n" + line + b"\r\n\r\n{}"


@pytest.mark.parametrize(
    "data",
    [
        b"asdf qwer\r\n\r\n",
        b"\x00\x01\x02\x03",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"get / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/3.7\r\n\r\n",
        b"GET /a b HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\nHost: gateway\n\n",
        b"GET http://gateway HTTP/1.1\r\n\r\n",
        b"CONNECT gateway:443 HTTP/1.1\r\nHost: gateway\r\n\r\n",
        b"\r\n" * 200_000,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_http_is_refused_and_the_connection_ended(gateway: GatewayProcess, data: bytes) -> None:
    with gateway.connect() as client:
        client.send(data)
        reply = client.reply()
        assert reply.status in (400, 431)
        assert reply.error["type"] == "invalid_request_error"
        assert reply.headers["connection"] == "close"
        assert client.rest() == b""


@pytest.mark.parametrize(
    "line",
    [
        b"X-Agent-ID: a\rb",
        b"X-Agent-ID: a\nb: c",
        b"X-Agent-ID: a\x00b",
        b"X-Agent-ID: a\x01b",
        b"X-Agent-ID: a\x7fb",
        b"X-Agent-ID: a\r\n b",  # a folded line
        b"X-Agent-ID : a",
        b": a",
        b"X Agent: a",
        b"X-Agent-ID: \xc3\xa9",
        b"X-Agent-ID: \xff\xfe",
        b"X-Agent-ID: a b",
        b"X-Agent-Class: \xf0\x9f\x90\x98",
        b"X-Agent-Tasks: -1",
        b"X-Agent-Tasks: \xd9\xa3",  # a digit, and not one of ASCII
        b"X-Agent-Final: maybe\x80",
    ],
    ids=repr,
)
def test_odd_bytes_in_headers_are_refused(gateway: GatewayProcess, line: bytes) -> None:
    reply = gateway.ask(with_line(line))
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "line",
    [
        b"Authorization: Bearer \xff\xfe",
        b"traceparent: \x80",
        b"x-request-id: \xe2\x98\x83",
        b"Content-Type: \xff/\xff",
    ],
    ids=repr,
)
def test_odd_bytes_in_what_is_passed_on_harm_nobody(gateway: GatewayProcess, line: bytes) -> None:
    assert gateway.ask(with_line(line)).status in (200, 400)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (head(*(f"X-{number}: a" for number in range(MAX_HEADERS - 2)), path="/health", method="GET"), 200),
        (head(*(f"X-{number}: a" for number in range(MAX_HEADERS)), path="/health", method="GET"), 431),
        (head("X: " + "a" * (MAX_HEAD_BYTES - 500), path="/health", method="GET"), 200),
        (head("X: " + "a" * (MAX_HEAD_BYTES + 500), path="/health", method="GET"), 431),
        (head(path="/health?" + "a" * (MAX_URL_BYTES - 50), method="GET"), 200),
        (head(path="/health?" + "a" * (MAX_URL_BYTES + 50), method="GET"), 414),
        (head(path="/" + "%41" * 2000, method="GET"), 404),
    ],
    ids=["many", "too many", "long", "too long", "a long path", "too long a path", "an escaped path"],
)
def test_heads_have_a_size_and_a_number_of_lines(gateway: GatewayProcess, data: bytes, status: int) -> None:
    reply = gateway.ask(data)
    assert reply.status == status
    if status != 200:
        assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("opening", "flood", "statuses"),
    [
        (b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 1000 + b"\r\n", {431}),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n", {431}),
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 1000, {431}),
        (b"GET / HTTP/1.1\r\nX", b"a" * 1000, {431}),
        (b"GET /", b"a" * 1000, {414}),
        (head("Transfer-Encoding: chunked") + b"2;x=", b"a" * 1000, {431, 408}),
        (head("Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n", b"X-Agent-ID: a\r\n", {431, 408}),
        (head("Transfer-Encoding: chunked") + b"0\r\nX: ", b"a" * 1000, {431, 408}),
    ],
    ids=["long lines", "many lines", "a value", "a name", "a path", "a chunk's extension", "trailers", "a trailer"],
)
def test_a_flood_that_never_ends_is_cut_off_and_held_by_nobody(
    gateway: GatewayProcess, opening: bytes, flood: bytes, statuses: set[int]
) -> None:
    with gateway.memory_bounded(8), gateway.connect() as client:
        client.send(opening)
        block = flood * (2**20 // len(flood))
        for _ in range(50):
            if not client.send(block):
                break
        reply = client.reply()
        assert reply.status in statuses
        assert reply.error["message"]
        client.rest()


def test_trailers_are_no_headers(gateway: GatewayProcess) -> None:
    """Who sits before us and sets a header must be able to rely on it."""
    body = b"%x\r\n%s\r\n0\r\nX-Agent-ID: forged\r\n\r\n" % (len(chat()), chat())
    with gateway.connect() as client:
        client.send(head("Transfer-Encoding: chunked", "X-Agent-ID: true") + body)
        assert client.reply().headers["x-agent-id"] == "true"
        client.send(head("Transfer-Encoding: chunked") + body)
        assert client.reply().headers["x-agent-id"] != "forged"
        client.send(post(chat()))
        assert client.reply().headers["x-agent-id"] != "forged", "nor in the next request"


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: identity",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding : chunked",),
        ("Content-Length: 5", "Content-Length: 5"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5, 5",),
        ("Content-Length: -5",),
        ("Content-Length: +5",),
        ("Content-Length: 0x5",),
        ("Content-Length:",),
        ("Content-Length: 99999999999999999999999999",),
    ],
    ids="; ".join,
)
def test_two_readings_of_where_a_request_ends_are_refused(gateway: GatewayProcess, lines: tuple[str, ...]) -> None:
    smuggled = head(path="/v1/agents", method="GET")
    with gateway.connect() as client:
        client.send(head(*lines) + b"0\r\n\r\n" + smuggled)
        reply = client.reply()
        assert reply.status == 400
        assert reply.error["code"] == "invalid_request"
        assert client.rest() == b"", "what follows is not taken for a request"


@pytest.mark.parametrize(
    "chunks",
    [b"FFFFFFFFFFFFFFFFF\r\nx", b"-1\r\nx", b"zz\r\nx", b"2\n{}\n0\n\n", b"2\r\n{}{}\r\n0\r\n\r\n"],
    ids=repr,
)
def test_chunks_that_are_none_are_refused(gateway: GatewayProcess, chunks: bytes) -> None:
    with gateway.connect() as client:
        client.send(head("Transfer-Encoding: chunked") + chunks)
        assert client.reply().status == 400
        assert client.rest() == b""


@pytest.mark.parametrize(
    "sent", [b"", b"\r\n", b"GET", HEALTH[:-2], head("Expect: 100-continue")[:-4]], ids=lambda sent: repr(sent[:10])
)
def test_a_connection_that_says_too_little_is_ended_in_time(gateway: GatewayProcess, sent: bytes) -> None:
    with gateway.connect() as client:
        client.send(sent)
        said = client.rest()
        if sent.strip():
            assert said.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in said
        else:
            assert said == b""


def test_a_head_that_drips_is_cut_off(gateway: GatewayProcess) -> None:
    with gateway.connect() as client:
        client.send(b"GET /health HTTP/1.1\r\n")
        while not client.has_come(within_s=0.1):  # each drop is in time, and the head is not
            client.send(b"X: a\r\n")
        assert client.reply("GET").status == 408


def test_a_connection_may_be_idle_for_longer_than_a_request_may_stall_and_then_is_ended(
    gateway: GatewayProcess,
) -> None:
    with gateway.connect() as stalled, gateway.connect() as idle:
        idle.send(HEALTH)
        assert idle.reply("GET").status == 200
        stalled.send(HEALTH[:-2])
        assert stalled.reply("GET").status == 408
        idle.send(HEALTH)
        assert idle.reply("GET").status == 200
        assert idle.rest() == b""


def test_http_1_0_is_answered_and_ended(gateway: GatewayProcess) -> None:
    with gateway.connect() as client:
        client.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.reply("GET").status == 200
        assert client.rest() == b""


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "nonsense"])
def test_no_upgrade_is_on_offer_and_asking_does_no_harm(gateway: GatewayProcess, upgrade: str) -> None:
    asking = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}", "HTTP2-Settings: AAMAAABk")
    with gateway.connect() as client:
        client.send(post(chat(), *asking) + head(*asking, path="/health", method="GET"))
        assert client.reply().status == 200
        assert client.reply("GET").status == 200
        client.send(HEALTH)
        assert client.reply("GET").status == 200


def test_a_client_that_expects_100_continue_gets_it_where_its_body_is_wanted(gateway: GatewayProcess) -> None:
    body = chat()
    with gateway.connect() as client:
        client.send(head("Expect: 100-continue", f"Content-Length: {len(body)}"))
        assert client.receive(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert client.reply().status == 200
    with gateway.connect() as client:
        client.send(head("Expect: 100-continue", f"Content-Length: {10**12}"))
        assert client.reply().status == 413
        assert client.rest() == b""


def test_a_few_pipelined_requests_are_answered_in_their_order(gateway: GatewayProcess) -> None:
    with gateway.connect() as client:
        client.send(HEALTH + post(chat(), "X-Agent-ID: second") + HEALTH)
        assert client.reply("GET").status == 200
        assert client.reply().headers["x-agent-id"] == "second"
        assert client.reply("GET").status == 200
        client.send(HEALTH)
        assert client.reply("GET").status == 200


def test_a_flood_of_pipelined_requests_is_cut_off(gateway: GatewayProcess) -> None:
    with gateway.memory_bounded(8), gateway.connect() as client:
        for _ in range(100):
            if not client.send(HEALTH * 5000):
                break
        assert client.rest().count(b"HTTP/1.1 200 OK") <= MAX_PIPELINED


def test_garbage_behind_a_request_does_not_get_into_its_answer(gateway: GatewayProcess) -> None:
    with gateway.connect() as client:
        client.send(post(chat(stream=True, max_tokens=200)) + b"asdf\r\n\r\n" * 1000)
        reply = client.reply()
        assert reply.status == 200
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert client.rest() == b""


def test_garbage_and_floods_leave_the_neighbour_alone(gateway: GatewayProcess) -> None:
    floods = [
        b"\x16\x03\x01" * 5000,
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 50_000,
        HEALTH * 2000,
        head("Transfer-Encoding: chunked") + b"1\r\n \r\n" * 50_000,
    ]
    with gateway.memory_bounded(32), Neighbour(gateway) as neighbour:
        for number in range(200):
            with gateway.connect() as client:
                client.send(floods[number % len(floods)])
            # What arrives all at once is served in its turn, and delays what comes behind it.
            neighbour.until_answered(number // len(floods))
    neighbour.was_unharmed()
    assert gateway.metric("justitia_connections_cut_off_total") >= 100
    assert CHAT in gateway.get("/metrics")
