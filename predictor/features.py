"""What is known when a task arrives, as numbers.

One function, `row`, makes them: for serving, for replays, and for what models are trained on. A row is kept as it was made,
beside what came of the task, and models are trained on that; so training and serving cannot differ. `SCHEMA` names what the
columns are and how they are made: rows and models of another schema are not used.

A row has: the task itself (`sketch`), the agent's first task, how far the agent has come, what agents of its class did before
(`ladder.Ladder.history`), and what the ladder says. Lengths and costs are logarithms, what is not known is NaN.

Words are hashed, one and two at a time, into few columns (feature hashing: Weinberger et al., 2009), and only those at the
edges of a text: instructions stand at its beginning or end, and a prompt of megabytes takes no longer than one of some
thousand tokens.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from predictor.types import AgentProgress, TaskContent, TaskPrediction

Sketch: TypeAlias = NDArray[np.float32]
Row: TypeAlias = NDArray[np.float32]

EDGE_BYTES = 2048
TEXT_BUCKETS, SYSTEM_BUCKETS = 128, 32
CLASS_BITS = 12
VERSION = 1

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
    "items",
    "questions",
    "words",
    "digits",
    "symbols",
    "numbers",
    "first_number",
    "last_number",
    "largest_number",
)
SKETCH_COLUMNS = (
    *_LENGTHS,
    *_LEXICAL,
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
COLUMNS = (
    *(f"task_{name}" for name in SKETCH_COLUMNS),
    *(f"opening_{name}" for name in SKETCH_COLUMNS),
    *PROGRESS_COLUMNS,
    *HISTORY_COLUMNS,
    *GUESS_COLUMNS,
    *(f"class_bit_{i}" for i in range(CLASS_BITS)),
)
COLUMN = {name: place for place, name in enumerate(COLUMNS)}
SCHEMA = f"{VERSION}-{zlib.crc32(' '.join(COLUMNS).encode()):08x}"

# Small letters, digits and what is not ASCII; everything else separates words.
_WORDS = bytes(
    c | 0x20 if 0x41 <= c <= 0x5A else c if 0x61 <= c <= 0x7A or 0x30 <= c <= 0x39 or c >= 0x80 else 0x20
    for c in range(256)
)
_DIGITS = b"0123456789"
_SYMBOLS = b"{}[]()<>=;:+*/_#"
_NUMBER = re.compile(rb"(?<![\w.])\d{1,7}(?![\w.]*\d)")
_ITEM = re.compile(rb"\n\s*(?:[-*]|\d{1,3}[.):]) ")


def sketch(content: TaskContent) -> Sketch:
    """Of one task. Shape (len(SKETCH_COLUMNS),)."""
    made = np.zeros(len(SKETCH_COLUMNS), np.float32)
    text = _edges(content.text)
    words, hashes = _hashes(text)
    numbers = [int(number) for number in _NUMBER.findall(text)]
    size = max(1, len(text))
    made[: len(_LENGTHS) + len(_LEXICAL)] = (
        _log(content.prompt_bytes),
        _log(len(content.system)),
        _log(content.tool_bytes),
        min(content.tools, 1e6),
        _log(content.messages),
        math.nan if content.max_tokens is None else _log(content.max_tokens),
        _log(content.sequences),
        content.structured,
        _log(text.count(b"\n")),
        _log(len(_ITEM.findall(text))),
        _log(text.count(b"?")),
        _log(words),
        (size - len(text.translate(None, _DIGITS))) / size if text else 0.0,
        (size - len(text.translate(None, _SYMBOLS))) / size if text else 0.0,
        _log(len(numbers)),
        _log(numbers[0]) if numbers else math.nan,
        _log(numbers[-1]) if numbers else math.nan,
        _log(max(numbers)) if numbers else math.nan,
    )
    if words:
        made[-SYSTEM_BUCKETS - TEXT_BUCKETS : -SYSTEM_BUCKETS] = _count(hashes, TEXT_BUCKETS)
    if content.system:
        made[-SYSTEM_BUCKETS:] = _count(_hashes(content.system[:EDGE_BYTES])[1], SYSTEM_BUCKETS)
    return made


def row(progress: AgentProgress, history: tuple[float, ...], agent_guess: float, task_guess: TaskPrediction) -> Row:
    """Of a task that has arrived: `progress.latest`. history: `HISTORY_COLUMNS`. The guesses are the ladder's. Shape
    (len(COLUMNS),)."""
    assert progress.opening is not None and progress.latest is not None
    expected = progress.expected_tasks
    numbers = (
        _log(progress.tasks_arrived),
        _log(progress.tasks_ended),
        _log(progress.cost_arrived),
        _log(progress.cost_ended),
        _log(progress.returns),
        math.nan if expected is None else _log(expected),
        *history,
        _log(agent_guess),
        _log(task_guess.decode_tokens),
        *_class_bits(progress.agent_class),
    )
    return np.concatenate((progress.latest, progress.opening, np.array(numbers, np.float32)))


def is_kept(arrived: int) -> bool:
    """Whether the row of an agent's so-manieth task is kept for training: the first eight, then ever fewer."""
    if arrived <= 8:
        return True
    step = 1 << (arrived.bit_length() - 2)  # 9 to 16 by 4, 17 to 32 by 8, …
    return arrived % step == 0


def _log(value: float) -> float:
    """log(1 + x), with x bounded to what a float32 can tell apart."""
    return math.log1p(min(max(value, 0.0), 1e30))


def _edges(text: bytes) -> bytes:
    return text if len(text) <= 2 * EDGE_BYTES else text[:EDGE_BYTES] + b"\n" + text[-EDGE_BYTES:]


def _hashes(text: bytes) -> tuple[int, NDArray[np.uint32]]:
    """How many words, and the hashes of each and of each two that follow one another."""
    words = text.translate(_WORDS).split()
    single = np.fromiter(map(zlib.crc32, words), np.uint32, len(words))
    pairs = (single[:-1] * np.uint32(0x9E3779B1)) ^ single[1:]
    return len(words), np.concatenate((single, pairs))


def _count(hashes: NDArray[np.uint32], buckets: int) -> NDArray[np.float32]:
    # The upper bits: the lower ones of a sum of products are the poorer.
    places = (hashes * np.uint32(0x85EBCA6B)) >> np.uint32(32 - (buckets - 1).bit_length())
    return np.log1p(np.bincount(places, minlength=buckets)).astype(np.float32)


def _class_bits(agent_class: str | None) -> tuple[float, ...]:
    """A hash, so that a tree can tell classes apart that history alone does not. No class: NaN."""
    if agent_class is None:
        return (math.nan,) * CLASS_BITS
    code = zlib.crc32(agent_class.encode("utf-8", "surrogatepass"))
    return tuple(float(code >> bit & 1) for bit in range(CLASS_BITS))
