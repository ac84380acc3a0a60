"""The tokens of engines of one setup, compared: on the stage of `engines`, by the tallies of `comparison`."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.engine_check.answers import Answer
from tests.benchmarks.engine_check.comparison import Comparison, moved
from tests.benchmarks.engine_check.engines import AGAIN, OURS, STOCK, Setup, Stage, block_size
from tests.benchmarks.engine_check.requests import BATCHED_TOKENS, altered, crowd, free


async def compare(stage: Stage, setup: Setup) -> dict[str, Any]:
    """The record of one setup. Raises `EngineFailed` and `CheckFailed`."""
    settings = stage.settings
    ours, control, other_prompts = (Comparison(setup.tie) for _ in range(3))
    moved_choices = 0
    cached = dict.fromkeys(stage.names, 0)
    args: tuple[str, ...] = ("--num-gpu-blocks-override", str(settings.kv_tokens // block_size()))
    args += ("--dtype", setup.dtype)
    args += ("--max-num-batched-tokens", str(BATCHED_TOKENS), "--logprobs-mode", "processed_logprobs", *setup.args)
    stands = stage.engines(
        setup.name,
        stage.models["lively"],
        *args,
        overlapped=setup.overlapped,
        batch_invariant=setup.batch_invariant,
    )
    async with stands as engines:
        before = {name: await engine.counters() for name, engine in engines.items()}
        for wave in range(settings.waves):
            cases = crowd(settings.seed + wave, setup.kinds, settings.crowd)
            quiet = crowd(settings.seed + wave, setup.quiet, settings.crowd)
            answers: dict[str, list[Answer]] = {}
            for name, engine in engines.items():
                answers[name] = [*await engine.ask_all(cases), *await engine.ask_in_turn(quiet)]
                cached[name] += sum(answer.cached_tokens for answer in answers[name])
            ours.add([*cases, *quiet], answers[STOCK], answers[OURS])
            if AGAIN in answers:
                control.add([*cases, *quiet], answers[STOCK], answers[AGAIN])
            if wave == 0:
                # Only the first token differs, so whatever differs in the answers came through the cache.
                chosen = [(case, answer) for case, answer in zip(cases, answers[STOCK], strict=False) if free(case)]
                again = await engines[STOCK].ask_all(altered([case for case, _ in chosen]))
                other_prompts.add([case for case, _ in chosen], [answer for _, answer in chosen], again)
                moved_choices = sum(
                    moved(answer, other, setup.tie) for (_, answer), other in zip(chosen, again, strict=True)
                )
        after = {name: await engine.counters() for name, engine in engines.items()}
    counted = {name: {key: after[name][key] - before[name].get(key, 0.0) for key in after[name]} for name in engines}
    figures = {
        "setup": setup.name,
        "args": list(args),
        "batch_invariant": setup.batch_invariant,
        "tie": setup.tie,
        "engine_says": stage.said[setup.name],
        "justitia": ours.figures(),
        "preemptions": {name: int(counted[name].get("num_preemptions", 0)) for name in engines},
        "cached_tokens": cached,
        "control_stock_again": control.figures() if settings.control else None,
        "control_other_prompts": {
            "choices": other_prompts.choices,
            "moved": moved_choices,
            "differing": other_prompts.differing + other_prompts.ties,
        },
    }
    if "--speculative-config" in args:
        for key in ("draft", "accepted"):
            name = f"spec_decode_num_{key}_tokens"
            figures[f"{key}_tokens"] = {engine: int(counted[engine].get(name, 0)) for engine in engines}
    figures["failures"] = equality_failures(figures)
    return figures


def equality_failures(figures: dict[str, Any]) -> list[str]:
    """What keeps a setup from having shown that the tokens are the same; empty when nothing does."""
    failures = []
    ours, other, again = figures["justitia"], figures["control_other_prompts"], figures["control_stock_again"]
    if ours["differing"]:
        failures.append(f"{ours['differing']} answers differ from the stock engine's")
    if again is not None and again["differing"]:
        failures.append(f"{again['differing']} answers of two stock engines differ: these cannot be compared")
    if not ours["tokens"]:
        failures.append("no token was compared")
    for kind, tally in ours["kinds"].items():
        if not tally["tokens"]:
            failures.append(f"no token was compared of {kind}")
        if tally["ties"] * 20 > tally["choices"] + 20:
            failures.append(
                f"{tally['ties']} ties among {tally['choices']} answers are too many to call them that: {kind}"
            )
    failures += [f"nothing was preempted on {name}" for name in (STOCK, OURS) if not figures["preemptions"][name]]
    if "shared beginnings" in ours["kinds"]:
        failures += [
            f"no token came from the prefix cache on {n}" for n in (STOCK, OURS) if not figures["cached_tokens"][n]
        ]
    if "accepted_tokens" in figures:
        failures += [f"no draft was accepted on {n}" for n in (STOCK, OURS) if not figures["accepted_tokens"][n]]
    if other["moved"] < 0.9 * other["choices"] or other["differing"] < 0.5 * other["choices"]:
        failures.append("answers hardly depend on what came first: equal ones would show nothing")
    return failures
