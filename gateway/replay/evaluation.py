"""`justitia predictor evaluate TRACE`: how well a predictor predicts agents that it has not seen.

A predictor learns from agents of the past, each served alone, and is then asked at each arrival of others', learning nothing of
them. The paper's figures are of predictions at an agent's first task; *formed*, when all have arrived that need
not wait for others, is what the fair queue orders by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from gateway.agent_trace import AgentTrace, TraceError
from gateway.config.settings import command_config
from gateway.replay.command import load_past, load_trace
from gateway.replay.environment import machine, versions
from gateway.replay.predictors import ABLATIONS, LEARNED, Believed, UnknownPredictor, arrivals, serving, waves
from gateway.replay.traces import BUILT_IN, texts_per_class
from predictor.evaluate import Quality, quality

# Of a file, this part is learned from, by arrival, if nothing else is named.
PAST_SHARE = 0.7
LATENCY_TOKENS, LATENCY_CALLS = 2_000, 3_000


class Evaluation(msgspec.Struct, frozen=True):
    """first: at the first task. formed: when all of the first wave have arrived. half: when half of the tasks have. decode: of
    the first task's output length. without: the ablation, if it is one."""

    predictor: str
    without: str
    first: Quality
    formed: Quality
    half: Quality
    decode: Quality


class EvaluateSettings(BaseSettings):
    """`justitia predictor evaluate`: how well predictors predict the agents of a trace."""

    model_config = command_config("JUSTITIA_EVALUATE_") | SettingsConfigDict(cli_shortcuts={"out": "json"})

    trace: CliPositionalArg[str] = Field(
        description="A file of agents (JSON Lines), or a built-in trace: " + "; ".join(BUILT_IN.values())
    )
    predictor: str = Field(",".join(LEARNED), description="Predictors, separated by commas.")
    learn_from: str = Field(
        "",
        description="Traces to learn from, separated by commas; default: other seeds of a built-in trace, and of a file the"
        " first 70 % by arrival.",
    )
    per_class: int = Field(100, ge=3, description="Agents of each class to learn from, at most.")
    ablations: bool = Field(False, description="Also xgboost without text, without class, and without growth.")
    seed: int = Field(0, ge=0, description="Seed of the training.")
    out: Path | None = Field(None, description="File for the results, as JSON.")


def run_evaluate(settings: EvaluateSettings) -> int:
    """0; 1 when the results cannot be written; 2 when a trace or a predictor cannot be had."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        past, agents = past_and_held_out(settings.trace, settings.learn_from, settings.per_class)
        console.print(f"{len(past)} agents to learn from, {len(agents)} to predict")
        found = list(evaluations(past, agents, settings.predictor.split(","), settings.seed, settings.ablations))
    except (TraceError, UnknownPredictor, OSError) as error:
        console.print(f"justitia predictor evaluate: {error}", markup=False)
        return 2
    Console(highlight=False).print(table(found))
    if settings.out is not None:
        config = {**settings.model_dump(mode="json", exclude={"out"}), "versions": versions(), "machine": machine()}
        results = msgspec.json.format(msgspec.json.encode({"config": config, "runs": found}), indent=1)
        try:
            settings.out.write_bytes(results)
        except OSError as error:
            console.print(f"justitia predictor evaluate: {error}", markup=False)
            return 1
    return 0


def past_and_held_out(
    trace: str, learn_from: str = "", per_class: int = 100
) -> tuple[list[AgentTrace], list[AgentTrace]]:
    """The newest agents of the past, so many of each class, and the agents to predict. Raises `TraceError` and `OSError`."""
    agents = load_trace(trace)
    if learn_from:
        past = load_past(trace, learn_from)
    elif trace.startswith("text:"):  # a mix has few of its large ones
        past = texts_per_class(int(trace.split(":")[1]) + 101, per_class)
    else:
        past = load_past(trace, "")
    if not past:
        ordered = sorted(agents, key=lambda agent: agent.arrival_s)
        border = round(PAST_SHARE * len(ordered))
        past, agents = ordered[:border], ordered[border:]
        if not agents:
            raise TraceError(f"{trace}: one agent is too few to learn from some and predict others")
    return newest_of_each_class(past, per_class), agents


def newest_of_each_class(agents: Sequence[AgentTrace], count: int) -> list[AgentTrace]:
    chosen: list[AgentTrace] = []
    seen: dict[str, int] = {}
    for agent in reversed(agents):
        seen[agent.agent_class] = seen.get(agent.agent_class, 0) + 1
        if seen[agent.agent_class] <= count:
            chosen.append(agent)
    return chosen[::-1]


def evaluations(
    past: Sequence[AgentTrace], agents: Sequence[AgentTrace], names: Sequence[str], seed: int, ablations: bool
) -> Iterator[Evaluation]:
    """Raises `UnknownPredictor`."""
    for name in names:
        yield evaluate(serving(name, past, seed=seed), agents, name)
    for without in ABLATIONS if ablations else ():
        yield evaluate(serving("xgboost", past, seed=seed, without=without), agents, "xgboost", without)


def evaluate(asked: Believed, agents: Sequence[AgentTrace], name: str, without: str = "") -> Evaluation:
    """Learns nothing."""
    truth = np.array([agent.cost for agent in agents], float)
    decoded = np.array([agent.tasks[0].output_tokens for agent in agents], float)
    answers = [list(arrivals(agent, asked)) for agent in agents]
    classes = [agent.agent_class for agent in agents]
    formed = [len(waves(agent)[0]) - 1 for agent in agents]
    halves = [(len(agent.tasks) - 1) // 2 for agent in agents]

    def at(places: Sequence[int]) -> Quality:
        told = [answer[place] for answer, place in zip(answers, places, strict=True)]
        costs, p90s = np.array([one.agent.cost for one in told]), np.array([one.agent.p90 for one in told])
        return quality(truth, costs, p90s, classes)

    return Evaluation(
        predictor=name,
        without=without,
        first=at([0] * len(agents)),
        formed=at(formed),
        half=at(halves),
        decode=quality(decoded, np.array([answer[0].task.decode_tokens for answer in answers]), None, classes),
    )


def table(found: Sequence[Evaluation]) -> Table:
    drawn = Table(
        title="Agent cost, predicted at the first task",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    drawn.add_column("predictor", no_wrap=True)
    for heading in ("error", "mean", "τ", "τ in class", "below P90", "error, formed", "half", "decode"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        drawn.add_row(
            one.predictor + (f" without {one.without}" if one.without else ""),
            _percent(one.first.median_error),
            _percent(one.first.mean_error),
            _two_digits(one.first.tau),
            _two_digits(one.first.tau_within),
            _percent(one.first.coverage),
            _percent(one.formed.median_error),
            _percent(one.half.median_error),
            _percent(one.decode.median_error),
        )
    drawn.caption = (
        "error: median of |predicted − true| ÷ true. τ: Kendall's, of the order. formed: when the first tasks have all\n"
        "arrived; half: when half of the tasks have. decode: of the first task's output length."
    )
    return drawn


def _two_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.0f} %"
