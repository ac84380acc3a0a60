"""What the reports' pages are written with: Markdown tables, and numbers as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.replay.figures import mean


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def mean_of_known(values: Iterable[float | None]) -> float:
    return mean([value for value in values if value is not None])


def signed(percent: float, digits: int = 1) -> str:
    return f"{percent:+.{digits}f} %".replace("-", "−")
