"""The kinds of agents in the demo, each as the tasks that a program of that kind sends.

Sizes are for a tiny model whose KV cache holds 4,096 tokens: prompts of some 20 to 250 tokens, outputs of 5 to 200. The
median length of an output follows from the kind and, where it does in life, from the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from gateway.replay.texts import english as text

Size = Literal["small", "medium", "large"]
SIZES: tuple[Size, ...] = ("small", "medium", "large")
LARGE_SHARE, MEDIUM_SHARE = 0.1, 0.3
# Output tokens for each word of a text that is to be condensed or merged.
TOKENS_PER_WORD = 3.4


@dataclass(frozen=True, slots=True)
class Draft:
    """A task before its prompt is counted."""

    id: str
    prompt: str
    output: float  # the median length in tokens, before noise
    after: tuple[str, ...] = ()
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of agents."""

    name: str  # the class, as it is sent to the gateway
    size: Size
    write: Callable[[Random, float], list[Draft]]  # write(rng, scale): the tasks of one, `scale` times as wide as usual


def size_counts(agents: int) -> dict[Size, int]:
    """How many of so many agents are small, medium and large: about 60, 30 and 10 %."""
    large, medium = round(agents * LARGE_SHARE), round(agents * MEDIUM_SHARE)
    return {"small": agents - large - medium, "medium": medium, "large": large}


def _many(rng: Random, low: int, high: int, scale: float) -> int:
    return max(1, round(rng.randint(low, high) * scale))


def equation_verification(rng: Random, scale: float) -> list[Draft]:
    problem = text.arithmetic(rng)
    return [
        Draft(f"check-{i}", f"{problem}\nSomebody answers {rng.randint(2, 300)}. Is that right? Show the equation.", 16)
        for i in range(_many(rng, 2, 4, 1))
    ]


def fact_verification(rng: Random, scale: float) -> list[Draft]:
    about = text.topic(rng)
    evidence = text.document(rng, about, rng.randint(6, 16))
    return [
        Draft(f"claim-{i}", f"Evidence: {evidence}\nClaim: {text.sentence(rng, about)}\nTrue, false or not stated?", 10)
        for i in range(_many(rng, 3, 6, 1))
    ]


def kbqa_verification(rng: Random, scale: float) -> list[Draft]:
    about = text.topic(rng)
    return [
        Draft(
            f"triple-{i}",
            f"About {about.name}: does the record say this? {text.sentence(rng, about)} Answer and cite it.",
            14,
        )
        for i in range(_many(rng, 2, 5, 1))
    ]


def alfworld(rng: Random, scale: float) -> list[Draft]:
    """A loop: think, act, wait for the world, with the story so far in every prompt."""
    story, turns = text.errand(rng), []
    for i in range(rng.randint(4, 8)):
        turns.append(
            Draft(
                f"turn-{i}",
                f"{story} What next?",
                9,
                after=(f"turn-{i - 1}",) if i else (),
                think_s=round(rng.uniform(0.05, 0.3), 3) if i else 0.0,
            )
        )
        story = f"{story[:260]} {text.observation(rng)}"
    return turns


def code_checking(rng: Random, scale: float) -> list[Draft]:
    drafts = []
    for i in range(_many(rng, 22, 40, scale)):
        lines = rng.randint(5, 10)
        drafts.append(Draft(f"function-{i}", f"Find the mistakes:\n{text.function(rng, lines)}", 6.0 * lines))
    return drafts


def self_consistency(rng: Random, scale: float) -> list[Draft]:
    """One question, many samples: every prompt is the same, the lengths are not."""
    question = f"Think step by step, then answer.\n{text.arithmetic(rng)}"
    return [Draft(f"sample-{i}", question, 75) for i in range(_many(rng, 32, 54, scale))]


def plan_and_execute(rng: Random, scale: float) -> list[Draft]:
    """A plan, steps beside each other, and an answer from all of them."""
    about = text.topic(rng)
    goal = f"Prepare a short briefing on {about.name}. {text.document(rng, about, 12)}"
    steps = [f"step-{i}" for i in range(_many(rng, 18, 32, scale))]
    return [
        Draft("plan", f"Make a plan of {len(steps)} steps.\n{goal}", 45),
        *(
            Draft(
                name,
                f"{goal}\nCarry out this step: {text.sentence(rng, about)}",
                65,
                ("plan",),
                round(rng.uniform(0.05, 0.3), 3),
            )
            for name in steps
        ),
        Draft("answer", f"{goal}\nNotes: {text.document(rng, about, 16)}\nWrite the briefing.", 100, tuple(steps)),
    ]


def document_merging(rng: Random, scale: float) -> list[Draft]:
    """Many candidates for one merged document, and a vote."""
    about = text.topic(rng)
    drafts = []
    for i in range(_many(rng, 80, 116, scale)):
        words = rng.randint(34, 46)
        half = words // 2
        pages = f"First: {text.document(rng, about, half)}\nSecond: {text.document(rng, about, half)}"
        drafts.append(Draft(f"merge-{i}", f"Merge these two, lose nothing.\n{pages}", TOKENS_PER_WORD * words))
    shortlist = text.document(rng, about, 40)
    return [
        *drafts,
        Draft("vote", f"Which draft is best, and why?\n{shortlist}", 40, tuple(draft.id for draft in drafts)),
    ]


def map_reduce(rng: Random, scale: float) -> list[Draft]:
    """Summaries of many chapters, summaries of groups of them, and one of everything."""
    about = text.topic(rng)
    maps = []
    for i in range(_many(rng, 100, 144, scale)):
        words = rng.randint(26, 44)
        maps.append(
            Draft(
                f"map-{i}",
                f"Summarise for the record:\n{text.document(rng, about, words)}",
                0.8 * TOKENS_PER_WORD * words,
            )
        )
    groups = [maps[start : start + 6] for start in range(0, len(maps), 6)]
    reduces = [
        Draft(
            f"reduce-{i}",
            f"Condense these summaries:\n{text.document(rng, about, 40)}",
            TOKENS_PER_WORD * 38,
            tuple(draft.id for draft in group),
        )
        for i, group in enumerate(groups)
    ]
    last = Draft(
        "final", f"Write the summary:\n{text.document(rng, about, 40)}", 150, tuple(draft.id for draft in reduces)
    )
    return [*maps, *reduces, last]


KINDS = (
    Kind("equation-verification", "small", equation_verification),
    Kind("fact-verification", "small", fact_verification),
    Kind("kbqa-verification", "small", kbqa_verification),
    Kind("alfworld", "small", alfworld),
    Kind("code-checking", "medium", code_checking),
    Kind("self-consistency", "medium", self_consistency),
    Kind("plan-and-execute", "medium", plan_and_execute),
    Kind("document-merging", "large", document_merging),
    Kind("map-reduce-summary", "large", map_reduce),
)
