"""Answers as far as two runs of the same request can agree.

Names and times differ. So does how many tokens came in one event of a stream: the engine puts together what is ready when it
gets round to sending. What all events say together is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

VOLATILE = {"id", "created", "created_at", "completed_at", "item_id", "sequence_number", "_request_id"}

Json = Any


def plain(answer: BaseModel | Json) -> Json:
    """What an answer says, without names and times."""
    if isinstance(answer, BaseModel):
        answer = answer.model_dump()
    if isinstance(answer, dict):
        return {name: plain(value) for name, value in answer.items() if name not in VOLATILE}
    if isinstance(answer, list):
        return [plain(value) for value in answer]
    return answer


def plain_events(events: Iterable[BaseModel]) -> list[Json]:
    """A stream of typed events, where deltas that follow each other are one."""
    told: list[Json] = []
    for event in map(plain, events):
        if told and "delta" in event and _kind(event) == _kind(told[-1]):
            told[-1] = _joined(told[-1], event)
        else:
            told.append(event)
    return told


def plain_chunks(chunks: Iterable[BaseModel]) -> Json:
    """A stream of completions: by choice all that was said of it, the usage, and what is the same in all chunks."""
    choices: dict[int, Json] = {}
    usages, others = [], []
    for chunk in map(plain, chunks):
        for choice in chunk.pop("choices"):
            index = choice["index"]
            choices[index] = _joined(choices[index], choice) if index in choices else choice
        if (usage := chunk.pop("usage")) is not None:
            usages.append(usage)
        if chunk not in others:
            others.append(chunk)
    return {"choices": choices, "usages": usages, "others": others}


def _kind(event: Json) -> tuple[Json, ...]:
    return event["type"], event.get("index"), event.get("output_index"), event.get("content_index")


def _joined(first: Json, second: Json) -> Json:
    """Texts and lists one after the other; of anything else the later, if there is one."""
    if isinstance(first, dict) and isinstance(second, dict):
        both = {name: _joined(first.get(name), second.get(name)) for name in first | second}
        return {**both, **{name: first[name] for name in ("type", "role") if first.get(name)}}
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    return first if second is None else second
