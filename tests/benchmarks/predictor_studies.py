"""The studies of the predictor report: which predictor, what it had learned, and what is asked of it.

All are on the traces whose prompts are text (`gateway.replay.texts`): learned from is their train side, so many agents of each
class, and asked about is the held-out side, with other topics, names and wordings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from engine.lab.collector import collector_at_rest
from engine.lab.profile import load_profile
from gateway.agent_trace import AgentTrace
from gateway.replay.evaluation import Evaluation, evaluate
from gateway.replay.figures import mean
from gateway.replay.predictors import (
    ABLATIONS,
    LEARNED,
    Believed,
    Exact,
    TracedTask,
    beliefs,
    serving,
)
from gateway.replay.simulation import Setup, simulate
from gateway.replay.traces import texts, texts_per_class
from predictor.types import AgentPrediction, AgentProgress, Arrival, TaskContent, TaskPrediction

PROFILE = "llama-7b-a100"
SEEDS = range(5)
PER_CLASS, HELD_OUT_PER_CLASS = 100, 30
NOISES = ("noise:0.25", "noise:0.5")
# Every tenth agent has a client that tells untruths, by this factor; or every other one, all of them of one tenant.
LIARS, LIE = 10, 10
LIARS_OF_A_TENANT = 2
# Seeds of what is learned from; none of those that are asked about.
PAST_SEED = 101

Study = Literal["accuracy", "replay", "cold", "hints"]
Hints = Literal["", "true", "few", "many"]


class Job(msgspec.Struct, frozen=True):
    """predictor: as `justitia replay` has it, or `oracle`. per_class: agents learned from, of each class. renamed: they were of
    other classes, by name. hints: what the liars' clients say of how many tasks they will send. own_tenant: the liars
    are a tenant of their own, with half of the work."""

    study: Study
    seed: int
    predictor: str
    without: str = ""
    per_class: int = PER_CLASS
    renamed: bool = False
    hints: Hints = ""
    own_tenant: bool = False


class Row(msgspec.Struct, frozen=True):
    """mean_jct_s: of all agents. liars_jct_s: of the liars in the first and in the second half of the run."""

    job: Job
    evaluation: Evaluation | None = None
    mean_jct_s: float = 0.0
    preemptions: int = 0
    liars_jct_s: tuple[float, float] = (0.0, 0.0)


def jobs() -> Iterator[Job]:
    for seed in SEEDS:
        for name in (*LEARNED, "oracle"):
            yield Job("accuracy", seed, name)
        for without in ABLATIONS:
            yield Job("accuracy", seed, "xgboost", without)
        for name in ("exact", "oracle", *LEARNED, *NOISES):
            yield Job("replay", seed, name)
        for name in ("xgboost", "ladder"):
            yield Job("cold", seed, name, per_class=0)
        yield Job("cold", seed, "xgboost", renamed=True)
        for hints in ("true", "few", "many"):
            yield Job("hints", seed, "xgboost", hints=hints)
            yield Job("hints", seed, "xgboost", hints=hints, own_tenant=True)


def run_one(job: Job) -> Row:
    past = texts_per_class(job.seed + PAST_SEED, job.per_class) if job.per_class else []
    if job.renamed:
        past = [msgspec.structs.replace(agent, agent_class=f"old {agent.agent_class}") for agent in past]
    if job.study == "accuracy":
        agents = texts_per_class(job.seed, HELD_OUT_PER_CLASS, held_out=True)
        if job.predictor == "oracle":
            implied = texts_per_class(job.seed, HELD_OUT_PER_CLASS, held_out=True, noise=0.0)
            return Row(job, evaluate(Oracle(implied), agents, "oracle"))
        asked = serving(job.predictor, past, seed=job.seed, without=job.without)
        return Row(job, evaluate(asked, agents, job.predictor, job.without))
    agents = texts(job.seed, held_out=True)
    every = LIARS_OF_A_TENANT if job.own_tenant else LIARS
    if job.hints:
        agents = _with_liars(agents, job.hints, every, "liar" if job.own_tenant else "")
    believed = _believed(job, past)
    with collector_at_rest():
        run = simulate(agents, "justitia", "memory", believed, Setup(profile=load_profile(PROFILE)))
    liars = [agent.jct_s for agent in run.agents[::every]]
    half = len(liars) // 2
    return Row(
        job,
        None,
        run.summary.mean_jct_s,
        run.summary.preemptions,
        (mean(liars[:half]), mean(liars[half:])),
    )


class Oracle(Exact):
    """Knows all that the texts imply, and nothing else: the laws by which they were made, without the noise. No predictor that
    is asked at arrival can know more."""

    def __init__(self, implied: Sequence[AgentTrace]) -> None:
        super().__init__()
        self._cost_of = {agent.agent_id: float(agent.cost) for agent in implied}
        self._output_of = {(agent.agent_id, task.id): task.output_tokens for agent in implied for task in agent.tasks}
        self._shortest = {agent.agent_id: min(task.output_tokens for task in agent.tasks) for agent in implied}

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        arrival = super().arrive(content, progress)
        cost = max(arrival.agent.cost, progress.cost_arrived + arrival.task.cost)
        return msgspec.structs.replace(arrival, agent=AgentPrediction(cost, cost, arrival.agent.source))

    def total(self, agent: AgentTrace) -> float:
        return self._cost_of[agent.agent_id]

    def lengths(self, content: TracedTask) -> TaskPrediction:
        # There may be more tasks than are implied.
        name = content.agent.agent_id
        output = self._output_of.get((name, content.task.id), self._shortest[name])
        return TaskPrediction(content.task.prompt_tokens, output)


def _believed(job: Job, past: Sequence[AgentTrace]) -> Believed:
    if job.predictor == "oracle":
        return Oracle(texts(job.seed, held_out=True, noise=0.0))
    return beliefs(job.predictor, seed=job.seed, past=past)


def _with_liars(agents: Sequence[AgentTrace], hints: Hints, every: int, tenant: str) -> list[AgentTrace]:
    """What the liars say is true, or too few, or too many by a factor of `LIE`."""
    factor = {"true": 1.0, "few": 1 / LIE, "many": float(LIE)}[hints]
    return [
        msgspec.structs.replace(agent, expected_tasks=max(1, round(factor * len(agent.tasks))), tenant=tenant)
        if place % every == 0
        else agent
        for place, agent in enumerate(agents)
    ]
