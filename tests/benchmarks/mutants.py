"""Mutation testing: which small changes of the code does no fast test notice?

    python -m tests.benchmarks.mutants gateway/flowcontrol/controller.py --sample 60

Each mutant is one change of a syntax tree: another operator, a number that is one more, a condition that is turned round, a
statement left out. It is compiled in a process forked from one that has loaded the libraries, and the tests of its module run
there until the first of them fails: that takes about a second, and writes nothing to the disk.

Prints one line of JSON for each mutant that survives, and one with the counts of each file. The mutants that no test can
notice, and why, are in docs/benchmarks/mutants.md. Constants of a module, texts, annotations and decorators are left alone: a
test that repeats them proves nothing.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

# Loaded before any mutant is forked. None of them loads the gateway, which each mutant loads anew.
LIBRARIES = [
    "pytest",
    "pytest_asyncio",
    "pytest_timeout",
    "hypothesis.stateful",
    "numpy",
    "prometheus_client",
    "pydantic",
]
LIBRARIES += ["engine.launcher", "engine.lab.tiny_model", "engine.link", "predictor.learned"]
# The tests that are to notice, of flow control; and those that come first, where they are not named for the module.
FLOW = ["controller", "settlement", "lives", "roots", "shares", "quotas", "engine_state", "concurrency", "estimate"]
FLOW += ["tool_waits", "machine"]
OWN = {"agents": ["roots", "lives"]}
# Seconds of processor time after which a mutant counts as noticed, and bytes that it may take: it has made a loop without end.
LIMIT_S, LIMIT_BYTES = 30, 4 * 2**30

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
CALCULATED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
CALCULATED |= {
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
SWAPPED = {"min": "max", "max": "min", "all": "any", "any": "all", "ceil": "floor"}


class Change(NamedTuple):
    line: int
    text: str  # of what is changed
    into: str
    make: Callable[[], None]


def changes(tree: ast.Module) -> Iterator[Change]:
    """All that can be changed in a module, one at a time."""
    left_alone = {
        id(part) for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        for made in (*getattr(node, "decorator_list", ()), *(node.keywords if isinstance(node, ast.ClassDef) else ())):
            left_alone |= {id(part) for part in ast.walk(made)}
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            left_alone |= {id(part) for part in ast.walk(node.returns)}
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            left_alone |= {id(part) for part in ast.walk(node.annotation)}
    for node in ast.walk(tree):
        if id(node) not in left_alone:
            line, text = getattr(node, "lineno", 0), ast.unparse(node).split("\n")[0] if hasattr(node, "lineno") else ""
            for into, make in _of(node):
                yield Change(line, text[:100], into, make)


def _of(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    match node:
        case ast.Compare():
            for place, op in enumerate(node.ops):
                other = COMPARED[type(op)]
                yield other.__name__, lambda place=place, other=other: node.ops.__setitem__(place, other())
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in CALCULATED:
            yield CALCULATED[type(op)].__name__, lambda: setattr(node, "op", CALCULATED[type(op)]())
        case ast.BoolOp(op=op):
            other = ast.Or if isinstance(op, ast.And) else ast.And
            yield other.__name__, lambda: setattr(node, "op", other())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "without it", lambda: setattr(node, "op", ast.UAdd())
        case ast.Constant(value=bool() as value):
            yield str(not value), lambda: setattr(node, "value", not value)
        case ast.Constant(value=int() | float() as value):
            yield str(value + 1), lambda: setattr(node, "value", value + 1)
        case ast.Call(func=ast.Name(id=name) as function) if name in SWAPPED:
            yield SWAPPED[name], lambda: setattr(function, "id", SWAPPED[name])
        case ast.Call(func=ast.Attribute(attr=name) as function) if name in SWAPPED:
            yield SWAPPED[name], lambda: setattr(function, "attr", SWAPPED[name])
        case ast.comprehension(ifs=[first, *_]):
            yield f"without `if {ast.unparse(first)}`", node.ifs.clear
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "return None", lambda: setattr(node, "value", ast.Constant(None))
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "not", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    bodies = (getattr(node, name, None) for name in ("body", "orelse", "finalbody"))
    for body in bodies if not isinstance(node, ast.Module | ast.ClassDef) else ():
        for place, line in enumerate(body if isinstance(body, list) else []):
            if _can_be_left_out(line):
                nothing = ast.copy_location(ast.Pass(), line)
                text = f"without `{ast.unparse(line).splitlines()[0][:80]}` in line {line.lineno}"
                yield text, lambda body=body, place=place, nothing=nothing: body.__setitem__(place, nothing)


def _can_be_left_out(line: ast.stmt) -> bool:
    if isinstance(line, ast.Expr):
        return not isinstance(line.value, ast.Constant)
    return isinstance(line, ast.Assign | ast.AugAssign | ast.Raise | ast.Delete | ast.Break | ast.Continue)


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from code that is not its file's."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, origin=str(self._path))
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


class Hasty:
    """A plugin of pytest: Hypothesis need not look for the smallest example that fails."""

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        settings.register_profile("hasty", settings(), phases=[Phase.explicit, Phase.generate])
        settings.load_profile("hasty")


def survives(path: Path, code: CodeType, tests: Sequence[str]) -> bool:
    """Whether all of these tests pass with this code in the place of the module's."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1] == 0
    status = 1
    try:
        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.meta_path.insert(0, Mutated(".".join(path.with_suffix("").parts), path, code))
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--timeout", str(LIMIT_S)]
        for part in (tests[:1], tests[1:]):  # else all of them would be collected first
            status = pytest.main([*options, *part], plugins=[Hasty()]) if part else 0
            if status:
                break
    finally:
        os._exit(int(status))


def tests_of(path: Path) -> list[str]:
    """The likeliest to notice come first."""
    if path.parts[1] == "tenancy":
        return ["tests/tenancy"]
    first = [name for name in OWN.get(path.stem, [path.stem]) if name in FLOW]
    names = dict.fromkeys((*first, *FLOW))
    return [f"tests/flowcontrol/test_{name}.py" for name in names]


def run(path: Path, sample: int, seed: int, only: int | None) -> None:
    source = path.read_text()
    total = len(list(changes(ast.parse(source))))
    chosen = sorted(random.Random(seed).sample(range(total), min(sample, total))) if only is None else [only]
    tests, began_s = tests_of(path), time.monotonic()
    if not survives(path, compile(source, path, "exec"), tests):
        raise SystemExit(f"{path}: its tests fail without a mutant")
    survivors = 0
    for number in chosen:
        tree = ast.parse(source)
        change = list(changes(tree))[number]
        change.make()
        code = compile(ast.fix_missing_locations(tree), path, "exec")
        if survives(path, code, tests):
            survivors += 1
            found = {"survivor": number, "file": str(path), "line": change.line, "of": change.text, "into": change.into}
            print(json.dumps(found), flush=True)
    counts = {"file": str(path), "mutants": total, "tried": len(chosen), "survived": survivors, "seed": seed}
    print(json.dumps({**counts, "seconds": round(time.monotonic() - began_s)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, default=60, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the mutant of this number alone")
    arguments = parser.parse_args()
    for name in LIBRARIES:
        importlib.import_module(name)
    for path in arguments.files:
        run(path, arguments.sample, arguments.seed, arguments.only)


if __name__ == "__main__":
    main()
