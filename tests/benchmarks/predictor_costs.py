"""What prediction and training take, measured: time of an arrival on one core, time and memory of a training.

python -m tests.benchmarks.predictor_costs
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import msgspec
import numpy as np

from gateway.agent_trace import TaskTrace
from gateway.replay.figures import percentile
from gateway.replay.predictors import Serving, content_of, serving, taught
from gateway.replay.traces import texts_per_class
from predictor.learned import Learned
from predictor.train import train
from predictor.types import AgentProgress, FinishedAgent

PROMPT_TOKENS, CALLS, WARM = 2_000, 3_000, 200
LEARNED_PER_CLASS, TRAINED_AGENTS, THREADS = 100, 100_000, 2
SEED = 7


class Costs(msgspec.Struct, frozen=True):
    prompt_tokens: int = PROMPT_TOKENS
    arrive_ms_p50: float = 0.0
    arrive_ms_p99: float = 0.0
    trained_agents: int = TRAINED_AGENTS
    threads: int = THREADS
    train_s: float = 0.0
    train_gib: float = 0.0


def measure() -> Costs:
    """Each in a process of its own, one after the other."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        latencies = pool.submit(arrivals_ms).result()
        train_s, train_gib = pool.submit(training).result()
    return Costs(
        arrive_ms_p50=percentile(latencies, 0.5),
        arrive_ms_p99=percentile(latencies, 0.99),
        train_s=train_s,
        train_gib=train_gib,
    )


def arrivals_ms() -> list[float]:
    """Of an agent's first task: features, the ladder that remembers as much as it can, and the model."""
    past = texts_per_class(SEED, LEARNED_PER_CLASS)
    asked = serving("xgboost", past, seed=SEED).predictor
    contents = [content_of(_grown(agent.tasks[0])) for agent in past]
    progress = [AgentProgress(agent.agent_class, agent.tenant) for agent in past]
    taken = []
    for call in range(WARM + CALLS):
        content, of = contents[call % len(past)], progress[call % len(past)]
        begin_s = time.perf_counter()
        asked.arrive(content, of)
        taken.append((time.perf_counter() - begin_s) * 1e3)
    return taken[WARM:]


def training() -> tuple[float, float]:
    """Seconds, and GiB of the process at its largest, agents included."""
    past = Serving(Learned())
    taught(texts_per_class(SEED, LEARNED_PER_CLASS), past)
    agents = _as_many(past.finished, TRAINED_AGENTS)
    begin_s = time.perf_counter()
    train(agents, nthread=THREADS)
    taken_s = time.perf_counter() - begin_s
    return taken_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _grown(task: TaskTrace) -> TaskTrace:
    """The same prompt with its middle repeated until it has so many tokens."""
    prompt = task.prompt or ""
    middle = prompt[len(prompt) // 3 : 2 * len(prompt) // 3] + "\n"
    missing = max(0, PROMPT_TOKENS - task.prompt_tokens) * len(prompt) // max(1, task.prompt_tokens)
    text = (
        prompt[: len(prompt) // 2]
        + (middle * (1 + missing // max(1, len(middle))))[:missing]
        + prompt[len(prompt) // 2 :]
    )
    return msgspec.structs.replace(task, prompt=text, prompt_tokens=max(PROMPT_TOKENS, task.prompt_tokens))


def _as_many(agents: Sequence[FinishedAgent], count: int) -> list[FinishedAgent]:
    """These again and again, each time with other lengths, and rows that no other has."""
    rng = np.random.default_rng(SEED)
    made = []
    for number in range(count):
        agent = agents[number % len(agents)]
        factor = float(np.exp(rng.normal(0, 0.2)))
        tasks = []
        for task in agent.tasks:
            row = task.row
            if row:
                values = np.frombuffer(row, np.float32)
                row = (values * rng.normal(1, 0.01, len(values))).astype(np.float32).tobytes()
            decode_tokens = max(1, round(task.decode_tokens * factor))
            tasks.append(msgspec.structs.replace(task, row=row, decode_tokens=decode_tokens))
        made.append(msgspec.structs.replace(agent, tasks=tasks))
    return made


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(measure()).decode() + "\n")
