"""The nine classes: what their programs send, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from gateway.agent_trace import TaskTrace
from gateway.replay.agent_types import WORLD_THINK_S, AgentType
from gateway.replay.texts.material import claim, code, equation, errand, household, problem, prose, record, title
from gateway.replay.texts.program import MOST_OUTPUT, Program
from gateway.replay.texts.sides import Side


def write_tasks(kind: AgentType, name: str, side: Side, noise: float = 1.0) -> tuple[TaskTrace, ...]:
    """The tasks of one agent of this type. Its name seeds its words and, apart from them, its luck. `noise`: a factor on luck;
    with 0 the tasks are exactly what the text implies."""
    # Seeded by a text, not by hash(): that one differs from run to run.
    words, luck = Random(f"words:{side.name}:{name}"), Random(f"luck:{side.name}:{name}")
    return tuple(_WRITERS[kind.name](Program(kind, words, luck, side, noise)))


def equation_verification(agent: Program) -> list[TaskTrace]:
    """The lines of one solution, each checked; how hard that is shows in the equation, and is mostly stated."""
    rng, voice = agent.words, agent.voice
    goal = equation(rng, agent.hard)
    background = prose(rng, voice.topic, agent.material_tokens())
    named = voice.say(f"hard/{agent.kind.name}/{agent.hard}") if rng.random() < 0.7 else ""
    return _fan_out(agent, "check", [f"{named}\n{goal}".strip(), background], lambda: equation(rng, agent.hard))


def fact_verification(agent: Program) -> list[TaskTrace]:
    """Claims against one document; those of two parts take longer."""
    rng, voice = agent.words, agent.voice
    evidence = prose(rng, voice.topic, agent.material_tokens())
    parts = voice.say(f"hard/{agent.kind.name}/{agent.hard}") if rng.random() < 0.5 else ""
    given = [parts, f"{voice.say('label/material')}\n{evidence}"]
    return _fan_out(agent, "claim", given, lambda: claim(rng, voice.topic, 1 + agent.hard))


def kbqa_verification(agent: Program) -> list[TaskTrace]:
    """Claims against entries of a knowledge base; how many must be joined is stated."""
    rng, voice = agent.words, agent.voice
    entries = record(rng, voice.topic, agent.material_tokens())
    hops = voice.say(f"hard/{agent.kind.name}/{agent.hard}")
    given = [hops, f"{voice.say('label/material')}\n{entries}"]
    return _fan_out(agent, "triple", given, lambda: claim(rng, voice.topic, 1))


def alfworld(agent: Program) -> list[TaskTrace]:
    """Think, act, wait for the world, with the story so far in every prompt."""
    rng, voice = agent.words, agent.voice
    thing, place = rng.choice(voice.side.belongings), rng.choice(voice.side.furniture)
    key = "errand/silent" if agent.width.telling == "silent" else f"errand/{agent.errand}"
    story = [
        f"{voice.say('label/example')}\n{errand(voice, agent.material_tokens())}",
        household(voice, "seen"),
        voice.say(key, thing=thing, place=place),
        agent.asked(),
    ]
    turns = [agent.task("turn-0", [*story, voice.say("ask/alfworld")])]
    for i in range(1, agent.count):
        before = turns[-1]
        story += [agent.answer(before), household(voice, "seen")]
        turn = agent.task(
            f"turn-{i}",
            [*story, voice.say("ask/alfworld")],
            (before.id,),
            think_s=agent.world_s(*WORLD_THINK_S),
        )
        if turn.prompt_tokens + MOST_OUTPUT > agent.longest:
            break
        turns.append(turn)
    return turns


def code_checking(agent: Program) -> list[TaskTrace]:
    """The functions of a change, each reviewed. The focus is worded for this class, as deep as the answer is to be."""
    voice = agent.voice
    focus = voice.say(f"focus/{agent.depth}")
    names = [title(agent.words, voice.topic) for _ in range(agent.width.things)]
    return [
        agent.task(
            f"function-{i}",
            [
                f"{voice.say('ask/code-checking')} {focus}",
                agent.overview(names, first=i == 0),
                agent.heading(i),
                f"{voice.say('label/code')}\n{code(voice, agent.material_tokens())}",
                agent.asked() if agent.words.random() < 0.5 else "",
            ],
        )
        for i in range(agent.count)
    ]


def self_consistency(agent: Program) -> list[TaskTrace]:
    """One problem, many samples: every prompt is the same."""
    rng, voice = agent.words, agent.voice
    named = voice.say(f"hard/{agent.kind.name}/{agent.hard}") if rng.random() < 0.5 else ""
    background = prose(rng, voice.topic, agent.material_tokens())
    told = agent.heading(0) if agent.width.telling == "of" else agent.overview([], first=True)
    prompt = [told, voice.say("ask/self-consistency"), named, problem(voice, agent.hard), background, agent.asked()]
    return [agent.task(f"sample-{i}", prompt) for i in range(agent.count)]


def plan_and_execute(agent: Program) -> list[TaskTrace]:
    """A plan, what it lists beside each other, and an answer from all of it."""
    rng, voice = agent.words, agent.voice
    titles = [title(rng, voice.topic) for _ in range(agent.width.things)]
    goal = [voice.say("goal", topic=voice.topic.name), prose(rng, voice.topic, agent.material_tokens()), agent.asked()]
    plan = agent.task("plan", [voice.say("ask/plan"), agent.overview(titles, first=True), *goal])
    made = agent.answer(plan)
    steps = []
    for i in range(agent.count):
        step = titles[i % len(titles)] if titles else title(rng, voice.topic)
        steps.append(
            agent.task(f"step-{i}", [*goal, made, f"{voice.say('ask/step')} {agent.heading(i)} {step}"], (plan.id,))
        )
    return [plan, *steps, agent.gather("answer", "ask/answer", steps, outputs=1.5)]


def document_merging(agent: Program) -> list[TaskTrace]:
    """Many mergers of two documents, and a vote."""

    def two() -> str:
        half = agent.material_tokens() / 2
        return "\n\n".join(prose(agent.words, agent.voice.topic, half) for _ in range(2))

    merges = _long_work(agent, "merge", two)
    return [*merges, agent.gather("vote", "ask/vote", merges, outputs=0.5)]


def map_reduce_summary(agent: Program) -> list[TaskTrace]:
    """Chapters, each cut into about three parts; a summary of each part, and one of all of them."""
    maps = _long_work(agent, "map", lambda: prose(agent.words, agent.voice.topic, agent.material_tokens()))
    return [*maps, agent.gather("reduce", "ask/reduce", maps, outputs=2.0)]


def _fan_out(agent: Program, name: str, given: list[str], piece: Callable[[], str]) -> list[TaskTrace]:
    """The same is given to all, and each is asked about its piece, before or after it. Those that the text counts are made
    first, so that the first prompt does not depend on how many tasks there turn out to be."""
    voice = agent.voice
    counted = [piece() for _ in range(agent.width.things)]
    asks = {"claim": "ask/verify", "triple": "ask/verify"}.get(name, f"ask/{agent.kind.name}")
    last = agent.words.random() < 0.5
    tasks = []
    for i in range(agent.count):
        question = [f"{voice.say(asks)} {agent.asked()}", agent.overview(counted, first=i == 0)]
        own = f"{agent.heading(i)} {counted[i % len(counted)] if counted else piece()}"
        tasks.append(agent.task(f"{name}-{i}", [*given, *question, own] if last else [*question, own, *given]))
    return tasks


def _long_work(agent: Program, name: str, piece: Callable[[], str]) -> list[TaskTrace]:
    voice = agent.voice
    titles = [title(agent.words, voice.topic) for _ in range(agent.width.things)]
    opening = voice.say("open", topic=voice.topic.name)
    ask = f"{voice.say(f'ask/{name}')} {agent.asked()}"
    return [
        agent.task(f"{name}-{i}", [opening, agent.overview(titles, first=i == 0), ask, agent.heading(i), piece()])
        for i in range(agent.count)
    ]


_WRITERS: dict[str, Callable[[Program], list[TaskTrace]]] = {
    "equation-verification": equation_verification,
    "fact-verification": fact_verification,
    "kbqa-verification": kbqa_verification,
    "alfworld": alfworld,
    "code-checking": code_checking,
    "self-consistency": self_consistency,
    "plan-and-execute": plan_and_execute,
    "document-merging": document_merging,
    "map-reduce-summary": map_reduce_summary,
}
