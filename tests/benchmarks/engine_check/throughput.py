"""Output tokens a second, in rounds in which the engines take turns."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.launcher import on_cpu
from tests.benchmarks.engine_check.answers import Engine
from tests.benchmarks.engine_check.engines import AGAIN, OURS, STOCK, Stage, block_size
from tests.benchmarks.engine_check.requests import FIRST_ID, LAST_ID, Case, crowd
from tests.benchmarks.engine_check.settings import CheckSettings


async def throughput(stage: Stage, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Output tokens a second of each engine, in alternating rounds. Raises `EngineFailed` and `CheckFailed`.

    rounds: takes each round as it ends, for whoever is left with those only.
    """
    settings = stage.settings
    bodies = [case.body for case in _work(settings)]
    args: tuple[str, ...] = ("--no-enable-prefix-caching",)
    if settings.size != "tiny":
        args += ("--load-format", "dummy", "--dtype", "float32" if on_cpu() else "bfloat16")
    # All fit: then every step is the same one on all engines, and a ratio shows what a step costs.
    tokens = settings.max_num_seqs * (settings.prompt_tokens + settings.output_tokens + block_size())
    args += ("--num-gpu-blocks-override", str(tokens // block_size() + 1))
    model = stage.models[settings.size]
    kv_cache_gib = max(1.0, (tokens + 2 * block_size()) * token_bytes(model) / 2**30)
    async with stage.engines("throughput", model, *args, kv_cache_gib=kv_cache_gib) as engines:
        names = list(engines)
        for number in range(-settings.warm_up_rounds, settings.rounds):
            # Each engine comes first, second and last equally often.
            turn = number % len(names)
            rates = {name: await engines[name].tokens_per_s(bodies) for name in (*names[turn:], *names[:turn])}
            if number >= 0:
                rounds.append(rates)
        alike = await _same_tokens(settings, engines)
    return {
        "model": settings.size,
        "args": list(args),
        "engine_says": stage.said["throughput"],
        **speed_figures(settings, rounds),
        "same_tokens": alike,
    }


def speed_figures(settings: CheckSettings, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """rounds: one at least."""
    names = list(rounds[0])
    ratios = {name: spread([each[name] / each[STOCK] for each in rounds]) for name in names if name != STOCK}
    return {
        "tokens_per_s": {name: round(statistics.median(each[name] for each in rounds), 1) for name in names},
        "ratio": ratios[OURS],
        "control_ratio": ratios.get(AGAIN),
        "target": settings.target,
        "verdict": verdict(ratios[OURS], settings.target),
        "rounds": [{name: round(rate, 1) for name, rate in each.items()} for each in rounds],
    }


def token_bytes(model: Path) -> int:
    """Of one token's keys and values, in the precision that its configuration names."""
    config = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    number = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * number)


def _work(settings: CheckSettings) -> list[Case]:
    cases = crowd(settings.seed, ["plain"], settings.requests)
    chosen = random.Random(settings.seed)
    for case in cases:
        for name in ("logprobs", "return_token_ids", "return_tokens_as_token_ids"):
            del case.body[name]
        case.body["prompt"] = [chosen.randint(FIRST_ID, LAST_ID) for _ in range(settings.prompt_tokens)]
        case.body["max_tokens"] = settings.output_tokens
    return cases


async def _same_tokens(settings: CheckSettings, engines: dict[str, Engine]) -> dict[str, Any]:
    """How many answers of a crowd agree at this model's size and precision. Told, and not judged.

    In bfloat16 ties are frequent, so stock engines differ among themselves as well.
    """
    cases = crowd(settings.seed + 1, ["plain"], settings.crowd * 4)
    answers = {name: await engine.ask_all(cases) for name, engine in engines.items()}
    told: dict[str, Any] = {}
    for name in engines:
        if name == STOCK:
            continue
        equal = sum(
            [[token.id for token in choice] for choice in one.choices]
            == [[token.id for token in choice] for choice in other.choices]
            for one, other in zip(answers[STOCK], answers[name], strict=True)
        )
        told[name] = {"answers": len(cases), "equal": equal}
    return told


def spread(values: Sequence[float]) -> dict[str, float]:
    """sure_low to sure_high holds the median of all rounds there could be, with a probability of 95 % or more.

    Those are order statistics (the sign test's interval), for which the values need no distribution.
    """
    ordered = sorted(values)
    count = len(ordered)
    low, median, high = statistics.quantiles(ordered, n=4) if count > 1 else ordered * 3
    # The largest number of values that may be left out at each end; below six rounds none.
    out = 0
    while 2 * sum(math.comb(count, k) for k in range(out + 1)) / 2**count <= 0.05:
        out += 1
    out = max(out - 1, 0)
    figures = {"median": median, "sure_low": ordered[out], "sure_high": ordered[-1 - out]}
    figures |= {"quartile_low": low, "quartile_high": high, "min": ordered[0], "max": ordered[-1]}
    return {name: round(value, 4) for name, value in figures.items()}


def verdict(ratio: dict[str, float], target: float) -> str:
    """`met`, `missed`, or `undecided` where the rounds scatter too much to tell."""
    if ratio["sure_low"] >= 1 - target:
        return "met"
    return "missed" if ratio["sure_high"] < 1 - target else "undecided"
