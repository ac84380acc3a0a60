"""The gateway's own log, on standard error: a line a message, as text (time, level, logger, message), or as JSON.

The message of an exception may quote what was being worked on, such as a prompt. So an exception is logged with its type and
its traceback, and with its message only if that comes from the operating system.
"""

from __future__ import annotations

import io
import logging
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

import msgspec

_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_NOISY = ("httpx", "httpcore", "urllib3")

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def set_up_logs(level: str, form: Literal["text", "json"] = "text") -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if form == "json" else _Text(_TEXT))
    logging.basicConfig(handlers=[handler], force=True)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    set_log_level(level)


def set_log_level(level: str) -> None:
    logging.getLogger().setLevel(level.upper())
    # The gateway itself logs that a collector is gone, once.
    logging.getLogger("opentelemetry").setLevel(logging.NOTSET if level == "debug" else logging.CRITICAL)


class _Text(logging.Formatter):
    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802  # the standard library's name
        return "\n".join(_described(ei[1])) if ei[1] is not None else ""


class _Json(_Text):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def _described(error: BaseException) -> list[str]:
    """In lines, its causes first."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = [] if cause is None else [*_described(cause), "and then"]
    lines += ["".join(traceback.format_tb(error.__traceback__)).rstrip()]
    kind = type(error).__qualname__
    return [*lines, f"{kind}: {error}" if isinstance(error, OSError) else kind]


class LoggedText(io.StringIO):
    """A file whose lines are logged: for output that would else go to a terminal."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self._logger.info("%s", line.strip())
        return len(text)
