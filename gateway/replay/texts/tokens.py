"""How many tokens a text has, on every machine the same.

No tokenizer is at hand in a replay. This counts as one with some 30,000 pieces does: short words are one token, long ones
several, digits come in threes, each mark of punctuation is one, and so is a run of spaces at the beginning of a line. English
has about four bytes per token, code and JSON about three.
"""

from __future__ import annotations

import re

_PIECE = re.compile(r"[^\W\d_]{1,6}|\d{1,3}|[^\w\s]|_+|\n[ \t]*")


def count_tokens(text: str) -> int:
    return len(_PIECE.findall(text))
