"""The model that serves."""

from __future__ import annotations


class Learning:
    pass
