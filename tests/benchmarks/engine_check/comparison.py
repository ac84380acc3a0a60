"""What is the same in two engines' answers, what differs, and what was a tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.benchmarks.engine_check.answers import Answer, Token
from tests.benchmarks.engine_check.requests import Case

# In log probability. Ten times what rounding in float32 was seen to do, and a hundredth of what most gaps are.
TIE = 1e-4
# The same on a GPU, where rounding was seen to do 2e-4.
TIE_GPU = 1e-3
# vLLM's log probability of a token that is not allowed is -9999.
NO_OTHER = 1000.0


@dataclass(slots=True)
class Tally:
    """Of one kind. `differing`: choices that part where it was no tie, or of which one is longer."""

    tie: float = TIE  # the largest gap that rounding may have closed
    requests: int = 0
    choices: int = 0
    tokens: int = 0  # compared and found equal
    tokens_after_ties: int = 0  # not compared: after a tie the texts are different ones
    ties: int = 0
    differing: int = 0
    rounding: float = 0.0  # the largest difference of one token's log probability
    smallest_gap: float = float("inf")  # between the two best of any token

    def add(self, case: Case, one: Answer, other: Answer) -> None:
        self.requests += 1
        if len(one.choices) != len(other.choices):
            self.differing += 1
        for mine, yours in zip(one.choices, other.choices, strict=False):
            self.choices += 1
            self._add_choice(mine, yours, whole=not case.leave_after)

    def _add_choice(self, one: list[Token], other: list[Token], *, whole: bool) -> None:
        for position, (mine, yours) in enumerate(zip(one, other, strict=False)):
            if mine.id != yours.id:
                if max(mine.gap, yours.gap) <= self.tie:
                    self.ties += 1
                    self.tokens_after_ties += len(one) - position
                else:
                    self.differing += 1
                return
            self.tokens += 1
            self.rounding = max(self.rounding, abs(mine.logprob - yours.logprob))
            self.smallest_gap = min(self.smallest_gap, mine.gap)
        # Who leaves may have seen more of one stream than of the other.
        if whole and len(one) != len(other):
            self.differing += 1

    def figures(self) -> dict[str, Any]:
        figures = asdict(self)
        del figures["tie"]
        figures["rounding"] = float(f"{self.rounding:.2g}")
        # Where one token alone was allowed there is no other.
        figures["smallest_gap"] = float(f"{self.smallest_gap:.2g}") if self.smallest_gap < NO_OTHER else None
        return figures


@dataclass(slots=True)
class Comparison:
    tie: float = TIE
    kinds: dict[str, Tally] = field(default_factory=dict)

    def add(self, cases: Sequence[Case], one: Sequence[Answer], other: Sequence[Answer]) -> None:
        for case, mine, yours in zip(cases, one, other, strict=True):
            self.kinds.setdefault(case.kind, Tally(self.tie)).add(case, mine, yours)

    @property
    def choices(self) -> int:
        return sum(tally.choices for tally in self.kinds.values())

    @property
    def tokens(self) -> int:
        return sum(tally.tokens for tally in self.kinds.values())

    @property
    def ties(self) -> int:
        return sum(tally.ties for tally in self.kinds.values())

    @property
    def differing(self) -> int:
        return sum(tally.differing for tally in self.kinds.values())

    def figures(self) -> dict[str, Any]:
        kinds = {kind: tally.figures() for kind, tally in sorted(self.kinds.items())}
        return {"tokens": self.tokens, "ties": self.ties, "differing": self.differing, "kinds": kinds}


def moved(one: Answer, other: Answer, tie: float = TIE) -> bool:
    """Whether any token, or its log probability by more than rounding, is another one."""
    pairs = [
        (a, b)
        for mine, yours in zip(one.choices, other.choices, strict=True)
        for a, b in zip(mine, yours, strict=False)
    ]
    return any(a.id != b.id or abs(a.logprob - b.logprob) > tie for a, b in pairs)
