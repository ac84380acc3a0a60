"""A seeded mix of agents, as a trace: about 60 % small, 30 % medium and 10 % large, which hold most of the memory.

No id, prompt or header is made from an output's length: a length is the kind's median times log-normal noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from random import Random

from gateway.agent_trace import AgentTrace, TaskTrace
from gateway.demo.kinds import KINDS, Draft, Kind, Size, size_counts

CountTokens = Callable[[str], int]

MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS = 5, 200
# Of the noise on output lengths: one in ten is above 1.5 times the median.
NOISE_SIGMA = 0.32


def about_tokens(prompt: str) -> int:
    """A count for a tokenizer with a vocabulary of a few hundred, when none is at hand."""
    return max(1, round(len(prompt) / 1.6))


def demo_mix(
    seed: int,
    agents: int = 45,
    window_s: float = 6.0,
    scale: float = 1.0,
    count_tokens: CountTokens = about_tokens,
) -> list[AgentTrace]:
    """`agents` agents that arrive within `window_s` seconds, in order of arrival. Raises `ValueError` for an empty mix.

    scale: factor on the number of parallel tasks of medium and large agents, for a longer or shorter run.
    count_tokens: prompt text to tokens; the model's own tokenizer where it is at hand.
    """
    if agents < 1 or window_s < 0 or scale <= 0:
        raise ValueError("a mix needs an agent, a window of zero or more seconds and a scale above zero")
    rng = Random(seed)
    kinds = [kind for size, count in size_counts(agents).items() for kind in _dealt(rng, size, count)]
    rng.shuffle(kinds)
    arrivals = sorted(rng.uniform(0, window_s) for _ in kinds)
    mix = []
    for index, (kind, arrival_s) in enumerate(zip(kinds, arrivals, strict=True)):
        tasks = tuple(_task(rng, draft, count_tokens) for draft in kind.write(rng, scale))
        mix.append(AgentTrace(f"agent-{seed}-{index:03d}", round(arrival_s - arrivals[0], 3), tasks, kind.name))
    return mix


def _dealt(rng: Random, size: Size, count: int) -> list[Kind]:
    """So many kinds of a size, each as often as the others: drawing them freely would leave some out of a small mix."""
    kinds = [kind for kind in KINDS if kind.size == size]
    first = rng.randrange(len(kinds))
    return [kinds[(first + place) % len(kinds)] for place in range(count)]


def _task(rng: Random, draft: Draft, count_tokens: CountTokens) -> TaskTrace:
    noisy = round(draft.output * math.exp(rng.gauss(0, NOISE_SIGMA)))
    return TaskTrace(
        id=draft.id,
        prompt_tokens=count_tokens(draft.prompt),
        output_tokens=max(MIN_OUTPUT_TOKENS, min(MAX_OUTPUT_TOKENS, noisy)),
        after=draft.after,
        think_s=draft.think_s,
        prompt=draft.prompt,
    )


def length_key(salt: str, agent_id: str, task_id: str) -> str:
    """The name under which the engine's table holds a task's output length; it reveals nothing without the table."""
    return hashlib.blake2b(f"{salt}\0{agent_id}\0{task_id}".encode(), digest_size=16).hexdigest()


def length_table(mixes: Iterable[list[AgentTrace]], salt: str) -> dict[str, int]:
    """Key to output tokens, for the engine's side (`engine.lab.forced_length`)."""
    return {
        length_key(salt, agent.agent_id, task.id): task.output_tokens
        for mix in mixes
        for agent in mix
        for task in agent.tasks
    }
