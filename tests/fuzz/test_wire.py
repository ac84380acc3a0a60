"""Anything that a client can send over a socket: the answer is the engine's, or an error as documented, and nothing is left
behind (see `Fuzzed.check`)."""

from __future__ import annotations

import contextlib
import http.client
import socket
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.api.passthrough import PASSTHROUGH
from gateway.protocol.endpoints import CHAT, COMPLETIONS, ENDPOINTS
from tests.fuzz.bounds import bounded
from tests.fuzz.conftest import Fuzzed
from tests.fuzz.documented import assert_documented
from tests.fuzz.properties import strict_json
from tests.fuzz.values import HEADERS, any_body, bodies, header_values

pytestmark = pytest.mark.wire

TASKS = {endpoint.path for endpoint in ENDPOINTS}
PATHS = tuple(TASKS | {passed.path for passed in PASSTHROUGH if passed.method == "POST" and "{" not in passed.path})
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def request(method: str, target: bytes, headers: Headers, body: bytes) -> bytes:
    lines = [method.encode() + b" " + target + b" HTTP/1.1", b"host: gateway", b"connection: close"]
    lines += [name + b": " + value for name, value in headers]
    if body or method == "POST":
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


def ask(fuzzed: Fuzzed, sent: bytes, method: str = "POST") -> Answer | None:
    """None if the connection was closed without an answer."""
    with socket.create_connection(fuzzed.address, timeout=20) as connection:
        with contextlib.suppress(ConnectionError):  # it may have been answered before it was read
            connection.sendall(sent)
        response = http.client.HTTPResponse(connection, method=method)
        try:
            response.begin()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        except (ConnectionError, http.client.BadStatusLine):
            return None


def assert_answered(path: str, answer: Answer | None) -> None:
    assert answer is not None
    if answer.status == 200:
        if path in TASKS:
            name = answer.headers["x-agent-id"]
            assert 0 < len(name) <= 255
            assert all("!" <= character <= "~" for character in name)
            assert int(answer.headers["x-justitia-finish-tag"]) >= 0
    elif path in TASKS or b"no JSON" not in answer.body:
        assert_documented(path, answer.status, answer.headers, answer.body)
        assert answer.status < 500


# What a header may hold by RFC 9110, and a client's library lets through.
fields = st.dictionaries(
    st.sampled_from(
        [
            name.encode()
            for name in (*HEADERS, "x-request-id", "traceparent", "tracestate", "content-type", "authorization")
        ]
    ),
    header_values.map(
        lambda value: "".join(c for c in value if c == "\t" or (c >= " " and c != "\x7f")).encode("latin-1")
    ),
    max_size=5,
).map(lambda headers: list(headers.items()))


@given(st.sampled_from(PATHS), fields, any_body)
@example(CHAT.path, [], b"[" * 10_000_000)
@example(COMPLETIONS.path, [], b'{"prompt":[' + b'"",' * 10**6 + b'""]}')
@example(CHAT.path, [], b'{"metadata":' + b'{"user_id":' * 996 + b"0" + b"}" * 997)
@bounded(400)
def test_bodies_and_headers(fuzzed: Fuzzed, path: str, headers: Headers, body: bytes) -> None:
    assert_answered(path, ask(fuzzed, request("POST", path.encode(), headers, body)))


strange = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        (
            b"%00",
            b"%0d%0aX:%20y",
            b"%zz",
            b"%",
            b"a/b",
            b"..",
            b"%2e%2e/%2e",
            b"\xc3\xa9",
            b"%ed%a0%80",
            b"{id}",
            b"a?b#c",
        )
    ),
).map(lambda part: b"".join(bytes([c]) for c in part if c > 0x20 and c != 0x7F))
targets = st.one_of(
    st.tuples(st.sampled_from((b"/v1/models?", b"/v1/usage?since=", b"/v1/agents?tenant=", b"/health?")), strange).map(
        b"".join
    ),
    st.tuples(st.sampled_from((b"/v1/responses/", b"/v1/responses/resp_", b"/v1/agents/", b"/", b"/v1/")), strange).map(
        b"".join
    ),
)


@given(st.sampled_from(("GET", "DELETE", "POST", "HEAD", "OPTIONS", "PUT")), targets)
@example("GET", b"/v1/responses/%7Bid%7D")
@bounded(300)
def test_targets(fuzzed: Fuzzed, method: str, target: bytes) -> None:
    answer = ask(fuzzed, request(method, target, [], b""), method)
    assert answer is not None
    assert answer.status < 500
    if target.startswith(b"/v1/responses/"):
        assert answer.status != 200, "nobody has one"
    if answer.status >= 400 and method != "HEAD" and answer.headers["content-type"] == "application/json":
        assert_documented(target.partition(b"?")[0].decode("latin-1"), answer.status, answer.headers, answer.body)


raw_values = st.binary(max_size=20) | st.sampled_from(
    (b"a\r\nx: y", b"a\0b", b"\r\n\r\n", b"\n", b"5", b"-1", b"chunked", b"9" * 25)
)
raw_names = st.binary(max_size=8) | st.sampled_from(
    (b"x-agent-id", b"content-length", b"transfer-encoding", b"host", b"expect", b"upgrade", b"connection")
)


@given(st.lists(st.tuples(raw_names, raw_values), max_size=3), bodies())
@bounded(200)
def test_heads_that_are_no_http(fuzzed: Fuzzed, headers: Headers, body: bytes) -> None:
    """Refused, or taken for what it is by HTTP; or the connection is closed."""
    sent = request("POST", b"/v1/chat/completions", headers, body)
    with socket.create_connection(fuzzed.address, timeout=20) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answered = connection.recv(4096)
        assert answered == b"" or answered.startswith(b"HTTP/1.1 ")
        assert not answered.startswith(b"HTTP/1.1 5")


@given(bodies(), st.integers(0, 2000))
@bounded(150)
def test_clients_that_leave(fuzzed: Fuzzed, body: bytes, after: int) -> None:
    sent = request("POST", b"/v1/chat/completions", [(b"x-agent-id", b"leaver")], body)
    with socket.create_connection(fuzzed.address, timeout=20) as connection:
        connection.sendall(sent[:after])


@pytest.mark.parametrize("path", [endpoint.path for endpoint in ENDPOINTS])
@given(bodies())
@bounded(20)
def test_every_endpoint_sends_what_it_was_sent(fuzzed: Fuzzed, path: str, body: bytes) -> None:
    answer = ask(fuzzed, request("POST", path.encode(), [(b"x-agent-id", b"a")], body))
    assert_answered(path, answer)
    if answer is not None and answer.status == 200:
        came, left = strict_json(body), strict_json(fuzzed.engine.served)
        ours = {"priority", "vllm_xargs", "stream_options", "request_id", "agent_id", "program_id"}
        assert {name: value for name, value in came.items() if name not in ours} == {
            name: value for name, value in left.items() if name not in ours
        }


@given(st.data(), st.sampled_from((*PATHS, "/v1/models", "/v1/agents", "/v1/agents/a", "/v1/usage")), any_body)
@bounded(250)
def test_without_its_key_nothing_is_served(locked: Fuzzed, data: st.DataObject, path: str, body: bytes) -> None:
    assert locked.key is not None
    key = locked.key.encode()
    place = data.draw(st.integers(0, len(key) - 1))
    other = data.draw(st.binary(max_size=2).filter(lambda put: put != key[place : place + 1]))
    changed = key[:place] + other + key[place + 1 :]
    value = data.draw(st.sampled_from((b"", b"Bearer", b"Bearer ", b"bearer  ", b"Basic "))) + data.draw(
        st.sampled_from((changed, b"jk_", b"", key[:-1], key + b"0", key.upper())) | st.binary(max_size=30)
    )
    value = bytes(c for c in value if c >= 0x20 and c != 0x7F)
    name = data.draw(st.sampled_from((b"authorization", b"x-api-key", b"api-key")))
    method = "POST" if path in PATHS else "GET"
    served = locked.engine.served
    answer = ask(locked, request(method, path.encode(), [(name, value)], body if method == "POST" else b""), method)
    if answer is not None and answer.status != 401:
        assert key in value.split() or value.strip() == key
        return
    assert answer is not None
    assert_documented(path, answer.status, answer.headers, answer.body)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert locked.engine.served is served
