"""The ladder: a predictor that needs no training, and knows least of all and soonest.

It remembers the last agents at four rungs, from the widest to the narrowest: all, tenant, class, class and tenant. Each rung
corrects the one before it by as much as it has seen to do so. In logarithms: what the wider rung predicts is a normal prior,
what the narrower one remembers are observations, and the posterior is handed on (credibility theory; Bühlmann 1967). So
one agent of a new class counts for something, three for most, and a hundred for all.

Strangers count until a tenant has agents of its own, `OWN_AGENTS` of them: from then on its own stand on the wide rung too. So
no tenant can move what another one's classes are predicted to cost. The rung of a class over all tenants is there for those
that are new to it, and only while at least two tenants use the class. No tenant can push out another's classes (`shares`).

What is learned of an agent's total depends on whose it is. Of its own kind: how much those cost in the end that came at
least as far. Of strangers: by which factor they grew from where this one is now.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from statistics import NormalDist, fmean
from typing import NamedTuple

from predictor.shares import Shares
from predictor.types import AgentPrediction, AgentProgress, FinishedAgent, TaskPrediction

REMEMBERED_AGENTS = 100  # per rung; also the sample size of the paper's predictor
MAX_CLASSES = 4096  # of all tenants; what a tenant's agents of any class do counts as one more
OWN_AGENTS = 8  # of a class, or of any: a tenant that has so many is predicted without what strangers do
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


class _Own:
    """What a tenant's agents did: those of one class, or all."""

    def __init__(self, agent_class: str | None) -> None:
        self.all = _Memory()
        # Without those from before the class has changed. Which classes a tenant uses comes and goes, so of all its agents
        # none are forgotten.
        self.since_change = self.all if agent_class is None else _Memory()

    def add(self, seen: _Seen) -> None:
        self.all.add(seen)
        if self.since_change is not self.all:
            self.since_change.add(seen)
            self.since_change.forget_if_changed()

    @property
    def suffices(self) -> bool:
        return len(self.all.agents) >= OWN_AGENTS


class _Common:
    """A class over all tenants that use it. memory: None while that is one."""

    def __init__(self) -> None:
        self.tenants: set[str] = set()
        self.memory: _Memory | None = None


class Ladder:
    def __init__(self) -> None:
        self._all = _Memory()
        self._own: Shares[str | None, _Own] = Shares(MAX_CLASSES)  # by class; None: of any
        self._common: dict[str, _Common] = {}  # of the classes that are in `_own`

    def predict_task(
        self, agent_class: str | None, tenant: str, prompt_bytes: int, max_tokens: int | None = None
    ) -> TaskPrediction:
        """prompt_bytes: of one prompt. max_tokens: the client's limit."""
        tokens_per_byte = 1 / PRIOR_BYTES_PER_TOKEN
        decode = _Belief(math.log(PRIOR_DECODE_TOKENS), PRIOR_VARIANCE)
        for memory in (*self._of_any(tenant), *self._of_class(agent_class, tenant)):
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
        for memory in self._of_any(progress.tenant):
            belief = belief.seeing(memory.growths(tasks, arrived))
        for memory in self._of_class(progress.agent_class, progress.tenant):
            # What has not ended is a guess itself, and must not rule any agent out.
            totals = memory.totals(tasks, progress.cost_ended)
            # Past all of its own kind, what others cost says little of it.
            outgrown = not totals
            belief = belief.seeing(_Sums.of(totals))
        expected = math.exp(belief.mean)
        if outgrown:
            expected = max(expected, cost * (1 + PRIOR_GROWTH))
        expected = max(expected, cost)
        return AgentPrediction(expected, expected * math.exp(P90 * math.sqrt(belief.variance)), "ladder")

    def history(self, agent_class: str | None, tenant: str) -> tuple[float, ...]:
        """What agents of this class did before, or without one those of the tenant: `features.HISTORY_COLUMNS`."""
        known = self._of_class(agent_class, tenant) or self._of_any(tenant)
        return known[-1].history if known else _NO_HISTORY

    @property
    def remembered(self) -> int:
        """Classes of tenants, at most `MAX_CLASSES`."""
        return len(self._own)

    def learn(self, agent: FinishedAgent) -> None:
        sequences = sum(task.sequences for task in agent.tasks)
        if not sequences:
            return
        decoded = sum(task.decode_tokens for task in agent.tasks)
        log_cost = _log(agent.cost)
        if not math.isfinite(log_cost):  # of a damaged state; sums would keep it for ever
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
        self._all.add(seen)
        self._remember(None, agent.tenant, seen)
        if agent.agent_class is not None:
            self._remember(agent.agent_class, agent.tenant, seen)
            self._share(agent.agent_class, agent.tenant, seen)

    def _of_any(self, tenant: str) -> list[_Memory]:
        """The rungs that know any agents, of whatever class, the widest first."""
        own = self._own.get(tenant, None)
        if own is None:
            return [self._all] if self._all.agents else []
        return [own.all if own.suffices else self._all, own.since_change]

    def _of_class(self, agent_class: str | None, tenant: str) -> list[_Memory]:
        """The rungs that know agents of the class, the widest first. Agents without a class have none."""
        if agent_class is None:
            return []
        own = self._own.get(tenant, agent_class)
        common = self._common.get(agent_class)
        strangers = None if common is None else common.memory
        if own is None:
            return [] if strangers is None else [strangers]
        return [own.all if own.suffices or strangers is None else strangers, own.since_change]

    def _remember(self, agent_class: str | None, tenant: str, seen: _Seen) -> None:
        own = self._own.get(tenant, agent_class)
        if own is None:
            own = _Own(agent_class)
            forgotten = self._own.put(tenant, agent_class, own)
            if forgotten is not None:
                self._unshare(*forgotten)
        own.add(seen)

    def _share(self, agent_class: str, tenant: str, seen: _Seen) -> None:
        common = self._common.setdefault(agent_class, _Common())
        if common.memory is None and common.tenants - {tenant}:
            (first,) = common.tenants
            known = self._own.get(first, agent_class)
            assert known is not None
            common.memory = _Memory()
            for earlier in known.all.agents:
                common.memory.add(earlier)
        common.tenants.add(tenant)
        if common.memory is not None:
            common.memory.add(seen)

    def _unshare(self, tenant: str, agent_class: str | None) -> None:
        """The tenant's own is forgotten."""
        if agent_class is None:
            return
        common = self._common[agent_class]
        common.tenants.remove(tenant)
        if len(common.tenants) < 2:
            common.memory = None
        if not common.tenants:
            del self._common[agent_class]


def _log(value: float) -> float:
    return math.log(max(1.0, value))


def _deviation(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.sqrt(fmean((value - mean) ** 2 for value in values))
