"""Versions of a model on a disk that fails, and beside others who do the same."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from predictor.registry import ABANDONED_S, MOST_VERSIONS, PROMOTED, Registry, RegistryError


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


def left_over(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.directory.iterdir() if entry.name.startswith(".")]


def test_before_the_first_model_there_is_none(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.current() is None
    assert registry.prune() == []
    with pytest.raises(RegistryError, match="no version has served before"):
        registry.rollback()
    with pytest.raises(RegistryError, match=r"000007\.model: there is no such version"):
        registry.promote(7)


def test_versions_are_numbered_promoted_and_rolled_back(registry: Registry) -> None:
    first, second, third = (registry.add(name) for name in (b"one", b"two", b"three"))
    assert registry.versions() == [first, second, third] == [1, 2, 3]
    assert registry.path(second).read_bytes() == b"two"
    assert registry.current() is None, "adding is not promoting"
    for version in (first, first, third, second):
        registry.promote(version)
    assert registry.current() == second
    assert registry.rollback() == third and registry.current() == third
    assert registry.rollback() == first
    with pytest.raises(RegistryError, match="no version has served before"):
        registry.rollback()
    assert Registry(registry.directory).current() == first
    assert left_over(registry) == []


def test_the_oldest_go_but_never_the_current_nor_the_one_before(registry: Registry) -> None:
    for version in (registry.add(b"a"), registry.add(b"b")):
        registry.promote(version)
    for _ in range(MOST_VERSIONS + 3):
        registry.add(b"x")
    assert registry.versions() == [1, 2, *range(8, 16)]
    assert len(registry.versions()) == MOST_VERSIONS
    assert registry.rollback() == 1


def test_numbers_are_not_used_again(registry: Registry) -> None:
    registry.promote(registry.add(b"a"))
    registry.path(1).unlink()
    assert registry.add(b"b") == 2


def test_what_served_before_may_be_gone(registry: Registry) -> None:
    for name in (b"a", b"b"):
        registry.promote(registry.add(name))
    registry.path(1).unlink()
    with pytest.raises(RegistryError, match=r"000001\.model: the version that served before is gone"):
        registry.rollback()
    assert registry.current() == 2


def test_a_full_disk_changes_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote(registry.add(b"a"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RegistryError, match="No space left on device"):
            registry.add(b"b")
        registry_two = Registry(registry.directory)
        with pytest.raises(RegistryError, match="No space left on device"):
            registry_two._write_promoted([1, 1])
    assert (registry.versions(), registry.current(), left_over(registry)) == ([1], 1, [])


def test_a_crash_between_number_and_contents_leaves_an_empty_file_that_is_no_version(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(b"a")

    def dies(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            registry.add(b"b")
    assert registry.path(2).read_bytes() == b""
    assert registry.versions() == [1]
    assert registry.add(b"c") == 3


def test_what_was_left_half_done_goes_when_nobody_can_be_at_it_any_more(registry: Registry) -> None:
    registry.add(b"a")
    half_done = [registry.directory / name for name in (".half.tmp", "000002.model")]
    others = [registry.directory / name for name in ("training.json", ".hidden", "000001.model")]
    half_done[0].write_bytes(b"half")
    for path in (half_done[1], *others[:2]):
        path.touch()
    registry.prune()
    assert all(path.exists() for path in half_done), "somebody may be at it"
    old = time.time() - ABANDONED_S - 1
    for path in (*half_done, *others):
        os.utime(path, (old, old))
    assert registry.prune() == []
    assert not any(path.exists() for path in half_done)
    assert all(path.exists() for path in others)


def test_garbage_where_the_history_should_be(registry: Registry) -> None:
    registry.add(b"a")
    (registry.directory / PROMOTED).write_bytes(b"000001\n\xff\xfe\n")
    with pytest.raises(RegistryError, match=r"promoted: .* is no version"):
        registry.current()


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    for ask in (lambda r: r.add(b"a"), lambda r: r.versions(), lambda r: r.current(), lambda r: r.promote(1)):
        with pytest.raises(RegistryError, match="models: "):
            ask(Registry(tmp_path / "models"))


def add_and_promote(directory: Path, times: int) -> None:
    registry = Registry(directory)
    for _ in range(times):
        registry.promote(registry.add(os.urandom(1000)))


@pytest.mark.wire
def test_two_processes_at_once(registry: Registry) -> None:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=add_and_promote, args=(registry.directory, 4)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0]
    assert registry.versions() == list(range(1, 9)), "none is lost, none twice"
    assert all(len(registry.path(version).read_bytes()) == 1000 for version in registry.versions())
    assert registry.current() in registry.versions()
    assert left_over(registry) == []
