"""What the prompts are about: documents, records, code, equations, sums and rooms, in the words of a side."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from gateway.replay.texts.english import Topic, document, sentence
from gateway.replay.texts.sides import Voice
from gateway.replay.texts.tokens import count_tokens

# Of the documents of `gateway.replay.texts.english`, measured.
TOKENS_PER_WORD = 1.33

# fmt: off
_IN_WORDS = {
    1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten",
    11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen", 18: "eighteen", 20: "twenty",
    25: "twenty-five", 30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety",
    100: "a hundred", 120: "a hundred and twenty", 150: "a hundred and fifty",
}
# fmt: on
# Numbers that are written in words.
SAID = tuple(_IN_WORDS)


def spelled(rng: Random, number: int) -> str:
    """One of `SAID`, in words."""
    if number == 12 and rng.random() < 0.5:
        return "a dozen"
    return _IN_WORDS[number]


def prose(rng: Random, about: Topic, tokens: float) -> str:
    return document(rng, about, round(tokens / TOKENS_PER_WORD))


def title(rng: Random, about: Topic) -> str:
    name = f"{rng.choice(about.objects)} {rng.choice(about.places)}"
    return name[0].upper() + name[1:]


def record(rng: Random, about: Topic, tokens: float) -> str:
    """Entries of a knowledge base, one a line."""
    return _lines(
        lambda: f"({rng.choice(about.subjects)}; {rng.choice(about.verbs)}; {rng.choice(about.objects)})", tokens
    )


def claim(rng: Random, about: Topic, parts: int) -> str:
    return " Also: ".join(sentence(rng, about) for _ in range(parts))


def equation(rng: Random, hard: int) -> str:
    """Of the first, second or third degree, or a system of three."""

    def terms(names: list[str]) -> str:
        summed = " ".join(f"{rng.choice('+-')} {rng.randint(2, 19)}{name}" for name in names)
        return f"{summed[0].strip('+')}{summed[2:]}"

    if hard == 3:
        return ", ".join(f"{terms(['x', 'y', 'z'])} = {rng.randint(1, 60)}" for _ in range(3))
    powers = ["x^3", "x^2", "x"][2 - hard :]
    return f"{terms(powers)} {rng.choice('+-')} {rng.randint(1, 60)} = 0"


def problem(voice: Voice, hard: int) -> str:
    """A sum as a story; the harder, the longer."""
    rng, side = voice.rng, voice.side
    who, other = rng.sample(side.people, 2)
    goods = rng.choice(side.goods)
    told = [
        voice.any("line/problem").format(who=who, other=other, goods=goods, n=rng.randint(3, 40), k=rng.randint(2, 9))
        for _ in range(2 + 2 * hard + rng.randint(0, 2))
    ]
    return " ".join([*told, voice.any("end/problem").format(who=who, other=other, goods=goods)])


def code(voice: Voice, tokens: float) -> str:
    rng, side = voice.rng, voice.side
    variable = rng.choice(side.variables)
    head = f"def {rng.choice(side.functions)}({variable}, limit={rng.randint(2, 50)}):"
    body = _lines(lambda: voice.any("line/code").format(v=variable, n=rng.randint(2, 99)), tokens - 14)
    return f"{head}\n{body}\n    return {variable}"


def errand(voice: Voice, tokens: float) -> str:
    """An example of how it is done: actions, and what was seen after each."""
    return _lines(lambda: f"{household(voice, 'done')}\n{household(voice, 'seen')}", tokens)


def thoughts(voice: Voice, tokens: float) -> str:
    return _lines(lambda: household(voice, "thought"), tokens)


def household(voice: Voice, key: str) -> str:
    """A sentence about what is in the house."""
    place, other = voice.rng.sample(voice.side.furniture, 2)
    return voice.any(key).format(place=place, other=other, thing=voice.rng.choice(voice.side.belongings))


def _lines(line: Callable[[], str], tokens: float) -> str:
    lines = [line()]
    left = tokens - count_tokens(lines[0])
    while left > 0:
        lines.append(line())
        left -= count_tokens(lines[-1]) + 1
    return "\n".join(lines)
