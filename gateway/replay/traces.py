"""The built-in traces. Each follows from its spec alone: the same words give the same agents on every machine.

    paper:SEED:LOAD[:MIX]     elephant:MICE[:SEED]     tools:SEED[:stories]     coding:SEED
    prefix:SEED               tenants:SEED             public:PATH:SEED[:LOAD]
    text:SEED[:LOAD][:held-out]

Arrivals are bursty like production's: a Poisson process whose rate is drawn anew for each of 18 minutes (log-normal,
σ = 0.5), given that so many agents arrive; a load of 2 squeezes the 18 minutes into 9. The load moves arrivals only: one
seed has the same agents in the same order at every load. `public` takes the arrivals from a recorded trace instead; no
public trace has agents with their tasks, so these are still ours (`gateway.replay.agent_types`).
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import msgspec

from gateway.agent_trace import AgentTrace, Prefix, TaskTrace, TraceError
from gateway.replay.agent_types import (
    CODING,
    CODING_PREFIX,
    ELEPHANT,
    ITERATION_S,
    KV_IN_USE,
    KV_TOKENS,
    MICE,
    MIXES,
    PAPER_MIX,
    PAPER_TYPES,
    SIZES,
    TOOL_TYPES,
    AgentType,
    Mix,
    draw_tasks,
    types_for,
)
from gateway.replay.texts import HELD_OUT, TRAIN, write_tasks
from gateway.replay.texts.laws import EXPECTING

BUILT_IN = {
    "paper": (
        "paper:SEED:LOAD[:MIX] – the paper's nine types, 300 agents in 18/LOAD minutes (LOAD 1 to 3); "
        "MIX: paper (default), light or heavy"
    ),
    "elephant": "elephant:MICE[:SEED] – a large agent, and MICE small ones that together ask for more than the engine can do",
    "tools": (
        "tools:SEED[:stories] – 300 agents at about load 2, two thirds of which wait for tools between their tasks; "
        "stories: the prompts of a chain begin with those before them"
    ),
    "coding": "coding:SEED – 300 coding agents with long stories and waits for tools, for --profile llama-3-8b-a100",
    "prefix": "prefix:SEED – paper:SEED:3 whose prompts begin alike within a class, and further within an agent",
    "tenants": "tenants:SEED – two tenants with the same work, one of which has cut each agent into ten",
    "public": "public:PATH:SEED[:LOAD] – the paper's agents on the arrivals of a public trace (CSV), LOAD 1 unless told",
    "text": (
        "text:SEED[:LOAD][:held-out] – the paper's classes with prompts whose text decides the cost, LOAD 3 unless told; "
        "held-out: other topics, names and wordings, the same laws"
    ),
}

Drawn = tuple[AgentType, tuple[TaskTrace, ...]]

AGENTS = 300
WINDOW_S = 18 * 60.0
MINUTES, RATE_SIGMA = 18, 0.5
# What the mice ask for, of an engine with `KV_IN_USE` (one holds somewhat more), and what one of them costs on average.
MICE_SHARE, MOUSE_COST = 1.05, 335_000
# Parts of the mean prompt of a class, and of an agent.
CLASS_PREFIX, AGENT_PREFIX = 0.1, 0.4
# Some 300 s of the engine for each tenant, arriving within two minutes.
CODING_AGENTS, CODING_WINDOW_S = 300, 6 * 60.0
TENANT_JOBS, TENANT_WINDOW_S, PIECES = 40, 120.0, 10


def built_in(spec: str) -> list[AgentTrace] | None:
    """The trace that the spec names, or None if it begins with none of the names in `BUILT_IN` (then it is a path).
    Raises `TraceError` for a spec that is not of a form in `BUILT_IN`, and for a public trace that cannot be used."""
    name, _, rest = spec.partition(":")
    if name not in BUILT_IN:
        return None
    try:
        return _parse(name, rest)
    except _BadSpec as error:
        raise TraceError(f"{spec!r}: {error}. It is written {BUILT_IN[name].partition(' – ')[0]}") from None


def paper(seed: int, load: float, mix: Mix = PAPER_MIX, name: str = "paper") -> list[AgentTrace]:
    return _on(arrivals(_rng("arrivals", seed), AGENTS, WINDOW_S / load), _paper_agents(seed, mix, AGENTS), name, seed)


def elephant(mice: int, seed: int = 0) -> list[AgentTrace]:
    """The elephant and the rate of the mice do not depend on how many mice there are, nor do the first mice."""
    rng = _rng("elephant", seed)
    agents = [_agent("elephant", seed, 0, 0.0, ELEPHANT, draw_tasks(ELEPHANT, rng))]
    mean_gap_s = MOUSE_COST / (MICE_SHARE * KV_TOKENS * KV_IN_USE / ITERATION_S)
    arrival_s = 0.0
    for i in range(1, mice + 1):
        arrival_s += rng.expovariate(1 / mean_gap_s)
        kind = rng.choice(MICE)
        agents.append(_agent("elephant", seed, i, arrival_s, kind, draw_tasks(kind, rng)))
    return agents


def tools(seed: int, stories: bool = False) -> list[AgentTrace]:
    rng = _rng("tools", seed)
    without = [kind for kind in PAPER_TYPES if kind.shape not in ("plan", "chain")]
    third = AGENTS // 3
    kinds = [*(TOOL_TYPES * third), *types_for(PAPER_MIX, AGENTS - 2 * third, rng, without)]
    rng.shuffle(kinds)
    drawn = [(kind, draw_tasks(kind, rng)) for kind in kinds]
    agents = _on(arrivals(_rng("arrivals", seed), AGENTS, WINDOW_S / 2), drawn, "tools", seed)
    if not stories:
        return agents
    chains = {kind.name for kind in TOOL_TYPES if kind.shape == "tool chain"}
    return [_telling_a_story(agent) if agent.agent_class in chains else agent for agent in agents]


def coding(seed: int) -> list[AgentTrace]:
    """Each prompt is the one before, its answer, and the tool's result; all begin with the same 3,200 tokens."""
    rng = _rng("coding", seed)
    drawn = [(CODING, draw_tasks(CODING, rng)) for _ in range(CODING_AGENTS)]
    agents = _on(arrivals(_rng("arrivals", seed), CODING_AGENTS, CODING_WINDOW_S), drawn, "coding", seed)
    return [_telling_a_story(agent, Prefix("class:coding", CODING_PREFIX)) for agent in agents]


def prefix(seed: int) -> list[AgentTrace]:
    """The agents of `paper:SEED:3`. What they share has one length for all that share it; a prompt that is not longer
    than its agent's part shares the class's only, one that is not longer than that shares nothing."""
    agents = paper(seed, 3, name="prefix")
    of_class: dict[str, list[int]] = defaultdict(list)
    for agent in agents:
        of_class[agent.agent_class] += [task.prompt_tokens for task in agent.tasks]
    shared = {name: Prefix(f"class:{name}", round(CLASS_PREFIX * fmean(of_class[name]))) for name in of_class}
    return [_with_prefixes(agent, shared[agent.agent_class]) for agent in agents]


def tenants(seed: int) -> list[AgentTrace]:
    """Each job comes twice at the same time: as one agent of "whole", and as ten agents of "split". Only types whose
    tasks do not wait for each other can be cut. Both tenants have work for far longer than the jobs arrive."""
    rng = _rng("tenants", seed)
    kinds = [kind for kind in PAPER_TYPES if kind.size == "medium" and kind.shape in ("parallel", "samples")]
    agents = []
    for i, arrival_s in enumerate(arrivals(rng, TENANT_JOBS, TENANT_WINDOW_S)):
        kind = rng.choice(kinds)
        pieces = max(1, round(2 * kind.tasks * rng.lognormvariate(0.0, kind.tasks_sigma) / PIECES))
        kind = replace(kind, tasks=pieces * PIECES, tasks_sigma=0.0)
        whole = _agent("tenants", seed, i, arrival_s, kind, draw_tasks(kind, rng), tenant="whole")
        agents.append(whole)
        agents += [
            msgspec.structs.replace(
                whole, agent_id=f"{whole.agent_id}-{piece}", tasks=whole.tasks[piece::PIECES], tenant="split"
            )
            for piece in range(PIECES)
        ]
    return agents


def public(path: Path, seed: int, agents: int = AGENTS, window_s: float = WINDOW_S) -> list[AgentTrace]:
    """So many arrivals drawn from the whole recording, which is squeezed into the window: bursts stay where they were.
    Columns: `timestamp_ms` (Mooncake) or `TIMESTAMP` (Azure 2023). Raises `TraceError`."""
    recorded = _recorded_s(path)
    if len(recorded) < agents:
        raise TraceError(f"{path} has {len(recorded)} rows; {agents} agents need as many arrivals")
    begin, length = recorded[0], recorded[-1] - recorded[0]
    if length <= 0:
        raise TraceError(f"{path}: all of its rows have the same time")
    chosen = _rng("public", seed).sample(recorded, agents)
    times = sorted(round((at - begin) / length * window_s, 3) for at in chosen)
    return _on(times, _paper_agents(seed, PAPER_MIX, agents), "public", seed)


def texts(
    seed: int, agents: int = AGENTS, load: float = 3.0, held_out: bool = False, noise: float = 1.0
) -> list[AgentTrace]:
    """The paper's mix of classes, with prompts (`gateway.replay.texts`). `noise`: a factor on what the texts do not express;
    with 0, what the best of predictors would expect."""
    rng = _rng("text types", seed)
    return _with_texts(types_for(PAPER_MIX, agents, rng), seed, WINDOW_S * agents / AGENTS / load, held_out, noise)


def texts_per_class(seed: int, per_class: int, held_out: bool = False, noise: float = 1.0) -> list[AgentTrace]:
    """So many agents of each class, in random order; other agents than those of `texts` with this seed."""
    kinds = [*PAPER_TYPES] * per_class
    _rng("text types", seed).shuffle(kinds)
    return _with_texts(kinds, seed, WINDOW_S, held_out, noise, "text-per-class")


def arrivals(rng: Random, agents: int, window_s: float) -> list[float]:
    """Sorted, within the window. Given their number, the arrivals of a Poisson process are independent draws from its
    rate, which is drawn here for each eighteenth of the window."""
    rates = [rng.lognormvariate(0.0, RATE_SIGMA) for _ in range(MINUTES)]
    minutes = rng.choices(range(MINUTES), rates, k=agents)
    return [round(at * window_s, 3) for at in sorted((minute + rng.random()) / MINUTES for minute in minutes)]


def describe(agents: Sequence[AgentTrace]) -> dict[str, Any]:
    """What a report on a trace must state: how many, how long, and how the cost is spread over sizes and classes.
    `iterations`: how long the engine takes for all of it with 80 % of the KV memory of `KV_TOKENS` in use.
    `class_mean_error`: mean |class mean − cost| / cost, the error of a predictor that knows only the class."""
    size_of = {kind.name: kind.size for kind in (*PAPER_TYPES, *TOOL_TYPES)}
    classes: dict[str, list[AgentTrace]] = defaultdict(list)
    sizes: dict[str, list[AgentTrace]] = {size: [] for size in SIZES}
    for agent in agents:
        classes[agent.agent_class].append(agent)
        sizes.setdefault(size_of.get(agent.agent_class, "unknown"), []).append(agent)
    mean_of = {name: fmean(agent.cost for agent in group) for name, group in classes.items()}
    total = sum(agent.cost for agent in agents)

    def group_row(group: Sequence[AgentTrace]) -> dict[str, float]:
        tasks = [task for agent in group for task in agent.tasks]
        return {
            "agents": len(group),
            "tasks_mean": len(tasks) / len(group),
            "prompt_mean": fmean(task.prompt_tokens for task in tasks),
            "output_mean": fmean(task.output_tokens for task in tasks),
            "cost_mean": fmean(agent.cost for agent in group),
            "cost_share": sum(agent.cost for agent in group) / total,
            "class_mean_error": _class_mean_error(group, mean_of),
        }

    return {
        "agents": len(agents),
        "tasks": sum(len(agent.tasks) for agent in agents),
        "last_arrival_s": max(agent.arrival_s for agent in agents),
        "cost": total,
        "iterations": round(total / (KV_TOKENS * KV_IN_USE)),
        "class_mean_error": _class_mean_error(agents, mean_of),
        "sizes": {size: group_row(group) for size, group in sizes.items() if group},
        "classes": {name: group_row(classes[name]) for name in sorted(classes)},
    }


def _class_mean_error(agents: Iterable[AgentTrace], mean_of: dict[str, float]) -> float:
    return fmean(abs(mean_of[agent.agent_class] - agent.cost) / agent.cost for agent in agents)


class _BadSpec(Exception):
    """Its message is what is wrong with a spec."""


def _parse(name: str, rest: str) -> list[AgentTrace]:
    words = rest.split(":") if rest else []
    if name == "paper":
        _expect(words, 2, 3)
        if len(words) == 3 and words[2] not in MIXES:
            raise _BadSpec(f"there is no mix {words[2]!r}, only {', '.join(MIXES)}")
        return paper(_whole("SEED", words[0]), _load(words[1]), MIXES[words[2]] if len(words) == 3 else PAPER_MIX)
    if name == "elephant":
        _expect(words, 1, 2)
        return elephant(_whole("MICE", words[0]), _whole("SEED", words[1]) if len(words) == 2 else 0)
    if name == "text":
        held_out = words[1:] != [] and words[-1] == "held-out"
        words = words[:-1] if held_out else words
        _expect(words, 1, 2)
        load = _load(words[1]) if len(words) == 2 else 3.0
        return texts(_whole("SEED", words[0]), AGENTS, load, held_out)
    if name == "tools" and len(words) == 2:
        if words[1] != "stories":
            raise _BadSpec(f"after the seed there may be `stories`, not {words[1]!r}")
        return tools(_whole("SEED", words[0]), stories=True)
    if name == "public":
        # A path may hold colons.
        parts = re.fullmatch(r"(?P<path>.+?):(?P<seed>[0-9]+)(?::(?P<load>[^:/]*))?", rest)
        if parts is None:
            raise _BadSpec("it needs a path, and a whole number as the seed")
        load = 1.0 if parts["load"] is None else _load(parts["load"])
        return public(Path(parts["path"]), _whole("SEED", parts["seed"]), AGENTS, WINDOW_S / load)
    _expect(words, 1, 1)
    return _BY_SEED[name](_whole("SEED", words[0]))


_BY_SEED: dict[str, Callable[[int], list[AgentTrace]]] = {
    "tools": tools,
    "coding": coding,
    "prefix": prefix,
    "tenants": tenants,
}


def _expect(words: list[str], least: int, most: int) -> None:
    if not least <= len(words) <= most:
        wanted = "one value is" if most == 1 else f"{least} or {most} values are"
        raise _BadSpec(f"{wanted} needed after the name, not {len(words)}")


def _whole(what: str, word: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", word):
        raise _BadSpec(f"{what} is a whole number of at most nine digits, not {word!r}")
    return int(word)


def _load(word: str) -> float:
    try:
        load = float(word)
    except ValueError:
        load = math.nan
    if not (math.isfinite(load) and load > 0 and math.isfinite(WINDOW_S / load)):
        raise _BadSpec(f"LOAD is a number above 0, not {word!r}")
    return load


def _rng(what: str, seed: int | str) -> Random:
    # Seeded by a text, not by hash(): that one differs from run to run.
    return Random(f"{what}:{seed}")


def _paper_agents(seed: int, mix: Mix, agents: int) -> list[Drawn]:
    rng = _rng("agents", seed)
    return [(kind, draw_tasks(kind, rng, mix)) for kind in types_for(mix, agents, rng)]


def _with_texts(
    kinds: Sequence[AgentType], seed: int, window_s: float, held_out: bool, noise: float, name: str = "text"
) -> list[AgentTrace]:
    side, name = (HELD_OUT, f"{name}-held-out") if held_out else (TRAIN, name)
    drawn = [(kind, write_tasks(kind, f"{name}:{seed}:{i}", side, noise)) for i, kind in enumerate(kinds)]
    agents = _on(arrivals(_rng("arrivals", seed), len(kinds), window_s), drawn, name, seed)
    return [msgspec.structs.replace(agent, expected_tasks=_expected(agent)) for agent in agents]


def _expected(agent: AgentTrace) -> int | None:
    """The number of tasks that the client expects, within a fifth; None where it sends none."""
    rng, count = _rng("expected", agent.agent_id), len(agent.tasks)
    return rng.randint(-(-4 * count // 5), 6 * count // 5) if rng.random() < EXPECTING else None


def _on(times: Sequence[float], drawn: Sequence[Drawn], name: str, seed: int) -> list[AgentTrace]:
    return [
        _agent(name, seed, i, at, kind, tasks) for i, (at, (kind, tasks)) in enumerate(zip(times, drawn, strict=True))
    ]


def _agent(
    trace: str,
    seed: int,
    number: int,
    arrival_s: float,
    kind: AgentType,
    tasks: tuple[TaskTrace, ...],
    tenant: str = "",
) -> AgentTrace:
    name = f"{trace}-{seed}-{number:03}-{kind.short}"
    return AgentTrace(name, round(arrival_s, 3), tasks, agent_class=kind.name, tenant=tenant)


def _with_prefixes(agent: AgentTrace, of_class: Prefix) -> AgentTrace:
    own = round(AGENT_PREFIX * fmean(task.prompt_tokens for task in agent.tasks))
    of_agent = Prefix(f"agent:{agent.agent_id}", of_class.tokens + own, of_class)
    tasks = []
    for task in agent.tasks:
        longest = next((shared for shared in (of_agent, of_class) if shared.tokens < task.prompt_tokens), None)
        tasks.append(msgspec.structs.replace(task, prefix=longest))
    return msgspec.structs.replace(agent, tasks=tuple(tasks))


def _telling_a_story(agent: AgentTrace, of_class: Prefix | None = None) -> AgentTrace:
    """Each prompt, and its answer, is a beginning of the next."""
    tasks = []
    for task in agent.tasks:
        prompt_tokens = max(task.prompt_tokens, of_class.tokens + 1 if of_class is not None else 0)
        story = Prefix(f"agent:{agent.agent_id}", prompt_tokens + task.output_tokens, of_class)
        tasks.append(msgspec.structs.replace(task, prompt_tokens=prompt_tokens, prefix=story))
    return msgspec.structs.replace(agent, tasks=tuple(tasks))


def _recorded_s(path: Path) -> list[float]:
    """The times of a recording in seconds, sorted; only their differences mean something."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines)
            columns = rows.fieldnames or ()
            if "timestamp_ms" in columns:
                return sorted(_time(rows, "timestamp_ms", lambda text: float(text) / 1000, path))
            if "TIMESTAMP" in columns:
                return sorted(_time(rows, "TIMESTAMP", _seconds, path))
    except (OSError, UnicodeError, csv.Error) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    raise TraceError(f"{path} has neither a column timestamp_ms (Mooncake) nor TIMESTAMP (Azure)")


def _time(rows: csv.DictReader[str], column: str, read: Callable[[str], float], path: Path) -> Iterator[float]:
    for row in rows:
        try:
            at = read(row[column] or "")
        except ValueError:
            at = math.nan
        if not math.isfinite(at):
            raise TraceError(f"{path}: {row[column]!r} in column {column} is not a time", rows.line_num)
        yield at


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
