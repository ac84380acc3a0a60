"""What is wrong with settings, and where, in words for people."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

Name = tuple[str | int, ...]  # ("tenants", "red", "weight")

_PLAIN = re.compile(r"[\w.+:/-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Problem:
    """where: a file, a variable of the environment, or a flag; empty if it is nowhere. name: of the setting, inside of that.
    place: line and column, in a file."""

    where: str
    name: str
    what: str
    place: tuple[int, ...] = ()

    def __str__(self) -> str:
        """`justitia.yaml:12:5: tenants.red.weight: must be greater than 0, not -1`."""
        where = ":".join(map(str, (self.where, *self.place)))
        return ": ".join(filter(None, (where, self.name, self.what)))


class Wrong(Exception):
    """All that is wrong with the settings."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def dotted(name: Name) -> str:
    return ".".join(map(str, name))


def did_you_mean(name: str, known: Collection[str]) -> str:
    """To be put after what is said of an unknown name."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def explain(
    error: ValidationError, known: Callable[[Name], Collection[str]], secret: Collection[str]
) -> Iterator[tuple[Name, str]]:
    """Each error, with the name it is about. known: the names that there are inside of one. secret: settings whose values are
    never shown."""
    for each in error.errors(include_url=False):
        name = tuple(part for part in each["loc"] if part != "[key]")
        shown = "" if name and name[0] in secret else f", not {_shown(each['input'])}"
        yield name, _what(each, name, shown, known)


def _what(error: ErrorDetails, name: Name, shown: str, known: Callable[[Name], Collection[str]]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return f"is not a setting{did_you_mean(str(name[-1]), known(name[:-1]))}"
        case "missing":
            return "is needed"
        case "value_error":  # our own words
            return error["msg"].removeprefix("Value error, ")
        case "int_parsing" | "int_from_float" | "int_type":
            return f"must be a whole number{shown}"
        case "float_parsing" | "float_type":
            return f"must be a number{shown}"
        case "bool_parsing" | "bool_type":
            return f"must be true or false{shown}"
        case "string_type" | "path_type":
            return f"must be text{shown}"
        case "string_pattern_mismatch":  # the only one is that of a tenant's name
            return "is no name for a tenant: 1 to 64 letters, digits and . _ -, the first a letter or digit"
        case "dict_type" | "model_type":
            return f"must be a mapping of names to values{shown}"
        case _:
            return error["msg"].replace("Input should", "must", 1).replace("String should", "must", 1) + shown


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
