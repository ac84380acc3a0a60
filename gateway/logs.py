"""What the gateway says of itself, on standard error: a line a message, as text (time, level, where, what), or as JSON."""

from __future__ import annotations

import io
import logging
from datetime import UTC, datetime
from typing import Literal

import msgspec

_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_NOISY = ("httpx", "httpcore", "urllib3")


def set_up_logs(level: str, form: Literal["text", "json"] = "text") -> None:
    logging.basicConfig(level=level.upper(), format=_TEXT, force=True)
    if form == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Json())
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if level != "debug":  # the gateway says it itself, once
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class LoggedText(io.StringIO):
    """A file whose lines are logged: for what is else said to a terminal."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self._logger.info("%s", line.strip())
        return len(text)
