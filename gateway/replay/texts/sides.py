"""A side of the data (what is learned from, or what is held out), and the voice of one agent that speaks its words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from gateway.replay.texts.english import Topic

# How often an agent takes a wording that both sides know, where there are such.
COMMON_SHARE = 0.5

Wordings = Mapping[str, tuple[str, ...]]


def tool(name: str, description: str, /, **parameters: str) -> str:
    """A definition as clients send it, as JSON; `parameters`: types by name, all of them required."""
    properties = {each: {"type": kind} for each, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": [*parameters]}
    function = {"name": name, "description": description, "parameters": schema}
    return json.dumps({"type": "function", "function": function}, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Side:
    """`belongings` and `furniture` are those of a household; `tools`: definitions by class, as JSON; `wordings`: templates by
    what they say. Nothing in here stands on the other side too."""

    name: str
    topics: tuple[Topic, ...]
    belongings: tuple[str, ...]
    people: tuple[str, ...]
    goods: tuple[str, ...]
    furniture: tuple[str, ...]
    functions: tuple[str, ...]
    variables: tuple[str, ...]
    tools: Mapping[str, tuple[str, ...]]
    wordings: Wordings


@dataclass(slots=True)
class Voice:
    """One program writes all prompts of an agent: what it once worded in one way, it words in that way again."""

    rng: Random
    side: Side
    common: Wordings
    topic: Topic = field(init=False)
    _chosen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.topic = self.rng.choice(self.side.topics)

    def template(self, key: str) -> str:
        if key not in self._chosen:
            wordings = self.side.wordings[key]
            if key in self.common and self.rng.random() < COMMON_SHARE:
                wordings = self.common[key]
            self._chosen[key] = self.rng.choice(wordings)
        return self._chosen[key]

    def say(self, key: str, **values: object) -> str:
        return self.template(key).format(**values)

    def any(self, key: str) -> str:
        """One of the side's own, another each time."""
        return self.rng.choice(self.side.wordings[key])
