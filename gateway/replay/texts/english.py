"""Plain English for the demo's prompts, made of templates and word lists.

All randomness comes from the generator that is passed in, so the same seed writes the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Topic:
    """The words that one document draws from. Subjects are followed by a verb in the past tense."""

    name: str
    subjects: tuple[str, ...]
    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    places: tuple[str, ...]


TOPICS = (
    Topic(
        "the tram line",
        ("the transit office", "a night crew", "the signal team", "the contractor", "most drivers"),
        ("replaced", "inspected", "rerouted", "postponed", "paid for", "complained about"),
        (
            "the worn switches",
            "two kilometres of rail",
            "the evening service",
            "a stretch of overhead wire",
            "the new platforms",
        ),
        ("near the harbour", "below the old bridge", "at the northern depot", "along the market street"),
    ),
    Topic(
        "the orchard cooperative",
        ("the growers", "a visiting agronomist", "the packing house", "three families", "the board"),
        ("harvested", "sorted", "insured", "gave up", "sold", "replanted"),
        ("the late apples", "half of the plum trees", "a cold store", "the lower terraces", "forty crates of pears"),
        ("in the valley", "on the west slope", "after the hail", "before the first frost"),
    ),
    Topic(
        "the regional hospital",
        ("the ward sisters", "the pharmacy", "a working group", "the head surgeon", "the night shift"),
        ("reviewed", "shortened", "questioned", "introduced", "measured", "dropped"),
        (
            "the handover notes",
            "the waiting list",
            "a second checklist",
            "the visiting hours",
            "the order of the rounds",
        ),
        ("on the third floor", "in the emergency wing", "during the winter", "at the weekly meeting"),
    ),
    Topic(
        "the flood defence",
        ("the engineers", "a local council", "the water board", "volunteers", "the insurers"),
        ("raised", "mapped", "tested", "financed", "abandoned", "repaired"),
        ("the eastern dike", "a row of pumps", "the overflow basin", "the warning sirens", "six hundred sandbags"),
        ("upstream of the mill", "where the river bends", "within a week", "at high water"),
    ),
    Topic(
        "the town museum",
        ("the curator", "a retired teacher", "the restorers", "the students", "an anonymous donor"),
        ("catalogued", "lent out", "cleaned", "photographed", "returned", "disputed"),
        (
            "the clock collection",
            "a fishing boat",
            "the letters of a sailor",
            "two landscape paintings",
            "the model railway",
        ),
        ("in the attic", "for the summer show", "behind the main hall", "with great care"),
    ),
    Topic(
        "the wind farm",
        ("the operator", "a survey ship", "the grid company", "the maintenance crew", "the fishermen"),
        ("stopped", "recalibrated", "opposed", "connected", "extended", "watched"),
        (
            "the oldest turbines",
            "a damaged cable",
            "the second building phase",
            "the bearing sensors",
            "a storage battery",
        ),
        ("off the coast", "in calm weather", "under a new permit", "over two seasons"),
    ),
)

WORDS_PER_SENTENCE = 15  # about

_LINKS = (
    "",
    "",
    "",
    "Meanwhile ",
    "Later ",
    "By then ",
    "In spring ",
    "According to the minutes, ",
    "To everyone's surprise ",
)
_REASONS = (
    "because the budget had run out",
    "although nobody had asked for it",
    "so that the work could be finished in time",
    "which cost about {n} thousand more than planned",
    "and {n} people signed a letter about it",
    "after {n} days of talks",
    "as the report of {year} had advised",
)
_NAMES = ("Ines", "Tobias", "Mara", "Anselm", "Yusuf", "Greta", "Pavel", "Lior", "Noemi", "Arvid")
_GOODS = ("pears", "tickets", "notebooks", "tiles", "lamps", "candles", "tins of paint", "seedlings")
_PLACES = ("hall", "garden", "cellar", "kitchen", "workshop", "study", "pantry", "corridor")
_THINGS = (
    "brass key",
    "blue mug",
    "torn map",
    "desk lamp",
    "wooden spoon",
    "folded shirt",
    "bar of soap",
    "ripe apple",
)
_FUNCTIONS = ("total", "merge_rows", "find_gap", "normalise", "count_runs", "split_batch", "window", "rank_items")
_VARIABLES = ("values", "rows", "items", "counts", "lengths", "names", "marks")


def topic(rng: Random) -> Topic:
    return rng.choice(TOPICS)


def sentence(rng: Random, about: Topic) -> str:
    body = (
        f"{rng.choice(about.subjects)} {rng.choice(about.verbs)} {rng.choice(about.objects)} {rng.choice(about.places)}"
    )
    reason = (
        rng.choice(_REASONS).format(n=rng.randint(2, 90), year=rng.randint(1987, 2024)) if rng.random() < 0.4 else ""
    )
    text = f"{rng.choice(_LINKS)}{body}{' ' + reason if reason else ''}."
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
    who, other = rng.sample(_NAMES, 2)
    goods = rng.choice(_GOODS)
    first, second, price = rng.randint(3, 40), rng.randint(2, 12), rng.randint(2, 9)
    return (
        f"{who} has {first} {goods} and buys {second} boxes of {price} more. {other} takes a third of them, rounded "
        f"down, and gives back {rng.randint(1, 5)}. How many {goods} does {who} have in the end?"
    )


def function(rng: Random, lines: int) -> str:
    """A small Python function of about `lines` lines, which may or may not be right."""
    name, argument = rng.choice(_FUNCTIONS), rng.choice(_VARIABLES)
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
    room, target = rng.sample(_PLACES, 2)
    return f"You are in the {room}. Your task is to put a {rng.choice(_THINGS)} in the {target}."


def observation(rng: Random) -> str:
    """What the agent of an errand sees after a step."""
    first, second = rng.sample(_THINGS, 2)
    return f"You arrive in the {rng.choice(_PLACES)}. You see a {first}, a {second} and a closed drawer."
