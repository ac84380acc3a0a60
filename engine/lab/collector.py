"""Python's cyclic garbage collector, out of the way of what is timed or long."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Turns it off. It would visit all objects of vLLM and torch again and again: half of the time of a replay, and pauses in
    whatever is timed."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
