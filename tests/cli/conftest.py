from __future__ import annotations

from tests.learning.conftest import state

__all__ = ["state"]
