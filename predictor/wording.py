"""What the wording of a prompt says of the work: how many things there are to do, and how long an answer should be.

Both are said in short lines before and after the material; the words of the material are noise. So only those lines are read
(`instructions`), a bounded number of bytes from either end. The lists of words are plain English, and small: what they
mean for a class of agents is learned, and in another language they say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

EDGE_BYTES = 2048
# So much of lines that are at most so long, from either end.
INSTRUCTION_BYTES, LINE_BYTES = 384, 200
# A number is one of things to do in a still shorter sentence only: others tell a story.
COUNTING_BYTES = 72

# Small letters, digits and what is not ASCII; everything else separates words.
_WORDS = bytes(
    c | 0x20 if 0x41 <= c <= 0x5A else c if 0x61 <= c <= 0x7A or 0x30 <= c <= 0x39 or c >= 0x80 else 0x20
    for c in range(256)
)
_PART_OF = re.compile(rb"(?<![\w.])\d{1,4}\W{0,2}(?:/|\bof\b|\bout of\b)\W?(\d{1,4})(?!\w)")


def words(text: bytes) -> list[bytes]:
    return text.translate(_WORDS).split()


_NUMBERS = {
    word: number
    for number, word in enumerate(
        words(
            b"zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            b"seventeen eighteen nineteen"
        )
    )
}
_TENS = dict(zip(words(b"twenty thirty forty fifty sixty seventy eighty ninety"), range(20, 100, 10), strict=True))
_NUMBERS |= _TENS | {b"dozen": 12, b"hundred": 100}
# Numbers of sentences, but not of things.
_LOOSE = {b"a": 1, b"an": 1, b"single": 1, b"couple": 2, b"few": 3, b"several": 5}
_VAGUE = {
    word: level
    for level, line in enumerate(
        (
            b"few couple handful small",
            b"several some various",
            b"many lot lots large numerous great",
            b"huge enormous countless dozens hundreds largest",
        ),
        start=1,
    )
    for word in words(line)
}
# About how many words each is.
_UNITS = {b"word": 1, b"headline": 8, b"line": 12, b"bullet": 15, b"sentence": 20, b"paragraph": 80, b"page": 400}
_UNITS |= {unit + b"s": size for unit, size in _UNITS.items()}
_OF_AN_ANSWER = frozenset((b"words", b"sentences", b"paragraphs"))
# "These two versions" are not how many there are.
_POINTING = frozenset(words(b"these those the following both all next last first other"))
_BRIEF = frozenset(
    words(
        b"brief briefly short shortly shorter concise concisely terse tersely succinct succinctly compact quick quickly only "
        b"just single gist headline summary few nothing minimal minimum simply yes no"
    )
)
_THOROUGH = frozenset(
    words(
        b"detail details detailed thorough thoroughly complete completely full fully comprehensive exhaustive exhaustively "
        b"extensive extensively long length depth every all each everything explain explanation reasoning reason reasons "
        b"justify justified proof prove derivation step steps report examples example discuss elaborate"
    )
)
_DIGITS = frozenset(b"0123456789")
_DIGIT = re.compile(rb"[0-9]")
_TELLING = _BRIEF | _THOROUGH | _VAGUE.keys() | _NUMBERS.keys() | _LOOSE.keys()


class Said(NamedTuple):
    """counted: numbers of things ("seventeen files"); parts: m of "part n of m"; vague: levels, from 1 ("a few") to 4
    ("countless"); asked_words: lengths of the answer, in words ("in three sentences"); brief, thorough: how many words of
    each kind."""

    counted: list[int]
    parts: list[int]
    vague: list[int]
    asked_words: list[int]
    brief: int
    thorough: int


def edges(text: bytes) -> bytes:
    return text if len(text) <= 2 * EDGE_BYTES else text[:EDGE_BYTES] + b"\n" + text[-EDGE_BYTES:]


def instructions(text: bytes) -> bytes:
    """The short lines at both ends that begin with a letter or a digit; lists, code and tables do not. Without such lines, the
    first and the last bytes."""
    if len(text) <= 2 * INSTRUCTION_BYTES:
        return text
    lines = edges(text).split(b"\n")
    first = _short(lines)
    last = _short(reversed(lines))
    begin = [lines[place] for place in first] or [text[:LINE_BYTES]]
    taken = set(first)
    end = [lines[~place] for place in reversed(last) if len(lines) - 1 - place not in taken]
    if not last:
        end = [text[-LINE_BYTES:]]
    return b"\n".join(begin + end)


def _short(lines: Iterable[bytes]) -> list[int]:
    """Their places."""
    found, left = [], INSTRUCTION_BYTES
    for place, line in enumerate(lines):
        if len(line) <= LINE_BYTES and line[:1].isalnum():
            found.append(place)
            left -= len(line)
            if left < 0:
                break
    return found


def said(text: bytes) -> Said:
    """text: of `instructions`."""
    has_digits = _DIGIT.search(text) is not None
    found = Said([], [int(part) for part in _PART_OF.findall(text)] if has_digits else [], [], [], 0, 0)
    brief = thorough = 0
    for line in text.split(b"\n"):
        for sentence in line.split(b". ") if len(line) > COUNTING_BYTES else (line,):
            spoken = words(sentence)
            if not has_digits and _TELLING.isdisjoint(spoken):
                continue
            counting = len(sentence) <= COUNTING_BYTES
            for place, word in enumerate(spoken):
                if word not in _TELLING and word[0] not in _DIGITS:
                    continue
                brief += word in _BRIEF
                thorough += word in _THOROUGH
                if counting and word in _VAGUE:
                    found.vague.append(_VAGUE[word])
                number = _number(spoken, place)
                if number is not None:
                    _read(found, spoken, place, number, counting)
    return found._replace(brief=brief, thorough=thorough)


def _number(spoken: list[bytes], place: int) -> int | None:
    word = spoken[place]
    if word in _NUMBERS:
        tens = _TENS.get(spoken[place - 1], 0) if place and word not in _TENS else 0
        return tens + _NUMBERS[word]
    if word in _LOOSE:
        return _LOOSE[word]
    # What `int` would take is more than ASCII's digits.
    return int(word) if len(word) < 6 and word.isascii() and word.isdigit() else None


def _read(found: Said, spoken: list[bytes], place: int, number: int, counting: bool) -> None:
    """What a number is of: one of the next two words."""
    pointed_at = place > 0 and spoken[place - 1] in _POINTING
    of_things = counting and number > 1 and spoken[place] not in _LOOSE and not pointed_at
    for noun in spoken[place + 1 : place + 3]:
        if noun in _UNITS:
            found.asked_words.append(number * _UNITS[noun])
        if of_things and len(noun) > 3 and noun.endswith(b"s") and noun not in _OF_AN_ANSWER:
            found.counted.append(number)
            break
