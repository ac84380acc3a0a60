"""What the check is asked for on its command line, and what it does when nothing is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The tiny model with its weights; the others are made up by the engine.
SIZES = ("tiny", "rehearsal", "7b")


@dataclass(frozen=True, slots=True)
class CheckSettings:
    seed: int = 0
    waves: int = 3  # crowds of requests, one after the other
    crowd: int = 8  # requests of each kind in a crowd
    kv_tokens: int = 3072  # the cache of the engines whose tokens are compared: far less than a crowd asks for
    max_num_seqs: int = 32
    rounds: int = 40  # of throughput
    requests: int = 128  # of each engine in a round
    prompt_tokens: int = 32
    output_tokens: int = 64
    warm_up_rounds: int = 2
    target: float = 0.02  # of throughput that may be lost
    control: bool = True  # a second stock engine
    size: str = "tiny"  # of the model whose throughput is measured: one of `SIZES`
    tests: bool = True  # with `--gpu`: run the tests that need no engine
    step_cost: bool = True  # with `--gpu`: measure what a step costs
    tokens: bool = True  # compare tokens
    only: tuple[str, ...] = ()  # of the setups whose tokens are compared, by name; none: all
    speed: bool = True  # measure throughput


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.engine_check",
        description="Tokens and throughput of the engine with our scheduler, against vLLM's own.",
        argument_default=argparse.SUPPRESS,  # so that what was asked for can be told from what was not
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="file that one JSON line is appended to; default: bench-results/engine-check.jsonl",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        default=False,
        help="on an NVIDIA GPU; with tests, step cost, and throughput at 7B",
    )
    parser.add_argument(
        "--rehearse", action="store_true", default=False, help="with --gpu: all of it on the CPU, at a tiny size"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--waves", type=int, help="crowds whose tokens are compared")
    parser.add_argument("--crowd", type=int, help="requests of each kind in a crowd")
    parser.add_argument("--rounds", type=int, help="of throughput")
    parser.add_argument("--requests", type=int, help="of each engine in a round of throughput")
    parser.add_argument("--output-tokens", type=int, help="of each of those")
    parser.add_argument("--max-num-seqs", type=int, help="requests that an engine runs at once")
    parser.add_argument("--size", choices=SIZES, help="of the model whose throughput is measured")
    parser.add_argument(
        "--only", action="append", metavar="SETUP", help="compare tokens in this setup, such as LoRA; can be repeated"
    )
    parser.add_argument("--no-control", dest="control", action="store_false", help="without a second stock engine")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="with --gpu: without the tests")
    parser.add_argument(
        "--no-step-cost", dest="step_cost", action="store_false", help="with --gpu: without the cost of a step"
    )
    parser.add_argument("--no-tokens", dest="tokens", action="store_false", help="measure throughput only")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="compare tokens only")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> CheckSettings:
    """What was asked for; what was not, by what it runs on."""
    chosen: dict[str, Any] = {}
    if options.gpu and not options.rehearse:
        chosen |= {"size": "7b", "max_num_seqs": 64, "requests": 256, "prompt_tokens": 128, "output_tokens": 128}
    elif options.gpu:
        chosen |= {"size": "rehearsal", "waves": 1, "rounds": 6, "requests": 64}
    known = CheckSettings.__dataclass_fields__
    asked = {key: tuple(value) if key == "only" else value for key, value in vars(options).items() if key in known}
    return CheckSettings(**chosen | asked)
