"""What a predictor is asked, what it answers, and what it learns from."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

from predictor.cost import task_cost

# The source of a prediction that no predictor made.
NO_SOURCE = "none"


class Sketch(NamedTuple):
    """What is known of one task from its request, as numbers (`features.sketch`). Each agent that lives has two."""

    plain: bytes  # float32, one for each of `features.PLAIN_COLUMNS`
    words: (
        bytes  # uint16 in pairs: a bucket of hashed words, and how often it was met; those that were not are left out
    )


class TaskContent(msgspec.Struct, frozen=True):
    """What a request says of itself. Never what only the future knows.

    prompt_bytes: of all text of one prompt, tools included. system, text: what instructs the model, and what it is asked; their
    beginnings and ends suffice (`wording.EDGE_BYTES`). max_tokens: the client's limit: a feature, not a fact.
    sequences: how many will be decoded for it. structured: an answer of a given form is wanted.
    """

    prompt_bytes: int
    system: bytes = b""
    text: bytes = b""
    messages: int = 1
    tools: int = 0
    tool_bytes: int = 0
    max_tokens: int | None = None
    sequences: int = 1
    structured: bool = False


class AgentProgress(msgspec.Struct, frozen=True):
    """How far an agent has come. Costs in token·iterations: of all that has arrived, true where known; and of what has ended.

    returns: how often it came back after it had nothing left to do. expected_tasks: how many the client says there will be, a
    feature too. opening, latest: its first and its last task.
    """

    agent_class: str | None
    tenant: str
    tasks_arrived: int = 0
    tasks_ended: int = 0
    cost_arrived: float = 0.0
    cost_ended: float = 0.0
    returns: int = 0
    expected_tasks: int | None = None
    opening: Sketch | None = None
    latest: Sketch | None = None

    def with_task(self, cost: float, sketch: Sketch | None) -> AgentProgress:
        """When a task more has arrived, of this predicted cost."""
        return AgentProgress(
            self.agent_class,
            self.tenant,
            self.tasks_arrived + 1,
            self.tasks_ended,
            self.cost_arrived + cost,
            self.cost_ended,
            self.returns,
            self.expected_tasks,
            sketch if self.opening is None else self.opening,
            self.latest if sketch is None else sketch,
        )


class TaskPrediction(msgspec.Struct, frozen=True):
    """Expected prompt and decode length of one sequence, in tokens."""

    prompt_tokens: float
    decode_tokens: float

    @property
    def cost(self) -> float:
        """ĉ in token·iterations."""
        return task_cost(self.prompt_tokens, self.decode_tokens)

    @property
    def memory_tokens(self) -> float:
        """p + d̂: the KV held at the task's end."""
        return self.prompt_tokens + self.decode_tokens


class AgentPrediction(msgspec.Struct, frozen=True):
    """cost: Ĉ, in token·iterations. p90: nine of ten such agents cost at most that. source: who says so."""

    cost: float
    p90: float
    source: str


class Arrival(msgspec.Struct, frozen=True):
    """What is predicted when a task arrives."""

    task: TaskPrediction
    agent: AgentPrediction  # of its agent, with this task
    sketch: Sketch | None  # None where nothing will ask for it
    numbers: bytes = b""  # float32: what the row has besides sketches (`features.row`); empty where no row is kept


class FinishedTask(msgspec.Struct, frozen=True, array_like=True):
    """A task as the engine's usage told it: tokens summed over its sequences (prompts × n). held: what its scheduler counted,
    in KV token·iterations, if it said so. arrived_s, ended_s: since its agent's first arrival. row: see `features.row`, of the
    arrivals that `features.is_kept` says. prompt, system: what was asked and what instructed, if the user wants texts kept.
    max_tokens: the client's limit."""

    prompt_bytes: int
    prompt_tokens: int
    cached_tokens: int
    decode_tokens: int
    prompts: int = 1
    sequences: int = 1
    held: float | None = None
    arrived_s: float = 0.0
    ended_s: float = 0.0
    row: bytes = b""
    prompt: str | None = None
    system: str | None = None
    max_tokens: int | None = None

    @property
    def cost(self) -> float:
        """In token·iterations: what was held, where it is known."""
        return self.net_cost if self.held is None else self.held

    @property
    def net_cost(self) -> float:
        """By the formula, without what was cached, as if its sequences were equally long."""
        prompt_tokens, cached_tokens = self.prompt_tokens / self.prompts, self.cached_tokens / self.prompts
        return self.sequences * task_cost(prompt_tokens, self.decode_tokens / self.sequences, cached_tokens)


class FinishedAgent(msgspec.Struct, frozen=True):
    """What a finished agent turned out to be, its tasks in the order of their arrival: what predictors learn from, and what the
    state store keeps. schema: of the rows (`features.SCHEMA`). arrived_at: its first arrival, seconds since 1970; 0 if that is
    not known. expected_tasks: how many its client said there would be."""

    agent_class: str | None
    tenant: str
    tasks: list[FinishedTask]
    schema: str = ""
    arrived_at: float = 0.0
    weight: float = 1.0
    expected_tasks: int | None = None

    @property
    def cost(self) -> float:
        return sum(task.cost for task in self.tasks)


class Predictor(Protocol):
    """Every method returns at once, and never a NaN or an infinity."""

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        """A task arrives. progress: of its agent, before it."""
        ...

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction:
        """Of an agent of which no new task has come, but more is known. Its cost is at least what has arrived."""
        ...

    def learn(self, agent: FinishedAgent) -> None: ...
