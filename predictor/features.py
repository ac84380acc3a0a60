"""What is known when a task arrives, as numbers.

One function, `row`, makes them: for serving, for replays, and for what models are trained on. A row is kept as it was made,
beside what came of the task, and models are trained on that; so training and serving cannot differ. `SCHEMA` names what the
columns are and how they are made: rows and models of another schema are not used.

A row has: the task itself (`sketch`), the agent's first task, how far the agent has come, what agents of its class did before
(`ladder.Ladder.history`), what the ladder says, and how the agent differs from its class. Lengths and costs are logarithms,
what is not known is NaN.

Of a text, what its instructions say is read (`wording`), and their words are hashed into few columns (feature hashing:
Weinberger et al., 2009). Of a prompt of megabytes only the edges are looked at: it takes no longer than one of some thousand
tokens.
"""

from __future__ import annotations

import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from predictor.types import AgentProgress, Sketch, TaskContent, TaskPrediction
from predictor.wording import EDGE_BYTES, edges, instructions, said, words

Row: TypeAlias = NDArray[np.float32]

TEXT_BUCKETS, SYSTEM_BUCKETS = 128, 32
CLASS_BITS = 12
# Of words that are remembered: crc32 takes longer than to look one up.
MOST_HASHES = 2**13
VERSION = 2

_LENGTHS = (
    "prompt_bytes",
    "system_bytes",
    "tool_bytes",
    "tools",
    "messages",
    "max_tokens",
    "sequences",
    "structured",
)
_LEXICAL = (
    "lines",
    "items",  # of lists
    "questions",
    "spaces",
    "digits",
    "symbols",
    "largest_number",
    "counted",
    "parts",
    "vague",
    "asked_words",
    "brief",
    "thorough",
    "system_brief",
    "system_thorough",
)
PLAIN_COLUMNS = (*_LENGTHS, *_LEXICAL)
SKETCH_COLUMNS = (
    *PLAIN_COLUMNS,
    *(f"text_{i}" for i in range(TEXT_BUCKETS)),
    *(f"system_{i}" for i in range(SYSTEM_BUCKETS)),
)
PROGRESS_COLUMNS = ("tasks_arrived", "tasks_ended", "cost_arrived", "cost_ended", "returns", "expected_tasks")
HISTORY_COLUMNS = (
    "class_agents",
    "class_cost",
    "class_cost_sd",
    "class_tasks",
    "class_decode",
    "class_decode_sd",
    "class_prompt_bytes",
    "class_growth",
)
GUESS_COLUMNS = ("agent_guess", "decode_guess")
# things: how many the opening says there are to do. The others are differences to the mean of the class: they mean the same in
# every class, so that what one teaches holds for the others.
RELATIVE_COLUMNS = ("things", "things_relative", "expected_relative", "prompt_relative", "arrived_relative")
COLUMNS = (
    *(f"task_{name}" for name in SKETCH_COLUMNS),
    *(f"opening_{name}" for name in PLAIN_COLUMNS),
    *PROGRESS_COLUMNS,
    *HISTORY_COLUMNS,
    *GUESS_COLUMNS,
    *RELATIVE_COLUMNS,
    *(f"class_bit_{i}" for i in range(CLASS_BITS)),
)
COLUMN = {name: place for place, name in enumerate(COLUMNS)}
SCHEMA = f"{VERSION}-{zlib.crc32(' '.join(COLUMNS).encode()):08x}"

_FIRST_TEXT = len(PLAIN_COLUMNS)
_PROMPT_BYTES = PLAIN_COLUMNS.index("prompt_bytes")
_TELLING = tuple(PLAIN_COLUMNS.index(name) for name in ("parts", "items", "counted"))

_SYMBOLS = b"{}[]()<>=;:+*/_#"
_KINDS = bytes(0x30 if 0x30 <= c <= 0x39 else 0x23 if c in _SYMBOLS else 0x20 for c in range(256))
_NUMBER = re.compile(rb"(?<![\w.])\d{1,7}(?![\w.]*\d)")
# Not `\s*` after the line's end: over empty lines that takes time by the square of their number.
_ITEM = re.compile(rb"\n[^\S\n]*(?:[-*]|\d{1,3}[.):]) ")


def sketch(content: TaskContent) -> Sketch:
    """Of one task; `columns_of` has it as columns."""
    text, instructing = edges(content.text), instructions(content.text)
    asked, (brief, thorough, system_words) = said(instructing), _of_system(instructions(content.system))
    kinds, log1p = text.translate(_KINDS), math.log1p
    digits = kinds.count(b"0")
    plain = (
        log1p(content.prompt_bytes),
        log1p(len(content.system)),
        log1p(content.tool_bytes),
        min(content.tools, 1e6),
        log1p(content.messages),
        math.nan if content.max_tokens is None else log1p(content.max_tokens),
        log1p(content.sequences),
        content.structured,
        log1p(text.count(b"\n")),
        log1p(len(_ITEM.findall(text))),
        log1p(text.count(b"?")),
        log1p(text.count(b" ")),
        digits / max(1, len(text)),
        kinds.count(b"#") / max(1, len(text)),
        _log_of_largest([int(number) for number in _NUMBER.findall(instructing)]) if digits else math.nan,
        _log_of_largest(asked.counted),
        _log_of_largest(asked.parts),
        max(asked.vague, default=math.nan),
        _log_of_largest(asked.asked_words),
        asked.brief,
        asked.thorough,
        brief,
        thorough,
    )
    return Sketch(array("f", plain).tobytes(), _hashed(instructing, TEXT_BUCKETS, _FIRST_TEXT) + system_words)


def columns_of(sketch: Sketch) -> Row:
    """Shape (len(SKETCH_COLUMNS),)."""
    made = np.zeros(len(SKETCH_COLUMNS), np.float32)
    made[:_FIRST_TEXT] = np.frombuffer(sketch.plain, np.float32)
    pairs = np.frombuffer(sketch.words, np.uint16)
    made[pairs[0::2]] = _LOGS[pairs[1::2]]
    return made


def numbers(
    progress: AgentProgress, history: tuple[float, ...], agent_guess: float, task_guess: TaskPrediction
) -> bytes:
    """What the row of a task has besides sketches, as float32. progress: with the task. history: `HISTORY_COLUMNS`. The guesses
    are the ladder's."""
    opening, latest = progress.opening, progress.latest
    assert opening is not None and latest is not None
    _, class_cost, _, class_tasks, _, _, class_prompt_bytes, _ = history
    arrived, things = _log(progress.cost_arrived), _things(opening)
    expected = math.nan if progress.expected_tasks is None else _log(progress.expected_tasks)
    values = (
        _log(progress.tasks_arrived),
        _log(progress.tasks_ended),
        arrived,
        _log(progress.cost_ended),
        _log(progress.returns),
        expected,
        *history,
        _log(agent_guess),
        _log(task_guess.decode_tokens),
        things,
        things - class_tasks,
        expected - class_tasks,
        memoryview(latest.plain).cast("f")[_PROMPT_BYTES] - class_prompt_bytes,
        arrived - class_cost,
        *_class_bits(progress.agent_class),
    )
    return array("f", values).tobytes()


def row(sketch: Sketch, opening: Sketch, numbers: bytes) -> Row:
    """Of a task: its sketch, that of its agent's first task, and its `numbers`. Shape (len(COLUMNS),)."""
    return np.concatenate(
        (columns_of(sketch), np.frombuffer(opening.plain, np.float32), np.frombuffer(numbers, np.float32))
    )


def is_kept(arrived: int) -> bool:
    """Whether a row is kept for training, that of its agent's first task being number 1: the first eight, then ever fewer."""
    if arrived <= 8:
        return True
    step = 1 << (arrived.bit_length() - 2)  # 9 to 16 by 4, 17 to 32 by 8, …
    return arrived % step == 0


def _log(value: float) -> float:
    """log(1 + x), with x bounded to what a float32 can tell apart."""
    return math.log1p(min(max(value, 0.0), 1e30))


def _things(opening: Sketch) -> float:
    """The surest of what is said: the total of numbered parts, a list, a number. NaN if none is."""
    plain = memoryview(opening.plain).cast("f")
    parts, items, counted = (plain[place] for place in _TELLING)
    if not math.isnan(parts):
        return parts
    return items if items > _log(1) else counted


def _log_of_largest(values: Sequence[int]) -> float:
    return _log(max(values)) if values else math.nan


@lru_cache(1024)
def _of_system(instructing: bytes) -> tuple[int, int, bytes]:
    """brief, thorough, and its words, hashed. Agents of a class have one system prompt, so it is remembered."""
    always = said(instructing)
    return always.brief, always.thorough, _hashed(instructing, SYSTEM_BUCKETS, _FIRST_TEXT + TEXT_BUCKETS)


class _Hashes(dict[bytes, int]):
    """Of words, those that were asked for lately."""

    def __missing__(self, word: bytes) -> int:
        if len(self) >= MOST_HASHES:
            self.clear()
        made = self[word] = zlib.crc32(word) * 0x85EBCA6B & 0xFFFFFFFF
        return made


_hash = _Hashes()
_LOGS = np.array([math.log1p(count) for count in range(2 * EDGE_BYTES)], np.float32)


def _hashed(text: bytes, buckets: int, first: int) -> bytes:
    """The buckets that its words fall into, and how often, as `Sketch.words` has them. first: the column of the first one."""
    shift = 32 - (buckets - 1).bit_length()
    pairs = array("H")
    # The upper bits of a product: the best mixed ones.
    for place, count in Counter([_hash[word] >> shift for word in words(text)]).items():
        pairs.append(first + place)
        pairs.append(count)
    return pairs.tobytes()


def _class_bits(agent_class: str | None) -> tuple[float, ...]:
    """A hash, so that a tree can tell classes apart that history alone does not. No class: NaN."""
    if agent_class is None:
        return (math.nan,) * CLASS_BITS
    code = zlib.crc32(agent_class.encode("utf-8", "surrogatepass"))
    return tuple(float(code >> bit & 1) for bit in range(CLASS_BITS))
