"""What a short request costs two builds of the gateway, in turns: `python -m tests.benchmarks.side_by_side OTHER [--rounds N]`.

OTHER: a checkout of another version, which serves with the libraries of this one. Both stand before one stand-in engine and get
the same requests, a round each in turn, so that what else the machine does falls on both. The result is processor time of the
gateway's process by request, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import msgspec

from gateway.demo.processes import free_port
from gateway.replay import environment

HERE = Path(__file__).resolve().parents[2]
REQUESTS, WARM, CONNECTIONS = 4000, 2000, 32
TICKS = os.sysconf("SC_CLK_TCK")
START_S = 60.0
BODY = b'{"model":"m","messages":[{"role":"user","content":"hello there, how are you today?"}],"max_tokens":16}'


@contextlib.contextmanager
def started(root: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def processor_s(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def answers(port: int) -> None:
    """Until something serves a task at this port."""
    async with asyncio.timeout(START_S):
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, RuntimeError):
                return await client(port, 1, 0)
            await asyncio.sleep(0.1)


async def client(port: int, requests: int, number: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-agent-id: a{number}\r\ncontent-length: {len(BODY)}\r\n\r\n"
    )
    for _ in range(requests):
        writer.write(head.encode() + BODY)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer)
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
    writer.close()


async def load(port: int, requests: int) -> None:
    await asyncio.gather(*(client(port, requests // CONNECTIONS, number) for number in range(CONNECTIONS)))


def measure(roots: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a request, by build and round."""
    found: dict[str, list[float]] = {name: [] for name in roots}
    with contextlib.ExitStack() as stack:
        engine, gateways = free_port(), {}
        stack.enter_context(started(HERE, "tests.benchmarks.stand_in", "--port", str(engine)))
        for name, root in roots.items():
            port = free_port()
            options = ("--engine", f"http://127.0.0.1:{engine}", "--port", str(port), "--state", "memory:")
            command = ("gateway.cli", "gateway", *options, "--request-log", "none")
            gateways[name] = stack.enter_context(started(root, *command)), port
        for _, port in gateways.values():
            asyncio.run(answers(port))
            asyncio.run(load(port, WARM))
        for _ in range(rounds):
            for name, (process, port) in gateways.items():
                before = processor_s(process)
                asyncio.run(load(port, REQUESTS))
                found[name].append(1e6 * (processor_s(process) - before) / REQUESTS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.side_by_side")
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = measure({"other": options.other.resolve(), "this": HERE}, options.rounds)
    medians = {name: round(median(each), 1) for name, each in found.items()}
    ratio = round(medians["this"] / medians["other"], 3)
    report = {"cpu_us": medians, "ratio": ratio, "rounds": options.rounds, "machine": environment.machine()}
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")


if __name__ == "__main__":
    main()
