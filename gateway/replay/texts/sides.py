"""A side of the data (the one to learn from, or the one held out), and the wording of one agent's prompts with its words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from gateway.replay.texts.english import TOPICS, Topic, read, topics_of

# How often an agent takes a wording that both sides know, where there are such.
COMMON_SHARE = 0.5

Wordings = Mapping[str, tuple[str, ...]]


def tool(name: str, description: str, /, **parameters: str) -> str:
    """A tool's definition as clients send it, as JSON. `parameters`: types by name, all of them required."""
    properties = {each: {"type": kind} for each, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": [*parameters]}
    function = {"name": name, "description": description, "parameters": schema}
    return json.dumps({"type": "function", "function": function}, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Side:
    """The words of one side. None of them is on the other side too."""

    name: str
    topics: tuple[Topic, ...]
    belongings: tuple[str, ...]  # of a household, as is the furniture
    people: tuple[str, ...]
    goods: tuple[str, ...]
    furniture: tuple[str, ...]
    functions: tuple[str, ...]
    variables: tuple[str, ...]
    tools: Mapping[str, tuple[str, ...]]  # definitions by class, as JSON
    wordings: Wordings  # templates by what they express


def _side(name: str, table: Mapping[str, Any]) -> Side:
    """A side's file: see `held_out.toml`. Without topics it has those of `english.toml`."""
    tools = {
        kind: tuple(tool(one["name"], one["description"], **one["parameters"]) for one in ones)
        for kind, ones in table["tools"].items()
    }
    return Side(
        name,
        topics=topics_of(table) if "topics" in table else TOPICS,
        tools=tools,
        wordings=_wordings(table),
        **{key: tuple(words) for key, words in table.items() if key not in ("topics", "tools", "wordings")},
    )


def _wordings(table: Mapping[str, Any]) -> Wordings:
    return {key: tuple(templates) for key, templates in table["wordings"].items()}


TRAIN, HELD_OUT = _side("train", read("train.toml")), _side("held-out", read("held_out.toml"))
COMMON = _wordings(read("common.toml"))


@dataclass(slots=True)
class Voice:
    """Words the prompts of one agent. One program writes them all, so the same thing is worded in the same way again."""

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
        """One of the side's own templates, drawn anew each time."""
        return self.rng.choice(self.side.wordings[key])
