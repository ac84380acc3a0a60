"""What is read out of a prompt's wording, and what is taken for material."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.wording import INSTRUCTION_BYTES, LINE_BYTES, instructions, said

MATERIAL = b"The ferry of nineteen chapters sails through forty harbours and never in one sentence only. " * 60


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("There are seventeen files.", [17]),
        ("We have 120 documents.", [120]),
        ("It is about twenty-five small claims.", [25]),
        ("Merge these two versions.", []),
        ("Answer in three sentences.", []),
        ("Name one thing.", []),
        ("A few pages.", []),
        (f"As the chronicle of the town says, the {'old ' * 12}mayor sold forty crates to the neighbours.", []),
        ("１２ files, ²³ files", []),
    ],
)
def test_numbers_of_things(text: str, counted: list[int]) -> None:
    assert said(text.encode()).counted == counted


@pytest.mark.parametrize(
    ("text", "parts"),
    [("Part 2 of 17", [17]), ("File 3/40:", [40]), ("no. 3 (of 12)", [12]), ("1 out of 9", [9]), ("v1.2/3.4", [])],
)
def test_numbered_parts(text: str, parts: list[int]) -> None:
    assert said(text.encode()).parts == parts


@pytest.mark.parametrize(
    ("text", "asked"),
    [("In 300 words.", [300]), ("One sentence.", [20]), ("A short paragraph.", [80]), ("Two pages, please", [800])],
)
def test_asked_lengths(text: str, asked: list[int]) -> None:
    assert said(text.encode()).asked_words == asked


def test_brief_and_thorough_words_and_vague_numbers() -> None:
    found = said(
        b"Be brief: only the gist.\nExplain every step in detail.\nThere are many of them, even countless ones."
    )
    assert (found.brief, found.thorough, found.vague) == (3, 4, [3, 4])


def test_instructions_are_the_short_lines_at_both_ends() -> None:
    text = (
        b"Summarise this.\n\nThere are seventeen files.\n\n"
        + MATERIAL
        + b"\n- a list\n    code(12)\n\nIn three sentences."
    )
    assert instructions(text) == b"Summarise this.\nThere are seventeen files.\nIn three sentences."


def test_no_line_is_taken_twice() -> None:
    lines = [
        f"Line {number} of the whole text, which is not short, but has no material either.".encode()
        for number in range(11)
    ]
    assert instructions(b"\n".join(lines)).split(b"\n") == lines
    assert len(b"\n".join(lines)) > 2 * INSTRUCTION_BYTES


def test_without_lines_the_first_and_the_last_bytes_are_taken() -> None:
    text = b"Summarise: " + MATERIAL + b"In one line."
    assert instructions(text) == text[:LINE_BYTES] + b"\n" + text[-LINE_BYTES:]


@given(st.binary(max_size=3000) | st.text(max_size=1000).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_can_be_read(text: bytes) -> None:
    chosen = instructions(text)
    assert len(chosen) <= 2 * (INSTRUCTION_BYTES + LINE_BYTES) + 20
    assert all(number >= 0 for numbers in said(chosen)[:4] for number in numbers)  # type: ignore[union-attr]
