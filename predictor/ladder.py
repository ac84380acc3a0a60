"""The ladder: a predictor that needs no training, and knows least of all and soonest.

It remembers the last agents at four rungs, from the widest to the narrowest: everybody, tenant, class, class and tenant. Each
rung corrects the one before it by as much as it has seen to do so. In logarithms: what the wider rung says is a normal prior,
what the narrower one remembers are observations, and the posterior is handed on (credibility theory; Bühlmann 1967). So
one agent of a new class counts for something, three for most, and a hundred for all.

What is learned of an agent's total depends on whose it is. Of its own kind: how much those cost in the end that came at
least as far. Of strangers: by which factor they grew from where this one is now.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import NormalDist, fmean
from typing import NamedTuple

from predictor.types import AgentPrediction, AgentProgress, FinishedAgent, TaskPrediction

REMEMBERED_AGENTS = 100  # per rung; also the sample size of the paper's predictor
MAX_RUNGS = 4096  # classes and tenants are the clients' words: the least recently used rung goes first
# A class has changed when the mean of its last agents' log cost lies so many standard errors from that of those before: then
# those are forgotten, and with them the older half of the last, which may be from before. The spread is at least that much.
LAST_AGENTS, CHANGE, LEAST_SPREAD = 8, 4.0, 0.1
STAGES = 64  # tasks up to which it is remembered how far an agent had come with each

# The prior, until anything has been learned. A byte-level BPE has about four bytes of English to a token.
PRIOR_BYTES_PER_TOKEN = 4.0
PRIOR_DECODE_TOKENS = 256.0
# Of agents among which nothing is known: the variance of the logarithm of what they cost, and decode.
PRIOR_VARIANCE = 1.0
# Of a group's own: what its variance is taken for before it has shown it, and as how many observations that counts.
GROUP_VARIANCE, GROUP_OBSERVATIONS = 0.3, 2
# An agent that has outgrown every one remembered: work still to come, as a share of what has arrived (the mean residual of
# a heavy-tailed size is proportional to the size reached).
PRIOR_GROWTH = 0.5

P90 = NormalDist().inv_cdf(0.9)

Rung = tuple[str | None, str | None]


class _Sums(NamedTuple):
    size: int
    total: float
    squares: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Sums:
        return cls(len(values), sum(values), sum([value * value for value in values]))


_NOTHING = _Sums(0, 0.0, 0.0)
_NO_HISTORY = (0.0, *(math.nan,) * 7)


class _Belief(NamedTuple):
    """Normal, of a logarithm. variance: of the next one, not of the mean."""

    mean: float
    variance: float

    def seeing(self, values: _Sums) -> _Belief:
        """What is believed of a group within those that this belief is of, having seen some of the group."""
        count = values.size
        if not count:
            return self
        mean = values.total / count
        deviations = max(0.0, values.squares - count * mean**2)
        within = (GROUP_OBSERVATIONS * GROUP_VARIANCE + deviations) / (GROUP_OBSERVATIONS + count - 1)
        precision = count / within + 1 / self.variance
        return _Belief((mean * count / within + self.mean / self.variance) / precision, within + 1 / precision)


class _Seen(NamedTuple):
    """A finished agent. growths: log of the factor by which it grew after each of its first tasks; decode: log of the tokens
    of a sequence."""

    tasks: int
    cost: float
    log_cost: float
    growths: tuple[float, ...]
    prompt_bytes: int
    prompt_tokens: int
    decode: float


class _Sum:
    """Of values that come and go, and of their squares."""

    __slots__ = ("size", "squares", "total")

    def __init__(self) -> None:
        self.size, self.total, self.squares = 0, 0.0, 0.0

    def add(self, value: float, sign: int = 1) -> None:
        self.size += sign
        self.total += sign * value
        self.squares += sign * value * value

    def shifted(self, by: float = 0.0) -> _Sums:
        """As if each value had been that much larger."""
        size, total = self.size, self.total
        return _Sums(size, total + size * by, self.squares + 2 * by * total + size * by * by)

    @property
    def mean(self) -> float:
        return self.total / self.size

    @property
    def deviation(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.size - self.mean**2))


class _Memory:
    """The last agents of one rung, and what of them is asked for at every arrival, kept as sums."""

    def __init__(self) -> None:
        self.agents: deque[_Seen] = deque()
        self.decodes, self.costs, self._tasks, self._sizes = _Sum(), _Sum(), _Sum(), _Sum()
        self._growths: list[_Sum] = []  # by stage
        self._prompt_bytes = self._prompt_tokens = 0

    def add(self, seen: _Seen) -> None:
        if len(self.agents) == REMEMBERED_AGENTS:
            self._forget_oldest()
        self.agents.append(seen)
        self._count(seen, 1)

    def _count(self, seen: _Seen, sign: int) -> None:
        self.decodes.add(seen.decode, sign)
        self.costs.add(seen.log_cost, sign)
        self._tasks.add(math.log(seen.tasks), sign)
        self._sizes.add(math.log1p(seen.prompt_bytes / seen.tasks), sign)
        while len(self._growths) < len(seen.growths):
            self._growths.append(_Sum())
        for stage, growth in zip(self._growths, seen.growths, strict=False):
            stage.add(growth, sign)
        self._prompt_bytes += sign * seen.prompt_bytes
        self._prompt_tokens += sign * seen.prompt_tokens

    def forget_if_changed(self) -> None:
        costs = [seen.log_cost for seen in self.agents]
        before, last = costs[:-LAST_AGENTS], costs[-LAST_AGENTS:]
        if len(before) < LAST_AGENTS:
            return
        # The spread from before: that of the last ones is large while a change is under way.
        spread = max(_deviation(before), LEAST_SPREAD)
        error = spread * math.sqrt(1 / len(before) + 1 / len(last))
        if abs(fmean(last) - fmean(before)) > CHANGE * error:
            while len(self.agents) > LAST_AGENTS // 2:
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        self._count(self.agents.popleft(), -1)

    def totals(self, tasks: int, cost: float) -> list[float]:
        """log of what those cost that came at least as far."""
        return [seen.log_cost for seen in self.agents if seen.tasks >= tasks and seen.cost >= cost]

    def growths(self, tasks: int, from_: float) -> _Sums:
        """log of what those became that had so many tasks, had they begun from there: from `from_`, a logarithm too."""
        return self._growths[tasks - 1].shifted(from_) if 1 <= tasks <= len(self._growths) else _NOTHING

    @property
    def history(self) -> tuple[float, ...]:
        """In the order of `features.HISTORY_COLUMNS`; logarithms."""
        return (
            math.log1p(len(self.agents)),
            self.costs.mean,
            self.costs.deviation,
            self._tasks.mean,
            self.decodes.mean,
            self.decodes.deviation,
            self._sizes.mean,
            self._growths[0].mean,
        )

    @property
    def tokens_per_byte(self) -> float | None:
        return self._prompt_tokens / self._prompt_bytes if self._prompt_bytes and self._prompt_tokens else None


class Ladder:
    def __init__(self) -> None:
        self._memories: OrderedDict[Rung, _Memory] = OrderedDict()

    def predict_task(
        self, agent_class: str | None, tenant: str, prompt_bytes: int, max_tokens: int | None = None
    ) -> TaskPrediction:
        """prompt_bytes: of one prompt. max_tokens: the client's limit."""
        tokens_per_byte = 1 / PRIOR_BYTES_PER_TOKEN
        decode = _Belief(math.log(PRIOR_DECODE_TOKENS), PRIOR_VARIANCE)
        for _, memory in self._climb(agent_class, tenant):
            tokens_per_byte = memory.tokens_per_byte or tokens_per_byte
            decode = decode.seeing(memory.decodes.shifted())
        decode_tokens = math.exp(decode.mean)
        if max_tokens is not None:
            decode_tokens = min(decode_tokens, max_tokens)
        return TaskPrediction(max(1.0, prompt_bytes * tokens_per_byte), max(1.0, decode_tokens))

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction:
        """At least what has arrived."""
        tasks, cost = progress.tasks_arrived, max(progress.cost_arrived, progress.cost_ended)
        if not cost > 0:
            return AgentPrediction(0.0, 0.0, "ladder")
        arrived, outgrown = math.log(cost), False
        belief = _Belief(arrived, PRIOR_VARIANCE)
        for (agent_class, _), memory in self._climb(progress.agent_class, progress.tenant):
            if agent_class is None:
                belief = belief.seeing(memory.growths(tasks, arrived))
            else:
                # What has not ended is a guess itself, and must not rule anybody out.
                totals = memory.totals(tasks, progress.cost_ended)
                # Past all of its own kind, what others cost says little of it.
                outgrown = bool(memory.agents) and not totals
                belief = belief.seeing(_Sums.of(totals))
        expected = math.exp(belief.mean)
        if outgrown:
            expected = max(expected, cost * (1 + PRIOR_GROWTH))
        expected = max(expected, cost)
        return AgentPrediction(expected, expected * math.exp(P90 * math.sqrt(belief.variance)), "ladder")

    def history(self, agent_class: str | None, tenant: str) -> tuple[float, ...]:
        """What agents of this class did before, or without one those of the tenant: `features.HISTORY_COLUMNS`."""
        for rung in reversed(_rungs(agent_class, tenant)):
            memory = self._memories.get(rung)
            if memory is not None:
                return memory.history
        return _NO_HISTORY

    def learn(self, agent: FinishedAgent) -> None:
        sequences = sum(task.sequences for task in agent.tasks)
        if not sequences:
            return
        decoded = sum(task.decode_tokens for task in agent.tasks)
        log_cost = _log(agent.cost)
        if not math.isfinite(log_cost):  # of a damaged state; sums would never forget it
            return
        seen = _Seen(
            tasks=len(agent.tasks),
            cost=agent.cost,
            log_cost=log_cost,
            growths=tuple(log_cost - _log(cost) for cost in accumulate(task.cost for task in agent.tasks[:STAGES])),
            prompt_bytes=sum(task.prompt_bytes for task in agent.tasks),
            prompt_tokens=sum(task.prompt_tokens for task in agent.tasks),
            decode=_log(decoded / sequences),
        )
        for rung in _rungs(agent.agent_class, agent.tenant):
            memory = self._memories.setdefault(rung, _Memory())
            memory.add(seen)
            if None not in rung:  # others see classes and tenants come and go
                memory.forget_if_changed()
            self._memories.move_to_end(rung)
        while len(self._memories) > MAX_RUNGS:
            self._memories.popitem(last=False)

    def _climb(self, agent_class: str | None, tenant: str) -> Iterator[tuple[Rung, _Memory]]:
        """The rungs that have seen anybody, the widest first."""
        for rung in _rungs(agent_class, tenant):
            memory = self._memories.get(rung)
            if memory is not None:
                self._memories.move_to_end(rung)
                yield rung, memory


def _rungs(agent_class: str | None, tenant: str) -> list[Rung]:
    """The widest first. Agents without a class have no rung of a class."""
    of_class: list[Rung] = [] if agent_class is None else [(agent_class, None), (agent_class, tenant)]
    return [(None, None), (None, tenant), *of_class]


def _log(value: float) -> float:
    return math.log(max(1.0, value))


def _deviation(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.sqrt(fmean((value - mean) ** 2 for value in values))
