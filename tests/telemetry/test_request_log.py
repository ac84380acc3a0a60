"""The request log's lines: none is broken, none is lost without being counted, and nobody waits for them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry import request_log
from gateway.telemetry.request_log import Line, RequestLog, RequestLogError, open_request_log


class Dropped:
    def __init__(self) -> None:
        self.lines = 0

    def __call__(self, lines: int) -> None:
        self.lines += lines


@pytest.fixture
def dropped() -> Dropped:
    return Dropped()


def line(number: int, **fields: Any) -> Line:
    return Line(request_id=str(number), endpoint="/v1/chat/completions", time=datetime.now(UTC), **fields)


def numbers(path: Path) -> list[int]:
    """Of the lines in a file, each of which must be whole."""
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [int(json.loads(text)["request_id"]) for text in data.split(b"\n") if text]


def opened(target: Path | str, dropped: Dropped) -> RequestLog:
    log = open_request_log(str(target), dropped)
    assert log is not None
    return log


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_lines_are_written_within_milliseconds_and_none_is_lost_at_the_end(
    tmp_path: Path, dropped: Dropped
) -> None:
    path = tmp_path / "log"
    log = opened(path, dropped)
    log.add(line(0))
    await until(lambda: numbers(path) == [0])
    for number in range(1, 1000):
        log.add(line(number))
    await log.close()
    assert numbers(path) == list(range(1000))
    assert dropped.lines == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "it tells who asked for what"


async def test_lines_are_appended_to_what_is_there(tmp_path: Path, dropped: Dropped) -> None:
    path = tmp_path / "log"
    for number in (1, 2):
        log = opened(path, dropped)
        log.add(line(number))
        await log.close()
    assert numbers(path) == [1, 2]


async def test_hostile_values_break_no_line(tmp_path: Path, dropped: Dropped) -> None:
    path = tmp_path / "log"
    log = opened(path, dropped)
    hostile = '"}\n{"request_id": "9"}\r\n\x00\u2028\x1b[31m\\'
    log.add(line(1, agent=hostile, model=hostile, agent_class=hostile, source=hostile))
    log.add(line(2))
    await log.close()
    assert numbers(path) == [1, 2]
    told = json.loads(path.read_bytes().split(b"\n")[0])
    assert {told["agent"], told["model"], told["class"], told["source"]} == {hostile}


async def test_what_cannot_be_encoded_is_counted_and_the_log_goes_on(
    tmp_path: Path, dropped: Dropped, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    log = opened(path, dropped)
    log.add(line(1, model="\ud800"))
    await until(lambda: dropped.lines)
    log.add(line(2))
    await log.close()
    assert (numbers(path), dropped.lines) == ([2], 1)
    assert "could not be encoded" in caplog.text


async def test_a_pipe_that_nobody_reads_holds_nobody_up(
    dropped: Dropped, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(request_log, "CLOSE_S", 0.2)
    monkeypatch.setattr(request_log, "MAX_LINES", 1000)
    reader, writer = os.pipe()
    log = RequestLog(writer, None, dropped)
    slowest = 0.0
    for number in range(3000):
        begun = time.perf_counter()
        log.add(line(number))
        slowest = max(slowest, time.perf_counter() - begun)
        if number % 100 == 0:
            await asyncio.sleep(0.006)
    assert slowest < 0.1
    assert 1000 < dropped.lines < 2500, "what the pipe itself holds, and what waits, is not lost yet"
    before = dropped.lines
    await log.close()
    assert dropped.lines > before, "now it is"
    assert "could not be written to its end" in caplog.text
    os.set_blocking(reader, False)
    os.read(reader, 1 << 20)
    os.close(reader)  # which frees the thread


async def test_a_pipe_that_is_read_again_takes_what_has_waited(dropped: Dropped) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as another process with the same standard output may have it
    log = RequestLog(writer, None, dropped)
    for number in range(1000):
        log.add(line(number))
    await asyncio.sleep(0.1)
    closing = asyncio.create_task(log.close())
    data = b""
    with os.fdopen(reader, "rb") as pipe:
        data = await asyncio.to_thread(pipe.read)
    await closing
    assert [int(json.loads(text)["request_id"]) for text in data.splitlines()] == list(range(1000))
    assert dropped.lines == 0


async def test_a_closed_pipe_is_said_once_and_its_lines_are_counted(
    dropped: Dropped, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = RequestLog(writer, None, dropped)
    for number in range(3):
        log.add(line(number))
        await until(lambda: dropped.lines == number + 1)  # noqa: B023
    await log.close()
    assert caplog.text.count("Broken pipe") == 1


async def test_a_file_that_is_moved_away_is_begun_anew(tmp_path: Path, dropped: Dropped) -> None:
    path, moved = tmp_path / "log", tmp_path / "log.1"
    log = opened(path, dropped)
    log.add(line(1))
    await until(lambda: numbers(path) == [1])
    path.rename(moved)
    log.add(line(2))
    await until(path.exists)
    path.unlink()
    log.add(line(3))
    await log.close()
    assert (numbers(moved), numbers(path), dropped.lines) == ([1], [3], 0)


async def test_a_file_is_reopened_when_that_is_asked_for(tmp_path: Path, dropped: Dropped) -> None:
    path = tmp_path / "log"
    log = opened(path, dropped)
    log.add(line(1))
    await until(lambda: numbers(path) == [1])
    before = log._descriptor
    keep_number = os.open(os.devnull, os.O_RDONLY)
    log.reopen()
    log.add(line(2))
    await log.close()
    os.close(keep_number)
    assert log._descriptor != before
    assert numbers(path) == [1, 2]


async def test_a_directory_that_is_gone_is_said_and_the_old_file_written_on(
    tmp_path: Path, dropped: Dropped, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = opened(folder / "log", dropped)
    folder.rename(tmp_path / "old")
    log.add(line(1))
    await log.close()
    assert numbers(tmp_path / "old" / "log") == [1]
    assert "No such file" in caplog.text


async def test_a_full_disk_tears_one_line_at_most(
    tmp_path: Path, dropped: Dropped, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    log = opened(path, dropped)
    real_write, full = os.write, [True]

    def write(descriptor: int, data: bytes) -> int:
        if not full[0]:
            return real_write(descriptor, data)
        if path.stat().st_size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[: len(data) * 3 // 10])  # of five lines: one and a half

    monkeypatch.setattr(os, "write", write)
    for number in range(5):
        log.add(line(number))
    await until(lambda: dropped.lines == 4)
    full[0] = False
    log.add(line(5))
    await log.close()
    whole = []
    for text in path.read_bytes().splitlines():
        try:
            whole.append(int(json.loads(text)["request_id"]))
        except ValueError:
            whole.append(-1)
    assert whole == [0, -1, 5]


async def test_a_line_after_the_end_is_counted(tmp_path: Path, dropped: Dropped) -> None:
    log = opened(tmp_path / "log", dropped)
    await log.close()
    log.add(line(1))
    assert dropped.lines == 1


def test_none_is_none(dropped: Dropped) -> None:
    assert open_request_log("none", dropped) is None


def test_standard_output_that_was_closed_is_not_another_files_number(
    dropped: Dropped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert open_request_log("-", dropped) is None


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, dropped: Dropped) -> None:
    with pytest.raises(RequestLogError, match=r"cannot write the request log to .*: No such file"):
        open_request_log(str(tmp_path / "nowhere" / "log"), dropped)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestLogError, match="No such device"):  # nobody reads it, and we do not wait
        open_request_log(str(tmp_path / "pipe"), dropped)
