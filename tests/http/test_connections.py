"""Who is let in, and who is let go: connections that are made up. Those of real clients are in `tests/wire/test_hostile_…`."""

from __future__ import annotations

import resource

import pytest

from gateway.http.connections import MAX_UNREAD_BYTES, ConnectionLimits, Connections
from gateway.server import OWN_FILES, open_files_for
from gateway.telemetry.metrics import CutOff


class Client:
    """Holds so many unread bytes, and has been idle since then."""

    def __init__(self, *, unread: int = 0, since: float = 0.0, idle: bool = True) -> None:
        self.unread, self.since, self.idle = unread, since, idle
        self.aborted = False
        self.transport = self

    def abort(self) -> None:
        self.aborted = True

    def look(self, now: float) -> int:
        return self.unread


def crowd(clients: list[Client], *, at_most: int) -> tuple[Connections, list[CutOff]]:
    why: list[CutOff] = []
    connections = Connections(ConnectionLimits(at_most, 75, 60), why.append)
    for client in clients:
        assert connections.opened(client)
    return connections, why


def test_the_longest_idle_give_way_to_a_new_one() -> None:
    clients = [Client(since=number, idle=number % 2 == 0) for number in reversed(range(200))]
    connections, why = crowd(clients, at_most=200)
    assert connections.opened(Client())
    assert sorted(client.since for client in clients if client.aborted) == [0, 2, 4, 6]
    assert why == [CutOff.CROWDED] * 4
    assert len(connections) == 197


def test_where_none_is_idle_a_new_one_is_told_to_go() -> None:
    clients = [Client(idle=False) for _ in range(10)]
    connections, why = crowd(clients, at_most=10)
    assert not connections.opened(Client())
    assert not any(client.aborted for client in clients)
    assert why == []


async def test_the_largest_answers_that_nobody_reads_are_given_up() -> None:
    mib = MAX_UNREAD_BYTES // 256
    clients = [Client(unread=size * mib) for size in (50, 0, 100, 40, 60, 1)]
    connections, why = crowd(clients, at_most=10)
    await connections.sweep(0.0)
    assert why == []
    clients[1].unread = 10 * mib
    await connections.sweep(0.0)
    assert [client.aborted for client in clients] == [False, False, True, False, False, False]
    assert why == [CutOff.UNREAD]


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "raised", "possible"),
    [
        (1024, 20_000, 10_000, 20_000, 10_000),
        (1024, 4096, 10_000, 4096, 4096 - OWN_FILES),
        (1024, 1024, 10_000, 1024, 512),
        (1024, resource.RLIM_INFINITY, 10_000, 10_000 + OWN_FILES, 10_000),
    ],
)
def test_as_many_connections_as_files_can_be_open(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    soft: int,
    hard: int,
    wanted: int,
    raised: int,
    possible: int,
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: limits.append(both))
    assert open_files_for(wanted) == possible
    assert limits[-1] == (raised, hard)
    assert ("ulimit -n" in caplog.text) == (possible < wanted)
