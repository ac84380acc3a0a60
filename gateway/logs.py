"""One line a message on standard error: time, level, where, what."""

from __future__ import annotations

import logging


def set_up_logs(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True)
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def set_log_level(level: str) -> None:
    """Another one than was set up."""
    logging.getLogger().setLevel(level.upper())
