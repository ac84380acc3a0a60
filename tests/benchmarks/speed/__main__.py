"""The command: measures, prints each row as it comes and a table at the end, and leaves one line of JSON."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from gateway.demo.processes import ServerFailed, tail
from tests.benchmarks.speed.bench import Figures, Stuck
from tests.benchmarks.speed.client import Refused
from tests.benchmarks.speed.lines import lines_of
from tests.benchmarks.speed.measure import TooFewFiles, measure
from tests.benchmarks.speed.report import lines, table
from tests.benchmarks.speed.settings import QUICK, ROWS, SpeedSettings


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.speed", description="What the gateway itself costs."
    )
    parser.add_argument(
        "--rows", type=lambda names: tuple(names.split(",")), default=ROWS, help=f"some of {','.join(ROWS)}"
    )
    parser.add_argument("--rounds", type=int, help=f"default: {SpeedSettings().rounds}")
    parser.add_argument(
        "--quick", action="store_true", help="little of everything: to see that it works, not to measure"
    )
    parser.add_argument("--no-pin", dest="pin", action="store_false", help="leave the choice of cores to the system")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--out", type=Path, default=Path("bench-results/speed.json"), help="file for the line of JSON")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    settings = replace(QUICK if options.quick else SpeedSettings(), rows=options.rows, pin=options.pin)
    if options.rounds is not None:
        settings = replace(settings, rounds=options.rounds)
    console = Console(highlight=False)

    def say(row: str, figures: Figures) -> None:
        for line in lines_of(row, figures, asdict(settings)):
            what, direct, bare, ours, target, verdict = line.cells()
            beside = "".join(f", {name} {figure}" for name, figure in (("bare", bare), ("direct", direct)) if figure)
            console.print(f"{what}: {ours}{beside}{f' ({target}: {verdict})' if target else ''}", soft_wrap=True)

    with (
        tempfile.TemporaryDirectory(prefix="justitia-speed-") as directory,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        try:
            record = runner.run(measure(settings, Path(directory), say))
        except (ServerFailed, Stuck, Refused, TooFewFiles, ConnectionError, TimeoutError) as error:
            logs = (tail(log) for log in sorted(Path(directory).rglob("*.log")))
            sys.exit("\n".join(filter(None, (f"speed: {error or type(error).__name__}", *logs))))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(msgspec.json.encode(record) + b"\n")
    console.print(table(record))
    console.print(f"one line of JSON in {options.out}")
    if options.check and any(line.met is False for line in lines(record)):
        sys.exit(1)


if __name__ == "__main__":
    main()
