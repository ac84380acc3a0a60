"""Agents with texts: the text decides what they cost, as far as it says so, on both sides alike."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from math import log
from random import Random
from statistics import fmean, median
from typing import Any

import pytest

from gateway.agent_trace import AgentTrace
from gateway.replay import traces
from gateway.replay.agent_types import PAPER_TYPES, AgentType
from gateway.replay.command import LEARN_FROM_SEEDS, load_past
from gateway.replay.texts import HELD_OUT, TRAIN, write_tasks
from gateway.replay.texts.laws import AGENT_SIGMA, LAWS, MANNERS, SILENT_SIGMA, TASK_SIGMA, TASKS_SIGMA
from gateway.replay.texts.material import SAID, spelled
from gateway.replay.texts.program import MOST_OUTPUT, Program
from gateway.replay.texts.sides import COMMON, COMMON_SHARE, Side, Voice
from gateway.replay.texts.tokens import count_tokens
from gateway.replay.traces import built_in, describe, paper, texts_per_class
from tests.replay.test_traces import all_tasks, of_class

SIDES = (TRAIN, HELD_OUT)
KIND_OF = {kind.name: kind for kind in PAPER_TYPES}

# Whoever asks for the same agents again need not have them made again; `built_in` and `load_past` make their own.
texts = cache(traces.texts)


@cache
def per_class(held_out: bool = False, noise: float = 1.0) -> list[AgentTrace]:
    return texts_per_class(1, 40, held_out, noise)


def program_of(agent: AgentTrace, held_out: bool) -> Program:
    """What this agent's text was made from. Its name is known from how the trace is drawn."""
    name, number = "text-per-class-held-out" if held_out else "text-per-class", int(agent.agent_id.split("-")[-2])
    side = HELD_OUT if held_out else TRAIN
    return Program(
        KIND_OF[agent.agent_class], Random(f"words:{side.name}:{name}:1:{number}"), Random("luck"), side, noise=0.0
    )


def tau(pairs: list[tuple[float, float]]) -> float:
    """Kendall's, where ties count half a concordant pair and half a discordant one."""
    signs = [
        (a > c) - (a < c) if b > d else (a < c) - (a > c)
        for i, (a, b) in enumerate(pairs)
        for c, d in pairs[:i]
        if b != d
    ]
    return fmean(signs)


# --- the trace ---


def test_a_spec_says_seed_load_and_side() -> None:
    assert built_in("text:2") == texts(2, held_out=False)
    assert built_in("text:2:3:held-out") == texts(2, held_out=True)


@pytest.mark.parametrize("spec", ["text:7:2", "text:7:2:held-out"])
def test_nothing_is_learned_from_what_is_held_out(spec: str) -> None:
    past = load_past(spec, "")
    assert past == [agent for further in LEARN_FROM_SEEDS for agent in texts(7 + further, load=2)]
    assert not {agent.tasks for agent in texts(7, load=2)} & {agent.tasks for agent in past}


@pytest.mark.wire
def test_another_process_writes_the_same_bytes() -> None:
    program = (
        "import hashlib, sys, msgspec; from gateway.replay.traces import texts;"
        "print(hashlib.sha256(msgspec.json.encode(texts(5, agents=40, held_out=True))).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0].strip()) == 64


@pytest.mark.parametrize("held_out", [False, True])
def test_it_is_as_large_as_the_papers(held_out: bool) -> None:
    errors = []
    for seed in range(3):
        facts: dict[str, Any] = describe(texts(seed, held_out=held_out))
        assert facts["agents"] == 300
        assert 2_600 <= facts["tasks"] <= 3_400
        assert 35_000 <= facts["iterations"] <= 55_000
        sizes = {size: row["agents"] for size, row in facts["sizes"].items()}
        assert sizes == {"small": 180, "medium": 90, "large": 30}
        assert set(facts["classes"]) == set(KIND_OF)
        costs = [facts["sizes"][size]["cost_mean"] for size in ("small", "medium", "large")]
        assert all(more > 2.5 * less for less, more in pairwise(costs))
        errors.append(facts["class_mean_error"])
    assert 0.4 <= fmean(errors) <= 0.7


def test_arrivals_are_the_papers_and_so_is_the_rate_of_more() -> None:
    assert [agent.arrival_s for agent in texts(2, held_out=False)] == [agent.arrival_s for agent in paper(2, 3)]
    assert [agent.tasks for agent in texts(2, load=1)] == [agent.tasks for agent in texts(2, held_out=False)]
    more = texts(2, agents=600)
    assert len(more) == 600 and 600 < more[-1].arrival_s <= 12 * 60


def test_as_many_of_each_class_as_wanted() -> None:
    agents = texts_per_class(2, 3)
    assert Counter(agent.agent_class for agent in agents) == dict.fromkeys(KIND_OF, 3)
    assert texts_per_class(2, 3) == agents != texts_per_class(5, 3)
    assert not {agent.tasks for agent in texts(2, held_out=False)} & {agent.tasks for agent in agents}


@pytest.mark.parametrize("held_out", [False, True])
def test_tasks_fit_and_count_what_they_send(held_out: bool) -> None:
    for task in all_tasks(per_class(held_out)):
        assert task.prompt is not None and task.system != "" and task.prefix is None
        sent = [task.system or "", *task.tools, task.prompt]
        assert task.prompt_tokens == sum(count_tokens(each) for each in sent)
        assert task.prompt_tokens + task.output_tokens <= 3_000
        assert task.output_tokens <= (task.max_tokens or MOST_OUTPUT)


def test_a_limit_tells_no_length() -> None:
    """It is the same for all of a class, and few answers come near it."""
    for name, law in LAWS.items():
        tasks = all_tasks(of_class(per_class(), name))
        assert {task.max_tokens for task in tasks} == {law.max_tokens}
        if law.max_tokens is not None:
            assert sum(task.output_tokens > law.max_tokens / 2 for task in tasks) < 0.05 * len(tasks)
    assert {law.max_tokens for law in LAWS.values()} >= {None, 256, 512, 1024}


@pytest.mark.parametrize("held_out", [False, True])
def test_a_third_say_how_many_tasks_to_expect_right_within_a_fifth(held_out: bool) -> None:
    agents = per_class(held_out)
    told = [agent for agent in agents if agent.expected_tasks is not None]
    assert 0.26 <= len(told) / len(agents) <= 0.41
    off = [agent.expected_tasks / len(agent.tasks) for agent in told if agent.expected_tasks is not None]
    assert all(0.8 <= each <= 1.2 for each in off)
    assert min(off) < 0.9 and max(off) > 1.1 and abs(fmean(off) - 1) < 0.03


# --- structure ---


def test_who_waits_for_whom() -> None:
    for agent in per_class():
        first, *rest = agent.tasks
        assert first.after == ()
        match KIND_OF[agent.agent_class].shape:
            case "parallel":
                assert all(task.after == () for task in rest)
            case "samples":
                assert all(task.after == () and task.prompt == first.prompt for task in rest)
            case "chain":
                for before, turn in pairwise(agent.tasks):
                    assert turn.after == (before.id,) and 0.05 <= turn.think_s <= 0.5
                    assert turn.prompt_tokens > before.prompt_tokens
            case "plan":
                *steps, answer = rest
                assert all(step.after == (first.id,) for step in steps)
                assert answer.after == tuple(step.id for step in steps)
            case _:
                *parts, last = agent.tasks
                assert all(part.after == () for part in parts) and last.after == tuple(part.id for part in parts)


def test_a_later_prompt_holds_as_much_as_the_earlier_tasks_wrote() -> None:
    for agent in per_class():
        match KIND_OF[agent.agent_class].shape:
            case "chain":
                grown = [after.prompt_tokens - before.prompt_tokens for before, after in pairwise(agent.tasks)]
                assert all(more > task.output_tokens for more, task in zip(grown, agent.tasks, strict=False))
            case "reduce" | "vote":
                written = sum(task.output_tokens for task in agent.tasks[:-1])
                assert agent.tasks[-1].prompt_tokens > min(0.8 * written, 1_500)


# --- the sides ---


def data(side: Side) -> Iterator[str]:
    for topic in side.topics:
        yield from (topic.name, *topic.subjects, *topic.verbs, *topic.objects, *topic.places)
    for words in (side.people, side.goods, side.belongings, side.furniture, side.functions, side.variables):
        yield from words
    for each in (*side.tools.values(), *side.wordings.values()):
        yield from each


def test_nothing_of_one_side_is_on_the_other() -> None:
    common = {wording for wordings in COMMON.values() for wording in wordings}
    assert not set(data(TRAIN)) & set(data(HELD_OUT))
    assert not common & {*data(TRAIN), *data(HELD_OUT)}


def test_both_sides_can_say_the_same_things() -> None:
    assert TRAIN.wordings.keys() == HELD_OUT.wordings.keys() >= COMMON.keys()
    assert TRAIN.tools.keys() == HELD_OUT.tools.keys()


def test_first_prompts_of_the_sides_share_words_but_no_text() -> None:
    def first(held_out: bool) -> set[str]:
        return {agent.tasks[0].prompt or "" for agent in per_class(held_out)}

    assert not first(False) & first(True)
    words = [Counter(word for prompt in first(side) for word in set(prompt.split())) for side in (False, True)]
    assert 0.15 < len(words[0].keys() & words[1].keys()) / len(words[0].keys() | words[1].keys()) < 0.6


def test_a_program_words_a_thing_as_it_did_before() -> None:
    common = 0
    for seed in range(300):
        voice = Voice(Random(seed), TRAIN, COMMON)
        said = voice.say("verdict/0")
        assert said == voice.say("verdict/0")
        common += said in COMMON["verdict/0"]
    assert abs(common / 300 - COMMON_SHARE) < 0.1


def test_classes_look_alike() -> None:
    """The openings of the two largest are the same, and claims are checked in the same words."""
    opening = {
        name: {(agent.tasks[0].prompt or "").split("\n")[0] for agent in of_class(per_class(), name)}
        for name in ("document-merging", "map-reduce-summary")
    }
    assert len(opening["document-merging"] & opening["map-reduce-summary"]) >= 5
    for side in SIDES:
        roles = [side.wordings[f"role/{name}"] for name in opening]
        assert roles[0] == roles[1]


# --- the laws ---


def test_factors_are_about_one() -> None:
    for law in LAWS.values():
        assert list(law.depths) == sorted(law.depths) and list(law.hard) == sorted(law.hard)
        assert 0.8 < fmean(law.depths) < 1.2 and 0.9 < fmean(law.hard) < 1.2
    assert abs(fmean(MANNERS) - 1) < 0.05


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", PAPER_TYPES, ids=lambda kind: kind.name)
def test_the_text_decides_the_cost(kind: AgentType, held_out: bool) -> None:
    """What is asked for and how much of it, without any noise, orders the agents of a class; each alone does a little."""
    agents = of_class(per_class(held_out), kind.name)
    programs = [program_of(agent, held_out) for agent in agents]
    implied = [each.cost for each in of_class(per_class(held_out, noise=0.0), kind.name)]
    costs = [agent.cost for agent in agents]
    assert tau(list(zip(implied, costs, strict=True))) > 0.5
    depths = [(float(program.depth), float(cost)) for program, cost in zip(programs, costs, strict=True)]
    widths = [(program.width.tasks, float(cost)) for program, cost in zip(programs, costs, strict=True)]
    assert 0.05 < tau(depths) < 0.8
    assert 0.05 < tau(widths) < 0.8


@pytest.mark.parametrize("held_out", [False, True])
def test_neither_the_class_nor_the_text_tells_all(held_out: bool) -> None:
    agents, implied = per_class(held_out), per_class(held_out, noise=0.0)
    facts: dict[str, Any] = describe(agents)
    assert 0.5 <= facts["class_mean_error"] <= 0.8
    off = [abs(best.cost - agent.cost) / agent.cost for agent, best in zip(agents, implied, strict=True)]
    assert 0.12 <= median(off) <= 0.22


def test_without_noise_a_task_is_what_its_text_implies() -> None:
    """The first task asks the same, word for word, whatever comes of it."""
    for agent, implied in zip(per_class(), per_class(noise=0.0), strict=True):
        assert agent.tasks[0].prompt == implied.tasks[0].prompt and agent.agent_id == implied.agent_id
    outputs = [
        {task.output_tokens for task in agent.tasks if task.id.startswith(("check", "claim", "triple", "sample"))}
        for agent in per_class(noise=0.0)
    ]
    assert all(len(of_agent) <= 1 for of_agent in outputs)


def test_noise_is_as_large_as_said() -> None:
    kind = KIND_OF["fact-verification"]
    logs, counts = [], {True: [], False: []}  # type: ignore[var-annotated]
    for i in range(1_200):
        told = Program(kind, Random(f"words:{i}"), Random(f"luck:{i}"), TRAIN, noise=1.0)
        best = Program(kind, Random(f"words:{i}"), Random(f"luck:{i}"), TRAIN, noise=0.0)
        logs.append(log(told.output_tokens() / best.output_tokens()))
        counts[told.width.telling == "silent"].append(log(told.count / told.width.tasks))

    def sigma(values: list[float]) -> float:
        return fmean((value - fmean(values)) ** 2 for value in values) ** 0.5

    assert sigma(logs) == pytest.approx((AGENT_SIGMA**2 + TASK_SIGMA**2) ** 0.5, rel=0.1)
    # Whole tasks: rounding adds a little, and there are at least two.
    assert TASKS_SIGMA * 0.9 < sigma(counts[False]) < TASKS_SIGMA * 1.4
    assert SILENT_SIGMA * 0.75 < sigma(counts[True]) < SILENT_SIGMA * 1.2
    assert 0.08 < len(counts[True]) / 1_200 < 0.16


def test_a_hint_is_in_the_first_prompt() -> None:
    seen = Counter()  # type: ignore[var-annotated]
    for agent in per_class():
        program, prompt = program_of(agent, held_out=False), agent.tasks[0].prompt or ""
        telling, things = program.width.telling, program.width.things
        seen[telling] += 1
        if telling == "list":
            assert prompt.count("\n- ") == things
            assert (agent.tasks[1].prompt or "").count("\n- ") == 0
        elif telling == "of":
            assert str(things) in prompt
        elif telling == "number":
            assert any(f" {spelled(Random(seed), things)} " in f" {prompt}".replace(".", " ") for seed in range(9))
    assert set(seen) == {"list", "of", "number", "vague", "silent"}


# --- what they are made of ---


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("cat", 1),
        ("A cat sat.", 4),
        ("recalibrated", 2),
        ("12345", 2),
        ("a\n    b", 3),
        ("x_y == 3", 6),
        ("Zoë – ok", 3),
    ],
)
def test_tokens_are_pieces_of_words_and_marks(text: str, tokens: int) -> None:
    assert count_tokens(text) == tokens


def test_english_has_about_four_bytes_a_token_and_code_fewer() -> None:
    def bytes_per_token(name: str) -> float:
        tasks = all_tasks(of_class(per_class(), name))
        return sum(len((task.prompt or "").encode()) for task in tasks) / sum(
            count_tokens(task.prompt or "") for task in tasks
        )

    assert 3.7 < bytes_per_token("map-reduce-summary") < 4.7
    assert bytes_per_token("code-checking") < 3.5


def test_numbers_are_said_in_words() -> None:
    said = [spelled(Random(0), number) for number in SAID]
    assert len(set(said)) == len(SAID) and all(not any(map(str.isdigit, each)) for each in said)
    assert {spelled(Random(seed), 12) for seed in range(9)} == {"twelve", "a dozen"}


def test_an_agent_follows_from_its_name() -> None:
    kind = PAPER_TYPES[0]
    assert write_tasks(kind, "a", TRAIN) == write_tasks(kind, "a", TRAIN) != write_tasks(kind, "b", TRAIN)
    assert write_tasks(kind, "a", TRAIN) != write_tasks(kind, "a", HELD_OUT)
