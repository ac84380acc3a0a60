"""The nine types of agents in the built-in traces, at the scale of the paper: task counts, lengths and structure.

The paper names its nine types, and gives neither how many tasks an agent has nor how long they are. The numbers below are
ours, not the paper's. They are chosen for the engine that it describes (`KV_TOKENS` of KV cache, some 20 ms an
iteration) so that 300 agents are about 3,000 tasks and, with 80 % of the KV memory held, 40,000 to 50,000 iterations: an
18-minute window of arrivals brings it close to saturation, a 6-minute window overloads it twofold. Agents of one type
differ mostly in how many tasks they have, and so much that a predictor which knows only the type has a mean relative error
of about 55 % (the paper's: 53 %).

Everything that varies is log-normal around the median in the table: the number of tasks, what is common to the lengths
of one agent (`…_sigma`), and what is left between its tasks (`TASK_SIGMA`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, assert_never

from gateway.agent_trace import TaskTrace

Size = Literal["small", "medium", "large"]
SIZES: tuple[Size, ...] = ("small", "medium", "large")
Shape = Literal["parallel", "samples", "reduce", "vote", "plan", "chain", "tool chain", "tool plan"]


@dataclass(frozen=True, slots=True)
class AgentType:
    """`tasks`: median number of those that make up the type (maps, steps, turns); a plan, reduce, vote or answer is on
    top. `prompt` and `output`: their median tokens. The sigmas are between agents of the type."""

    name: str
    short: str
    size: Size
    shape: Shape
    tasks: float
    tasks_sigma: float
    prompt: float
    prompt_sigma: float
    output: float
    output_sigma: float
    fewest: int = 2
    most: int = 400
    observation: float = 60  # what the world or a tool adds to the next prompt
    longest: int = 3_000  # prompt and output of a task together


# fmt: off
#             class                    id     size      shape         tasks   σ   prompt   σ   output   σ
PAPER_TYPES = (
    AgentType("equation-verification", "ev",    "small",  "parallel",     4, 0.50,  340, 0.10,   95, 0.12),
    AgentType("fact-verification",     "fv",    "small",  "parallel",     5, 0.50,  600, 0.10,   50, 0.12),
    AgentType("kbqa-verification",     "kbqav", "small",  "parallel",     5, 0.50,  450, 0.10,   65, 0.12),
    AgentType("alfworld",              "alfwi", "small",  "chain",        6, 0.40,  420, 0.10,   35, 0.12, 4, 8),
    AgentType("code-checking",         "cc",    "medium", "parallel",     7, 0.50,  550, 0.10,  120, 0.12),
    AgentType("self-consistency",      "sc",    "medium", "samples",      7, 0.50,  360, 0.10,  175, 0.12),
    AgentType("plan-and-execute",      "pe",    "medium", "plan",         6, 0.50,  500, 0.10,  122, 0.12),
    AgentType("document-merging",      "dm",    "large",  "vote",        38, 0.50,  650, 0.10,  150, 0.12),
    AgentType("map-reduce-summary",    "mrs",   "large",  "reduce",      39, 0.50,  900, 0.10,  105, 0.12),
)
# Agents that wait for tools; not of the paper.
TOOL_TYPES = (
    AgentType("coding",                "code",  "medium", "tool chain",   9, 0.40,  450, 0.10,   75, 0.12, 5, 15),
    AgentType("plan-and-execute",      "pe",    "medium", "tool plan",    6, 0.50,  500, 0.10,  130, 0.12),
)
# A conversation with tools, as long as such are: what is common to the class, and then a story that grows.
CODING = AgentType(
    "coding", "code", "large", "tool chain", 12, 0.40, 6_000, 0.20, 180, 0.30, 5, 30, observation=500, longest=30_000
)
CODING_PREFIX = 3_200
# One that is worth some seven of those that come by meanwhile.
ELEPHANT = AgentType("map-reduce-summary", "mrs", "large", "reduce",     15, 0.00,  900, 0.00,  105, 0.00)
MICE = (
    AgentType("equation-verification", "ev",    "small",  "parallel",     8, 0.50,  340, 0.10,   95, 0.12, 6, 12),
    AgentType("fact-verification",     "fv",    "small",  "parallel",     8, 0.50,  600, 0.10,   50, 0.12, 6, 12),
)
# fmt: on

# Between the tasks of one agent.
TASK_SIGMA = 0.3
# LLaMA-7B on an A100: 459 blocks of 16 tokens, about 80 % of them in use, 17 to 22 ms an iteration.
KV_TOKENS = 459 * 16
KV_IN_USE = 0.8
ITERATION_S = 0.02
MAX_OUTPUT = 1_000
MIN_PROMPT = 48
MIN_OUTPUT = 4

# ALFWorld's answers come from a simulator; a coding agent's from tools: log-normal, by median and σ.
WORLD_THINK_S = (0.05, 0.5)
TOOL_THINK_S, TOOL_THINK_SIGMA = 2.0, 1.0


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of agents by size (the rest is small), factors on the medians, and for a heavy tail a sigma that takes the
    place of the table's above the median."""

    medium: float = 0.3
    large: float = 0.1
    tasks: float = 1.0
    lengths: float = 1.0
    tail_sigma: float | None = None

    def counts(self, agents: int) -> dict[Size, int]:
        """How many of so many agents are small, medium and large."""
        large, medium = round(agents * self.large), round(agents * self.medium)
        return {"small": agents - large - medium, "medium": medium, "large": large}


# With lower medians, the heavy tail's total work stays near that of the default.
MIXES = {
    "paper": Mix(),
    "light": Mix(medium=0.2, large=0.05, tasks=0.9, lengths=0.8),
    "heavy": Mix(tasks=0.65, lengths=0.56, tail_sigma=1.0),
}
PAPER_MIX = MIXES["paper"]


def types_for(mix: Mix, agents: int, rng: Random, among: Sequence[AgentType] = PAPER_TYPES) -> list[AgentType]:
    """So many agents' types in random order; the types of one size are equally frequent."""
    types = []
    for size, count in mix.counts(agents).items():
        of_size = [kind for kind in among if kind.size == size]
        types += [of_size[i % len(of_size)] for i in range(count)]
    rng.shuffle(types)
    return types


def draw_tasks(kind: AgentType, rng: Random, mix: Mix = PAPER_MIX) -> tuple[TaskTrace, ...]:
    """The tasks of one agent of this type, in an order in which each comes after those it waits for."""
    tail = mix.tail_sigma
    count = _log_normal(rng, kind.tasks * mix.tasks, kind.tasks_sigma, tail)
    of_agent = _Agent(
        rng,
        min(max(round(count), kind.fewest), kind.most),
        _log_normal(rng, kind.prompt * mix.lengths, kind.prompt_sigma, tail),
        _log_normal(rng, kind.output * mix.lengths, kind.output_sigma, tail),
        kind.observation,
        kind.longest,
    )
    return tuple(_shaped(kind.shape, of_agent))


@dataclass(frozen=True, slots=True)
class _Agent:
    """What is common to the tasks of one agent; the lengths are medians."""

    rng: Random
    count: int
    prompt: float
    output: float
    observation: float
    longest: int

    def task(
        self,
        name: str,
        after: tuple[str, ...] = (),
        *,
        prompt: float | None = None,
        outputs: float = 1.0,
        think_s: float = 0.0,
    ) -> TaskTrace:
        """`prompt`: exact, where it follows from something; `outputs`: factor on the median. Clipped to what fits."""
        if prompt is None:
            prompt = _log_normal(self.rng, self.prompt, TASK_SIGMA)
        output = _log_normal(self.rng, outputs * self.output, TASK_SIGMA)
        output_tokens = min(max(round(output), MIN_OUTPUT), MAX_OUTPUT)
        prompt_tokens = min(max(round(prompt), MIN_PROMPT), self.longest - output_tokens)
        return TaskTrace(name, prompt_tokens, output_tokens, after, round(think_s, 3))


def _shaped(shape: Shape, agent: _Agent) -> list[TaskTrace]:
    match shape:
        case "parallel":
            return [agent.task(f"check-{i}") for i in range(agent.count)]
        case "samples":  # of one answer to one question: the prompt is the same
            return [agent.task(f"sample-{i}", prompt=agent.prompt) for i in range(agent.count)]
        case "reduce":
            maps = [agent.task(f"map-{i}") for i in range(agent.count)]
            return [*maps, _gather(agent, "reduce", maps, outputs=2.0)]
        case "vote":
            merges = [agent.task(f"merge-{i}") for i in range(agent.count)]
            return [*merges, _gather(agent, "vote", merges, outputs=0.5)]
        case "plan":
            plan = agent.task("plan")
            steps = [agent.task(f"step-{i}", (plan.id,)) for i in range(agent.count)]
            return [plan, *steps, _gather(agent, "answer", steps, outputs=1.5)]
        case "chain":
            return _turns(agent, _world_s)
        case "tool chain":
            return _turns(agent, _tool_s)
        case "tool plan":
            names = ["plan", *(f"step-{i}" for i in range(agent.count))]
            steps = [
                agent.task(name, (before,), think_s=_tool_s(agent.rng)) for before, name in itertools.pairwise(names)
            ]
            return [agent.task("plan"), *steps, _gather(agent, "answer", steps, outputs=1.5)]
        case _:
            assert_never(shape)


def _gather(agent: _Agent, name: str, parts: list[TaskTrace], outputs: float) -> TaskTrace:
    """Reads what the parts have written, under an instruction, as far as it fits."""
    written = sum(part.output_tokens for part in parts)
    return agent.task(name, tuple(part.id for part in parts), prompt=MIN_PROMPT + written, outputs=outputs)


def _turns(agent: _Agent, think_s: Callable[[Random], float]) -> list[TaskTrace]:
    """One after another, each with the whole story so far in its prompt."""
    turns = [agent.task("turn-0", prompt=agent.prompt)]
    for i in range(1, agent.count):
        before = turns[-1]
        story = before.prompt_tokens + before.output_tokens + _log_normal(agent.rng, agent.observation, TASK_SIGMA)
        turns.append(agent.task(f"turn-{i}", (before.id,), prompt=story, think_s=think_s(agent.rng)))
    return turns


def _world_s(rng: Random) -> float:
    return rng.uniform(*WORLD_THINK_S)


def _tool_s(rng: Random) -> float:
    return _log_normal(rng, TOOL_THINK_S, TOOL_THINK_SIGMA)


def _log_normal(rng: Random, median: float, sigma: float, above: float | None = None) -> float:
    """`above`: the sigma of the half above the median, where it is another."""
    deviation = rng.gauss(0.0, 1.0)
    return median * math.exp(deviation * (sigma if above is None or deviation < 0 else above))
