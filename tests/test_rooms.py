"""The rules of `tests/kinds.py` bite: what a test may not do is refused, and files of other kinds are not imported."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kinds import HEAVY, KINDS, ROOT, NotOfItsKind, kind_of_file


def test_an_unmarked_test_opens_no_socket() -> None:
    with socket.socket() as inet, pytest.raises(NotOfItsKind, match="wire"):
        inet.connect(("127.0.0.1", 9))
    with socket.socket() as inet, pytest.raises(NotOfItsKind):
        inet.bind(("127.0.0.1", 0))
    with socket.socket(socket.AF_UNIX) as unix, pytest.raises(NotOfItsKind):
        unix.connect("/nowhere.sock")


def test_an_unmarked_test_starts_no_process() -> None:
    with pytest.raises(NotOfItsKind, match="wire"):
        subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.parametrize("name", sorted(HEAVY))
def test_an_unmarked_test_does_not_import_vllm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(NotOfItsKind, match="vllm"):
        __import__(name)


@pytest.mark.wire
def test_one_that_is_marked_wire_may_and_does_not_import_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as inet:
        inet.bind(("127.0.0.1", 0))
    subprocess.run([sys.executable, "-c", ""], check=True)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(NotOfItsKind):
        __import__("vllm")


async def test_an_event_loop_of_its_own_is_no_socket() -> None:
    """Its pair of sockets is connected to itself."""


def test_marks_of_whole_files_are_seen_without_importing_them() -> None:
    for path in ROOT.rglob("test_*.py"):
        kinds = [node.attr for node in _mark(path) if isinstance(node, ast.Attribute) and node.attr in KINDS]
        if kinds:
            assert kind_of_file(path) == kinds[0], path


def test_no_test_with_a_mark_of_its_own_is_lighter_than_its_file() -> None:
    """It would not be found where the file is not imported."""
    for path in ROOT.rglob("test_*.py"):
        of_file = kind_of_file(path)
        if of_file is None:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Attribute) and decorator.attr in KINDS:
                    assert KINDS.index(decorator.attr) < KINDS.index(of_file), path


def _mark(path: Path) -> list[ast.AST]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            return list(ast.walk(node.value))
    return []
