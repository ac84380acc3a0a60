from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from gateway.telemetry.logs import LoggedText, set_up_logs

logger = logging.getLogger("gateway.somewhere")
PROMPT = "tell nobody"


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def fail(text: str) -> None:
    try:
        raise OSError(2, "no such thing")
    except OSError as error:
        raise ValueError(f"what is {text}?") from error


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_told_by_kind_and_place_and_without_what_it_quotes(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logs("debug", form)  # type: ignore[arg-type]
    try:
        fail(PROMPT)
    except ValueError:
        logger.exception("it failed")
    said = capsys.readouterr().err
    assert PROMPT not in said
    for told in ("it failed", "FileNotFoundError: [Errno 2] no such thing", "ValueError", "test_logs.py", "in fail"):
        assert told in said


def test_json_is_a_line_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("info", "json")
    logger.info("two\nlines, %s", "\x1b[31mred")
    logger.debug("not this")
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told.pop("time").endswith("Z")
    assert told == {"level": "info", "logger": "gateway.somewhere", "message": "two\nlines, \x1b[31mred"}


def test_what_is_said_to_the_terminal_can_be_logged(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("info", "json")
    console = Console(file=LoggedText(logger), soft_wrap=True)
    console.print("\n[bold]ready[/] at http://127.0.0.1:1\n\n  curl …")
    lines = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["ready at http://127.0.0.1:1", "curl …"]
