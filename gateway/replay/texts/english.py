"""Plain English for prompts, made of templates and the word lists of `english.toml`.

All randomness comes from the generator that is passed in, so the same seed gives the same text.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class Topic:
    """The words that one document draws from."""

    name: str
    subjects: tuple[str, ...]
    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    places: tuple[str, ...]


def read(file: str) -> dict[str, Any]:
    """One of the TOML files beside this one."""
    return tomllib.loads(Path(__file__).with_name(file).read_text(encoding="utf-8"))


def topics_of(table: Mapping[str, Any]) -> tuple[Topic, ...]:
    kinds = ("subjects", "verbs", "objects", "places")
    return tuple(Topic(one["name"], *(tuple(one[kind]) for kind in kinds)) for one in table["topics"])


_WORDS = read("english.toml")
TOPICS = topics_of(_WORDS)

WORDS_PER_SENTENCE = 15  # about


def topic(rng: Random) -> Topic:
    return rng.choice(TOPICS)


def sentence(rng: Random, about: Topic) -> str:
    body = (
        f"{rng.choice(about.subjects)} {rng.choice(about.verbs)} {rng.choice(about.objects)} {rng.choice(about.places)}"
    )
    reason = (
        rng.choice(_WORDS["reasons"]).format(n=rng.randint(2, 90), year=rng.randint(1987, 2024))
        if rng.random() < 0.4
        else ""
    )
    text = f"{rng.choice(_WORDS['links'])}{body}{' ' + reason if reason else ''}."
    return text[0].upper() + text[1:]


def document(rng: Random, about: Topic, words: int) -> str:
    """At least one whole sentence, and as many as come nearest to `words` words."""
    sentences: list[str] = []
    count = 0
    while count < words - WORDS_PER_SENTENCE / 2:
        sentences.append(sentence(rng, about))
        count += len(sentences[-1].split())
    return " ".join(sentences)


def arithmetic(rng: Random) -> str:
    """A word problem."""
    who, other = rng.sample(_WORDS["names"], 2)
    goods = rng.choice(_WORDS["goods"])
    first, second, price = rng.randint(3, 40), rng.randint(2, 12), rng.randint(2, 9)
    return (
        f"{who} has {first} {goods} and buys {second} boxes of {price} more. {other} takes a third of them, rounded "
        f"down, and gives back {rng.randint(1, 5)}. How many {goods} does {who} have in the end?"
    )


def function(rng: Random, lines: int) -> str:
    """A small Python function of about `lines` lines, which may or may not be right."""
    name, argument = rng.choice(_WORDS["functions"]), rng.choice(_WORDS["variables"])
    body = [
        f"def {name}({argument}, limit={rng.randint(2, 50)}):",
        "    result = []",
        f"    for i, item in enumerate({argument}):",
    ]
    while len(body) < lines - 1:
        body.append(
            rng.choice(
                (
                    f"        if item {rng.choice(('<', '>', '==', '>='))} limit:",
                    f"            result.append(item {rng.choice('+-*')} {rng.randint(1, 9)})",
                    f"        limit = {rng.choice(('min', 'max'))}(limit, len({argument}) - i)",
                    f"        item = {argument}[i - {rng.randint(1, 3)}]",
                )
            )
        )
    return "\n".join([*body, f"    return {rng.choice(('result', 'len(result)', 'result[-1]', 'sorted(result)'))}"])


def errand(rng: Random) -> str:
    """A household task for an agent that walks through rooms."""
    room, target = rng.sample(_WORDS["rooms"], 2)
    return f"You are in the {room}. Your task is to put a {rng.choice(_WORDS['things'])} in the {target}."


def observation(rng: Random) -> str:
    """What the agent of an errand sees after a step."""
    first, second = rng.sample(_WORDS["things"], 2)
    return f"You arrive in the {rng.choice(_WORDS['rooms'])}. You see a {first}, a {second} and a closed drawer."
