"""Draws the table of a run, and writes what the documents say of it: `python -m tests.benchmarks.speed.report`.

The section "Overhead" of docs/benchmarks/README.md is made of docs/benchmarks/results/speed.json and of `section.md` beside
this file; no figure is written by hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import msgspec
from rich.table import Table

from tests.benchmarks import page
from tests.benchmarks.speed.lines import Line, lines_of

DOCS = Path(__file__).parents[3] / "docs" / "benchmarks"
RESULTS, PAGE = DOCS / "results" / "speed.json", DOCS / "README.md"
SECTION = Path(__file__).with_name("section.md")
# From its heading to the next one of its level, or to the end.
_OVERHEAD = re.compile(r"^## Overhead\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
HEADINGS = ("", "direct", "bare relay", "gateway", "target", "")


def lines(record: dict[str, Any]) -> Iterator[Line]:
    for row, figures in record["rows"].items():
        yield from lines_of(row, figures, record["settings"])


def table(record: dict[str, Any]) -> Table:
    drawn = Table(title="What the gateway costs", title_justify="left")
    for heading in HEADINGS:
        drawn.add_column(heading, justify="right" if heading else "left")
    for line in lines(record):
        drawn.add_row(*line.cells(), style="bold red" if line.met is False else None)
    return drawn


def section(record: dict[str, Any]) -> str:
    settings, machine, versions = record["settings"], record["machine"], record["versions"]
    rows = [line.cells() for line in lines(record)]
    verdicts = [line.met for line in lines(record) if line.met is not None]
    return Template(SECTION.read_text()).substitute(
        table=page.table(HEADINGS, rows),
        met=sum(verdicts),
        asked=len(verdicts),
        date=record["at"][:10],
        cpu=machine["cpu"],
        cores=machine["cores"],
        python=versions["python"],
        uvicorn=versions["uvicorn"],
        aiohttp=versions["aiohttp"],
        rounds=settings["rounds"],
        requests=f"{settings['requests']:,}",
        slots_per_s=settings["slots_per_s"],
    )


def rewritten(text: str, record: dict[str, Any]) -> str:
    """A page, with the section made anew. Raises `ValueError` for one that has none."""
    made, count = _OVERHEAD.subn(lambda _: section(record), text)
    if count != 1:
        raise ValueError("the page has no section ## Overhead, or several")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.speed.report",
        description="Write what the documents say of the gateway's speed.",
    )
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="what `make bench` has left")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    record = msgspec.json.decode(options.results.read_bytes())
    options.page.write_text(rewritten(options.page.read_text(), record))
    print(f"{options.page} says what {options.results} does")


if __name__ == "__main__":
    main()
