"""Hostile clients: raw sockets that send what no library would, at a gateway that is a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.demo.processes import free_port, own_environment

CHAT = "/v1/chat/completions"
START_S = 60.0
# Far beyond what any answer takes, so that a test that waits in vain fails.
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Of a body that must be an error in OpenAI's shape."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"] and error["type"]
        return error  # type: ignore[no-any-return]


class _Received:
    """What has come on a connection, as `HTTPResponse` wants it: it would close it, and take along what it has read ahead."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")

    def makefile(self, mode: str) -> _Received:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        pass


class Hostile:
    """A connection that says what it is told to."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE_S)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise
        self._received = _Received(self.socket)

    def __enter__(self) -> Hostile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._received._file.close()
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """False if the gateway has hung up."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def reply(self, method: str = "POST") -> Reply:
        """The next answer."""
        answer = http.client.HTTPResponse(self._received, method=method)  # type: ignore[arg-type]
        answer.begin()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, headers, answer.read())

    def receive(self, size: int = 65536) -> bytes:
        """Some of what has come; nothing when the gateway has hung up."""
        return self._received.read1(size)  # type: ignore[no-any-return]

    def has_come(self, within_s: float) -> bool:
        """Whether something to read comes in this time, at the latest; waits no longer than until then."""
        return bool(select.select([self.socket], [], [], within_s)[0])

    def rest(self) -> bytes:
        """What comes until the gateway hangs up."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while part := self.receive():
                data += part
        return data


def head(*lines: str, path: str = CHAT, method: str = "POST") -> bytes:
    """A whole head."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: gateway", *lines, "", ""]).encode("latin-1")


def post(body: bytes, *lines: str, path: str = CHAT) -> bytes:
    return head(f"Content-Length: {len(body)}", *lines, path=path) + body


def chat(**fields: Any) -> bytes:
    """A body that is as it should be."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}).encode()


class GatewayProcess:
    """`justitia gateway`, and what can be seen of it from outside."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.calm_mib = 0.0  # when it was ready
        self._log = log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def connect(self, *, receive_buffer: int | None = None) -> Hostile:
        return Hostile(self.port, receive_buffer=receive_buffer)

    @contextlib.contextmanager
    def crowd(self, count: int, *, receive_buffer: int | None = None) -> Iterator[list[Hostile]]:
        """So many connections."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self.connect(receive_buffer=receive_buffer)) for _ in range(count)]

    def ask(self, data: bytes) -> Reply:
        """The answer to what a new connection sends."""
        with self.connect() as client:
            client.send(data)
            return client.reply()

    def get(self, path: str) -> Any:
        reply = self.ask(head("Connection: close", path=path, method="GET"))
        return json.loads(reply.body) if reply.headers["content-type"] == "application/json" else reply.body.decode()

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        lines = self.get("/metrics").splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.partition(" ")[0].partition("{")[0] == name]
        assert values, name
        return sum(values)

    def serves(self) -> bool:
        return self.ask(post(chat(), "Connection: close")).status == 200

    def until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.said
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask(head("Connection: close", path="/ready", method="GET")).status == 200:
                    self.calm_mib = self.memory_mib()
                    return
            time.sleep(0.02)
        raise AssertionError(self.said)

    @contextlib.contextmanager
    def memory_bounded(self, mib: float) -> Iterator[None]:
        """The peak of its memory grows by no more than this."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the peak begins anew
        before = self.memory_mib("VmHWM")
        yield
        grown = self.memory_mib("VmHWM") - before
        assert grown <= mib, f"it took {grown:.0f} MiB more"

    def memory_mib(self, what: str = "VmRSS") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return float(status.partition(f"{what}:")[2].split()[0]) / 1024

    def end(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def gateway_process(engine: str, **settings: float | str) -> Iterator[GatewayProcess]:
    """Ready to serve. At the end it must still serve, must end in good order, and must not have been surprised."""
    port = free_port()
    given = {"engine": engine, "port": port, "state": "memory:", "drain_s": 1, **settings}
    environment = own_environment() | {f"JUSTITIA_{name.upper()}": str(value) for name, value in given.items()}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway.cli", "gateway"], stdout=sink, stderr=sink, env=environment
            )
        gateway = GatewayProcess(process, port, log)
        try:
            gateway.until_ready()
            yield gateway
            assert gateway.serves()
            assert gateway.end() == 0
            assert "Traceback" not in gateway.said, gateway.said
            assert " ERROR " not in gateway.said, gateway.said
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def stand_in_engine(*arguments: str) -> Iterator[str]:
    """The URL of an engine that answers at once, a process of its own."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.stand_in", "--port", str(port), *arguments])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Neighbour:
    """A well-behaved client. It measures how long its requests take while it is alone, and from then on until the end."""

    CALM_REQUESTS = 40

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._ending = threading.Event()
        self._answered = threading.Condition()
        self._failures: list[str] = []
        self.calm_s = [self._ask() for _ in range(self.CALM_REQUESTS)]
        self.times_s: list[float] = []
        self._thread = threading.Thread(target=self._go_on)

    def _ask(self) -> float:
        since = time.perf_counter()
        try:
            reply = self._gateway.ask(post(chat(), "X-Agent-ID: neighbour", "Connection: close"))
            if reply.status != 200:
                self._failures.append(f"{reply.status}: {reply.body!r}")
        except (OSError, http.client.HTTPException) as error:
            self._failures.append(repr(error))
        return time.perf_counter() - since

    def _go_on(self) -> None:
        while not self._ending.is_set():
            taken_s = self._ask()
            with self._answered:
                self.times_s.append(taken_s)
                self._answered.notify_all()
            self._ending.wait(0.01)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def until_answered(self, times: int) -> None:
        """At least so often since it is not alone."""
        with self._answered:
            assert self._answered.wait_for(lambda: len(self.times_s) >= times, PATIENCE_S)

    def was_unharmed(self, factor: float = 30.0) -> None:
        """The factor is large: this process, which attacks, has the same cores. A gateway that is kept from serving is beyond
        it."""
        assert self._failures == []
        assert self.times_s
        calm_s, busy_s = max(0.003, statistics.median(self.calm_s)), statistics.median(self.times_s)
        assert busy_s <= factor * calm_s, f"{busy_s * 1000:.1f} ms, and {calm_s * 1000:.1f} ms before"


def files_to_spare(wanted: int) -> bool:
    """Whether this process may have so many files open; raises its limit if need be."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return True
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True


def open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
