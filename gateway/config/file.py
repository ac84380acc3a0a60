"""The settings file: what it says, and where in it each name stands.

It is YAML 1.2: of the words, only `true` and `false` are truth values, and names are taken as they are written. What would pass
silently elsewhere is an error: a name that is there twice, a tag, something nested deeper than any setting is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gateway.config.problems import Name, Problem, dotted

# Deeper than any setting, and little enough for a file in which aliases refer to each other to stay small.
DEEPEST = 4
_CORE = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """With the core schema of YAML 1.2 (section 10.3.2); that of 1.1, which is PyYAML's, takes `no` and `12:30` for others."""


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern in {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"{_CORE}{_kind}", re.compile(rf"(?:{_pattern})$"), None)


@dataclass(slots=True)
class SettingsFile:
    """values: by name, as plain Python. problems: what makes it no file of settings, whatever the settings are."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _places: dict[Name, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> SettingsFile:
        file = cls(path)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            file._refuse((), (), f"cannot be read: {error.strerror}")
            return file
        except UnicodeDecodeError as error:
            file._refuse((error.object[: error.start].count(b"\n") + 1, 1), (), "is not UTF-8")
            return file
        file._parse(text)
        return file

    def problem(self, name: Name, what: str) -> Problem:
        """Something wrong with a name: where it stands, or what is nearest around it."""
        inner = name
        while inner and inner not in self._places:
            inner = inner[:-1]
        return Problem(str(self.path), dotted(name), what, self._places.get(inner, ()))

    def _parse(self, text: str) -> None:
        try:
            root = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = ", ".join(filter(None, (error.context, error.problem)))
            self._refuse(() if mark is None else _place(mark), (), f"this is not YAML: {what}")
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            place = (before.count("\n") + 1, error.position - before.rfind("\n"))
            self._refuse(place, (), f"this is not YAML: {error.reason}")
        except RecursionError:
            self._refuse((), (), "is nested deeper than any setting")
        else:
            if isinstance(root, yaml.MappingNode):
                self.values = self._mapping(root, ())
            elif root is not None and not (isinstance(root, yaml.ScalarNode) and root.tag.endswith(":null")):
                self._refuse(_place(root.start_mark), (), "must be settings, one a line: `name: value`")

    def _mapping(self, node: yaml.MappingNode, name: Name) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            place = _place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(place, name, "a name must be plain text")
                continue
            inner = (*name, key.value)
            if key.value in values:
                self._refuse(place, inner, f"is there twice, and first in line {self._places[inner][0]}")
                continue
            self._places[inner] = place
            values[key.value] = self._value(value, inner)
        return values

    def _value(self, node: yaml.Node, name: Name) -> Any:
        kind = node.tag.removeprefix(_CORE)
        match node:
            case yaml.ScalarNode() if kind in _SCALARS:
                try:
                    return _SCALARS[kind](node.value)
                except (ValueError, KeyError):
                    self._refuse(self._places[name], name, f"cannot be read as {kind}")
            case yaml.CollectionNode() if len(name) >= DEEPEST:
                self._refuse(self._places[name], name, "is nested deeper than any setting")
            case yaml.MappingNode() if kind == "map":
                return self._mapping(node, name)
            case yaml.SequenceNode() if kind == "seq":
                for number, item in enumerate(node.value):
                    self._places[*name, number] = _place(item.start_mark)
                return [self._value(item, (*name, number)) for number, item in enumerate(node.value)]
            case _:
                self._refuse(self._places[name], name, f"no tags are taken: {node.tag}")
        return None

    def _refuse(self, place: tuple[int, ...], name: Name, what: str) -> None:
        self.problems.append(Problem(str(self.path), dotted(name), what, place))


def _place(mark: yaml.Mark) -> tuple[int, int]:
    """Line and column, from 1."""
    return mark.line + 1, mark.column + 1


def _int(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


# They raise `ValueError`, or `KeyError`.
_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _int,
    "float": _float,
}
