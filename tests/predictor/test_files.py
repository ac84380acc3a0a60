"""A file takes another's place whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from predictor.files import ABANDONED_S, write_atomically


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.json"


@pytest.mark.parametrize("durable", [False, True])
def test_the_new_content_takes_the_old_ones_place(path: Path, durable: bool) -> None:
    path.write_bytes(b"old")
    write_atomically(path, [b"new", b" content"], durable=durable)
    assert path.read_bytes() == b"new content"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_content(path: Path) -> None:
    path.write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        yield b"half of"
        raise ValueError("the rest cannot be made")

    with pytest.raises(ValueError, match="the rest"):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_durable_file_is_on_the_disk_before_it_is_in_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"old")
    synced: list[tuple[bool, bytes]] = []

    def sync(descriptor: int) -> None:
        is_directory = os.path.samestat(os.fstat(descriptor), path.parent.stat())
        synced.append((is_directory, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(path, [b"new"], durable=True)
    assert synced == [(False, b"old"), (True, b"new")]
    write_atomically(path, [b"newer"])
    assert len(synced) == 2


def test_writers_at_the_same_time_do_not_mix(path: Path) -> None:
    contents = [bytes([number]) * 200_000 for number in range(16)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda content: write_atomically(path, [content[:100_000], content[100_000:]]), contents))
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_writer_has_left_goes_when_no_writer_can_be_at_it(path: Path) -> None:
    left = path.with_name(".file.json.left.tmp")
    other = path.with_name(".other.json.left.tmp")
    for each in (left, other):
        each.write_bytes(b"half")
    write_atomically(path, [b"a"])
    assert left.exists(), "another process may be writing it"
    for each in (left, other):
        old = each.stat().st_mtime - ABANDONED_S - 1
        os.utime(each, (old, old))
    write_atomically(path, [b"b"])
    assert not left.exists()
    assert other.exists()
