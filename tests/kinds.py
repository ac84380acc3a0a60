"""What a test may do follows from its kind, and its kind is a marker: `make test-fast`, `test-wire`, `test-engine`.

| kind     | may                                                        | run by             |
|----------|------------------------------------------------------------|--------------------|
| (none)   | compute, and read and write files                          | `make test-fast`   |
| `wire`   | also open sockets and start processes                      | `make test-wire`   |
| `vllm`   | also import vLLM, or PyTorch and what comes with it        | `make test-engine` |
| `engine` | also start the real engine, as a server                    | `make test-engine` |

A file, or a folder of `FOLDERS`, that is wholly of a kind that is not run is not imported either: vLLM's import takes 10 s and
800 MB. `Guard` holds each test to its kind.
"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent
FAST = "fast"
# A test of several kinds is of the first of them.
KINDS = ("engine", "vllm", "wire")
# What a run is for, by the kinds of tests in it.
RUNS = {"fast": {FAST}, "wire": {"wire"}, "engine": {"vllm", "engine"}}
# Where all tests are of one kind, unless they have another marker of their own.
FOLDERS = {"clients": "wire", "contracts": "vllm", "wire": "wire"}

HEAVY = frozenset({"vllm", "torch", "transformers"})
OUTSIDE = frozenset({"socket.connect", "socket.bind", "subprocess.Popen", "os.fork", "os.posix_spawn"})
# What the standard library's `platform` asks, once, of which machine it is on.
PLATFORM = ["uname", "-p"]

_MARKED_FILE = re.compile(r"^pytestmark = .*\bmark\.(engine|vllm|wire)\b", re.MULTILINE)


class NotOfItsKind(BaseException):
    """A test did what tests of its kind may not. Not an `Exception`: no code under test takes it for one of its own."""


def kind_of(item: pytest.Item) -> str:
    for kind in KINDS:
        if item.get_closest_marker(kind):
            return kind
    return FAST


def kind_of_file(path: Path) -> str | None:
    """The least that every test in a file is; None for one of several kinds, or of none."""
    marked = _MARKED_FILE.search(path.read_text()) if path.suffix == ".py" else None
    return marked[1] if marked else kind_of_folder(path)


def kind_of_folder(path: Path) -> str | None:
    return FOLDERS.get(path.relative_to(ROOT).parts[0]) if path.is_relative_to(ROOT) and path != ROOT else None


class Guard:
    """An audit hook: Python reports to it what code is about to do. It raises `NotOfItsKind`."""

    def __init__(self, run: str | None) -> None:
        self._may_import = run in (None, "engine")  # at all, while tests are collected too
        self._everywhere = run == FAST  # else other threads may be those of another test's servers
        self.kind: str | None = None  # of the test that runs now

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import":
            held = not self._may_import or (self._is_held and self.kind in (FAST, "wire"))
            if held and arguments[0].partition(".")[0] in HEAVY:
                raise NotOfItsKind(f"{arguments[0]} is imported: mark what needs it with `vllm`")
        elif event in OUTSIDE and self.kind == FAST and self._is_held and arguments[1:2] != (PLATFORM,):
            raise NotOfItsKind(f"{event} {arguments[1:2]}: mark the test with `wire`")

    @property
    def _is_held(self) -> bool:
        return self._everywhere or threading.current_thread() is threading.main_thread()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kind", choices=sorted(RUNS), help="run the tests of these kinds only: see tests/kinds.py")


def pytest_configure(config: pytest.Config) -> None:
    guard = Guard(config.getoption("kind"))
    sys.addaudithook(guard)
    config.pluginmanager.register(_Held(guard), "kinds")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a file need not be imported, as none of its tests is wanted."""
    run = config.getoption("kind")
    if run is None or not collection_path.is_file():
        return None
    kind = kind_of_file(collection_path)
    if kind is None:
        return None
    # Single tests of a file may be of a heavier kind than the file, never of a lighter one.
    possible = KINDS[: KINDS.index(kind) + 1]
    if kind == "vllm" and run == "wire":
        return True
    return True if RUNS[run].isdisjoint(possible) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = kind_of_folder(item.path)
        if folder is not None and kind_of(item) == FAST:
            item.add_marker(folder)
    run = config.getoption("kind")
    if run is not None:
        left_out = [item for item in items if kind_of(item) not in RUNS[run]]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if kind_of(item) in RUNS[run]]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """`make test ARGS=…` names files for each of its runs: that one of them finds nothing of its kind there is no failure."""
    if session.config.getoption("kind") is not None and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


class _Held:
    """While a test is set up and called, the guard knows its kind."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item):  # type: ignore[no-untyped-def]
        self._guard.kind = kind_of(item)
        try:
            return (yield)
        finally:
            self._guard.kind = None

    pytest_runtest_call = pytest_runtest_setup
