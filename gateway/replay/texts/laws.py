"""The laws: what a text implies for the lengths and the number of its agent's tasks. Both sides obey the same.

Medians of tasks and outputs are those of `agent_types.PAPER_TYPES`; here is what moves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Depth = Literal["verdict", "answer", "prose", "thought"]
Telling = Literal["list", "of", "number", "vague", "silent"]
LEVELS = 4

# What the text does not express, as sigmas of log-normal noise: the output of one task; what all outputs of an agent have
# in common; the number of tasks, where the text implies it, and where it is silent.
TASK_SIGMA = 0.25
AGENT_SIGMA = 0.12
TASKS_SIGMA = 0.15
SILENT_SIGMA = 0.5

# What the text does express varies between agents of a class: the implied number of tasks, and the length of the material (of
# an agent's at the median; of its single pieces).
WIDTH_SIGMA = 0.28
MATERIAL_SIGMA, PIECE_SIGMA = 0.25, 0.2
# The manner of an application, in its system prompt: terse, plain, thorough. A factor on outputs.
MANNERS = (0.9, 1.0, 1.2)
# How the first prompt expresses the number: a list of the things, 'thing 1 of 17', a number in words, 'quite a few',
# or not at all.
TELLING: dict[Telling, float] = {"list": 0.28, "of": 0.2, "number": 0.22, "vague": 0.18, "silent": 0.12}
# 'Quite a few' is what it is for the class: factors on its median.
VAGUE = (0.6, 0.85, 1.2, 1.7)
LONGEST_LIST = 30
# Share of agents whose client sends how many tasks to expect, within a fifth.
EXPECTING = 1 / 3


@dataclass(frozen=True, slots=True)
class Law:
    """What the text of one class implies."""

    depth: Depth
    material: float  # median tokens of the document, code or example in a prompt
    depths: tuple[float, ...]  # factors on outputs for what is asked for, from terse to exhaustive
    reads: float = 0.0  # outputs grow with (material / median) to this power
    hard: tuple[float, ...] = (1.0,)  # factors on outputs for difficulty, from easy to hard
    tasks_per_thing: float = 1.0  # tasks for each of the things that the text counts
    max_tokens: int | None = None  # that all clients of the class send


# fmt: off
LAWS = {
    "equation-verification": Law("verdict", 200, (0.80, 0.86, 1.05, 1.45), hard=(0.85, 0.95, 1.05, 1.30)),
    "fact-verification":     Law("verdict", 430, (0.76, 0.84, 1.10, 1.60), reads=0.2, hard=(0.90, 1.10), max_tokens=512),
    "kbqa-verification":     Law("verdict", 190, (0.76, 0.84, 1.05, 1.60), hard=(0.80, 0.95, 1.45)),
    "alfworld":              Law("thought", 140, (0.74, 0.82, 1.05, 1.55), max_tokens=256),
    "code-checking":         Law("verdict", 360, (0.74, 0.82, 1.05, 1.65), reads=0.3, max_tokens=1024),
    "self-consistency":      Law("answer",  180, (0.80, 0.86, 1.05, 1.50), hard=(0.85, 0.90, 1.05, 1.40), max_tokens=2048),
    "plan-and-execute":      Law("prose",   100, (0.74, 0.82, 1.05, 1.65)),
    "document-merging":      Law("prose",   520, (0.64, 0.72, 0.90, 1.42), reads=0.3, max_tokens=2048),
    "map-reduce-summary":    Law("prose",   780, (0.74, 0.82, 1.05, 1.65), reads=0.2, tasks_per_thing=3.0),
}
# fmt: on
# Turns in the household, by errand: factors on the median.
ERRANDS = (0.85, 0.95, 1.1, 1.3)
