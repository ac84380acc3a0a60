"""The ladder: a predictor that needs no training.

It remembers the last agents at four rungs, from the narrowest to the widest: class and tenant, class, tenant, everybody.
A question is answered by the narrowest rung that has seen enough; below the last one stands a prior from lengths. An
agent's total is the mean of those remembered agents that had at least as many tasks and cost at least as much as the asking
one has shown so far: the prediction grows with the agent.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from predictor.types import AgentProgress, FinishedAgent, Predictor, TaskFeatures, TaskPrediction

REMEMBERED_AGENTS = 100  # per rung; also the sample size of the paper's predictor
ENOUGH_AGENTS = 3  # below which a wider rung answers
MAX_RUNGS = 4096  # classes and tenants are the clients' words: the least recently used rung goes first

# The prior, until anything has been learned. A byte-level BPE has about four bytes of English to a token.
PRIOR_BYTES_PER_TOKEN = 4.0
PRIOR_DECODE_TOKENS = 256.0
# An agent that has outgrown every one remembered: work still to come, as a share of what has arrived (the mean residual of
# a heavy-tailed size is proportional to the size reached).
PRIOR_GROWTH = 0.5

Rung = tuple[str | None, str | None]


class _Memory:
    """The last agents of one rung."""

    def __init__(self) -> None:
        self._agents: deque[tuple[int, float]] = deque(maxlen=REMEMBERED_AGENTS)  # (tasks, cost)
        self._lengths: deque[tuple[int, int, int, int]] = deque(maxlen=REMEMBERED_AGENTS)  # sums over an agent's tasks
        self._sums = [0, 0, 0, 0]  # sequences, prompt bytes, prompt tokens, decode tokens

    def __len__(self) -> int:
        return len(self._agents)

    def add(self, agent: FinishedAgent) -> None:
        lengths = (
            sum(task.sequences for task in agent.tasks),
            sum(task.prompt_bytes for task in agent.tasks),
            sum(task.prompt_tokens for task in agent.tasks),
            sum(task.decode_tokens for task in agent.tasks),
        )
        if len(self._lengths) == REMEMBERED_AGENTS:
            self._sums = [total - gone for total, gone in zip(self._sums, self._lengths[0], strict=True)]
        self._sums = [total + new for total, new in zip(self._sums, lengths, strict=True)]
        self._lengths.append(lengths)
        self._agents.append((len(agent.tasks), agent.cost))

    def total_cost(self, tasks: int, cost: float) -> float | None:
        """Mean total of the agents that came at least as far; None if none did."""
        totals = [total for count, total in self._agents if count >= tasks and total >= cost]
        return sum(totals) / len(totals) if totals else None

    @property
    def tokens_per_byte(self) -> float | None:
        _, prompt_bytes, prompt_tokens, _ = self._sums
        return prompt_tokens / prompt_bytes if prompt_bytes and prompt_tokens else None

    @property
    def decode_tokens(self) -> float:
        sequences, _, _, decode_tokens = self._sums
        return decode_tokens / sequences


class Ladder(Predictor):
    def __init__(self) -> None:
        self._memories: OrderedDict[Rung, _Memory] = OrderedDict()

    def predict_task(self, task: TaskFeatures) -> TaskPrediction:
        memory = next(self._answering(task.agent_class, task.tenant), None)
        tokens_per_byte = (memory and memory.tokens_per_byte) or 1 / PRIOR_BYTES_PER_TOKEN
        decode_tokens = memory.decode_tokens if memory else PRIOR_DECODE_TOKENS
        if task.max_tokens is not None:
            decode_tokens = min(decode_tokens, task.max_tokens)
        return TaskPrediction(max(1.0, task.prompt_bytes * tokens_per_byte), max(1.0, decode_tokens))

    def predict_agent(self, progress: AgentProgress) -> float:
        memory = next(self._answering(progress.agent_class, progress.tenant), None)
        if memory is None:
            return progress.cost_arrived
        total = memory.total_cost(progress.tasks_arrived, progress.cost_arrived)
        # Past all of its own kind, what others cost says nothing of it.
        return total if total is not None else progress.cost_arrived * (1 + PRIOR_GROWTH)

    def learn(self, agent: FinishedAgent) -> None:
        if not agent.tasks:
            return
        for rung in _rungs(agent.agent_class, agent.tenant):
            memory = self._memories.setdefault(rung, _Memory())
            memory.add(agent)
            self._memories.move_to_end(rung)
        while len(self._memories) > MAX_RUNGS:
            self._memories.popitem(last=False)

    def _answering(self, agent_class: str | None, tenant: str) -> Iterator[_Memory]:
        """The rungs that have seen enough, the narrowest first."""
        for rung in _rungs(agent_class, tenant):
            memory = self._memories.get(rung)
            if memory is not None:
                self._memories.move_to_end(rung)
                if len(memory) >= ENOUGH_AGENTS:
                    yield memory


def _rungs(agent_class: str | None, tenant: str) -> list[Rung]:
    """Class and tenant → class → tenant → everybody. Agents without a class have no rung of a class."""
    of_class: list[Rung] = [] if agent_class is None else [(agent_class, tenant), (agent_class, None)]
    return [*of_class, (None, tenant), (None, None)]
