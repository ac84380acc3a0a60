"""The program behind one agent: what its text expresses, what that implies, and what luck adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from gateway.agent_trace import TaskTrace
from gateway.replay.agent_types import MIN_OUTPUT, AgentType
from gateway.replay.texts.laws import (
    AGENT_SIGMA,
    ERRANDS,
    LAWS,
    LEVELS,
    LONGEST_LIST,
    MANNERS,
    MATERIAL_SIGMA,
    PIECE_SIGMA,
    SILENT_SIGMA,
    TASK_SIGMA,
    TASKS_SIGMA,
    TELLING,
    VAGUE,
    WIDTH_SIGMA,
    Telling,
)
from gateway.replay.texts.material import SAID, prose, spelled, thoughts
from gateway.replay.texts.sides import COMMON, Side, Voice
from gateway.replay.texts.tokens import count_tokens

# With these, prompt and output of a task hardly ever come near the 3,000 tokens at which they would be cut.
MOST_OUTPUT = 900
MOST_MATERIAL = 1_400
MOST_TASKS = 160


@dataclass(frozen=True, slots=True)
class Width:
    """How many tasks the agent has, as its text expresses it."""

    telling: Telling
    things: int  # that the text counts
    tasks: float  # that this implies, before noise
    level: int = 0  # where the number is vague


class Program:
    """What one agent sends, and what its tasks cost."""

    def __init__(self, kind: AgentType, words: Random, luck: Random, side: Side, noise: float) -> None:
        """`words` draws what the text expresses, `luck` what it does not; `noise` is a factor on all sigmas of luck."""
        self.kind, self.law, self.longest = kind, LAWS[kind.name], kind.longest
        self.words, self._luck, self._noise = words, luck, noise
        self.voice = Voice(words, side, COMMON)
        self.depth, self.hard = words.randrange(LEVELS), words.randrange(len(self.law.hard))
        self.errand = words.randrange(len(ERRANDS))
        manner = words.randrange(len(MANNERS))
        material = self.law.material * math.exp(words.gauss(0.0, MATERIAL_SIGMA))
        self._material = min(material, MOST_MATERIAL / 1.3)
        self.width = self._errand_width() if kind.shape == "chain" else _width(kind, self.law.tasks_per_thing, words)
        self._thing, _, self._things = self.voice.template(f"things/{kind.name}").partition("|")
        self._number = spelled(words, self.width.things) if self.width.telling == "number" else ""
        self.system = self._system(manner)
        self.tools = side.tools.get(kind.name, ())
        self._overhead = count_tokens(self.system) + sum(count_tokens(tool) for tool in self.tools)
        factor = self.law.depths[self.depth] * MANNERS[manner] * self.law.hard[self.hard]
        factor *= math.pow(self._material / self.law.material, self.law.reads)
        self._output = kind.output * factor * self._log_normal(AGENT_SIGMA)
        sigma = SILENT_SIGMA if self.width.telling == "silent" else TASKS_SIGMA
        count = round(self.width.tasks * self._log_normal(sigma))
        self.count = min(max(count, kind.fewest), MOST_TASKS)

    def material_tokens(self) -> float:
        """Of one document of this agent."""
        return min(self._material * math.exp(self.words.gauss(0.0, PIECE_SIGMA)), MOST_MATERIAL)

    def asked(self) -> str:
        """How deep the answer should go."""
        return self.voice.say(f"{self.law.depth}/{self.depth}")

    def overview(self, titles: list[str], first: bool) -> str:
        """The part of the prompt about how many tasks there will be, other than the heading of a piece."""
        telling = self.width.telling
        if telling == "list" and first:
            told = self.voice.say("told/list", things=self._things)
            return "\n".join([told[0].upper() + told[1:], *(f"- {title}" for title in titles)])
        if telling == "number":
            return self.voice.say("told/number", number=self._number, things=self._things)
        if telling == "vague":
            return self.voice.say(f"told/vague/{self.width.level}", things=self._things)
        return ""

    def heading(self, place: int) -> str:
        """Of the piece that the task at this place is about. More tasks than things: some are done again."""
        if self.width.telling != "of":
            return f"{self._thing.capitalize()}:"
        place = int(place / self.law.tasks_per_thing)
        told = self.voice.say("told/of", thing=self._thing, i=place % self.width.things + 1, m=self.width.things)
        return told[0].upper() + told[1:]

    def task(
        self, name: str, prompt: list[str], after: tuple[str, ...] = (), *, outputs: float = 1.0, think_s: float = 0.0
    ) -> TaskTrace:
        """`prompt`: its paragraphs, of which empty ones are left out; `outputs`: factor on the median."""
        return self.written(name, prompt, self.output_tokens(outputs), after, think_s)

    def written(
        self, name: str, prompt: list[str], output_tokens: int, after: tuple[str, ...] = (), think_s: float = 0.0
    ) -> TaskTrace:
        text = "\n\n".join(paragraph for paragraph in prompt if paragraph)
        prompt_tokens = self._overhead + count_tokens(text)
        return TaskTrace(
            name,
            prompt_tokens,
            min(output_tokens, self.longest - prompt_tokens),
            after,
            round(think_s, 3),
            prompt=text,
            system=self.system or None,
            tools=self.tools,
            max_tokens=self.law.max_tokens,
        )

    def output_tokens(self, outputs: float = 1.0) -> int:
        most = min(MOST_OUTPUT, self.law.max_tokens or MOST_OUTPUT)
        drawn = round(outputs * self._output * self._log_normal(TASK_SIGMA))
        return min(max(drawn, MIN_OUTPUT), most)

    def gather(self, name: str, ask: str, parts: list[TaskTrace], outputs: float) -> TaskTrace:
        """Reads what the parts have written, as far as it fits."""
        output_tokens = self.output_tokens(outputs)
        prompt = [self.voice.say(ask), self.asked()]
        room = self.longest - output_tokens - self._overhead - sum(count_tokens(each) + 2 for each in prompt)
        for part in parts:
            answer = self.answer(part)
            room -= count_tokens(answer) + 2  # with an empty line
            if room < 0:
                break
            prompt.append(answer)
        return self.written(name, prompt, output_tokens, tuple(part.id for part in parts))

    def answer(self, task: TaskTrace) -> str:
        """Stands for what a task would have written: it is as long."""
        if self.kind.shape == "chain":
            return thoughts(self.voice, task.output_tokens)
        return prose(self.words, self.voice.topic, task.output_tokens)

    def world_s(self, low_s: float, high_s: float) -> float:
        return self._luck.uniform(low_s, high_s)

    def _system(self, manner: int) -> str:
        """One in four agents of a plain application sends none."""
        parts = [self.voice.say(f"role/{self.kind.name}"), self.voice.say(f"manner/{manner}")]
        parts += self.words.sample(self.voice.side.wordings["rule"], self.words.randint(0, 3))
        silent = manner == 1 and self.words.random() < 0.25
        return "" if silent else " ".join(parts)

    def _errand_width(self) -> Width:
        if self.words.random() < TELLING["silent"]:
            return Width("silent", 0, self.kind.tasks)
        return Width("vague", 0, self.kind.tasks * ERRANDS[self.errand], self.errand)

    def _log_normal(self, sigma: float) -> float:
        return math.exp(self._luck.gauss(0.0, 1.0) * sigma * self._noise)


def _width(kind: AgentType, tasks_per_thing: float, words: Random) -> Width:
    (telling,) = words.choices(list(TELLING), list(TELLING.values()))
    factor = math.exp(words.gauss(0.0, WIDTH_SIGMA))
    things = max(2, round(kind.tasks * factor / tasks_per_thing))
    if telling == "silent":
        return Width("silent", 0, kind.tasks)
    if telling == "vague":
        level = min(range(LEVELS), key=lambda each: abs(math.log(VAGUE[each] / factor)))
        return Width("vague", 0, kind.tasks * VAGUE[level], level)
    # What is too long to list is counted; samples are nothing to list, and a plan is not yet one of the steps.
    if (telling == "list" and (things > LONGEST_LIST or kind.shape == "samples")) or (
        telling == "of" and kind.shape == "plan"
    ):
        telling = "number"
    if telling == "number":
        things = min(SAID, key=lambda said: abs(math.log(said / things)))
    return Width(telling, things, things * tasks_per_thing)
