"""Does the engine with our scheduler compute what vLLM's own does, and as fast? `python -m gateway.bench.engine_check`

Engines of the same model stand side by side: two stock ones (`--scheduling-policy priority`) and one with our scheduler,
its link on and somebody listening. All are sent the same requests, with the same tags, at once and in more memory than
they have, so that each scheduler puts together steps of its own and preempts whom it will. Then

* every token is compared. Greedy decoding in float32 gives the same tokens in whatever steps they are computed, but for
  two tokens that are equally likely to within rounding. So the two best of each token are asked for: rounding is
  measured, and where answers part, the gap says whether that was a tie. Stock against stock is one control. The other
  has to differ: the same requests, but for the first token of each prompt.
* output tokens a second are measured in alternating rounds, as ratios within a round; stock against stock is the noise.

One JSON line is appended to the file for each run. `--gpu` is the same on an NVIDIA GPU, the speed measured on a model
of the size of a 7B Llama with weights made up by the engine, after the tests that need no engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table

from engine.hints import Hints, to_fields
from engine.launcher import EngineFailed, EngineProcess, EngineSpec, on_cpu
from engine.link import LinkError
from gateway.bench import check_models, environment
from gateway.bench.engine_watch import watching
from gateway.bench.processes import ServerFailed, apart, run_once

MODEL, ADAPTER, ANOTHER = "tiny", "adapter", "another-adapter"
STOCK, AGAIN, OURS = "stock", "stock-again", "justitia"
# Tokens in blocks: the least that vLLM's attention takes on a CPU, and its default on a GPU.
BLOCK_SIZE_CPU, BLOCK_SIZE_GPU = 32, 16
# The tiny model with its weights; the others are made up by the engine.
SIZES = ("tiny", "rehearsal", "7b")
MAX_MODEL_LEN = 2048
BATCHED_TOKENS = 256
# Ids of the tiny tokenizer: the first ends a text.
FIRST_ID, LAST_ID = 1, 511
# In log probability. Ten times what rounding in float32 was seen to do, and a hundredth of what most gaps are.
TIE = 1e-4
# vLLM's log probability of a token that is not allowed is -9999.
NO_OTHER = 1000.0
ANSWER_S = 600.0
NO_GPU = (
    "there is no NVIDIA GPU here that vLLM could use: this check is for a machine with one, with vLLM's own build "
    "installed. `--rehearse` runs all of it on the CPU, at a tiny size"
)

REGEX = "(left|right|up|down)( (left|right|up|down)){12}"
CHOICES = ["a small agent", "a large agent", "no agent at all"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "limit": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 2, "maxItems": 6},
    },
    "required": ["name", "limit", "tags"],
    "additionalProperties": False,
}


class CheckFailed(Exception):
    """An engine answered something that cannot be compared."""


@dataclass(frozen=True, slots=True)
class CheckSettings:
    seed: int = 0
    waves: int = 3  # crowds of requests, one after the other
    crowd: int = 8  # requests of each kind in a crowd
    kv_tokens: int = 3072  # the cache of the engines whose tokens are compared: far less than a crowd asks for
    max_num_seqs: int = 32
    rounds: int = 40  # of throughput
    requests: int = 128  # of each engine in a round
    prompt_tokens: int = 32
    output_tokens: int = 64
    warm_up_rounds: int = 2
    target: float = 0.02  # of throughput that may be lost
    control: bool = True  # a second stock engine
    size: str = "tiny"  # of the model whose throughput is measured: one of `SIZES`
    tokens: bool = True  # compare tokens
    speed: bool = True  # measure throughput


# The requests


class Case(NamedTuple):
    """One request, to be sent to every engine."""

    kind: str
    body: dict[str, Any]
    stream: bool = False
    leave_after: int = 0  # chunks of the stream after which the client leaves; 0: it stays


def crowd(seed: int, kinds: Iterable[str], count: int) -> list[Case]:
    """`count` requests of each kind, in random order. The same seed gives the same requests."""
    chosen = random.Random(seed)
    cases = [_case(chosen, kind, number) for kind in kinds for number in range(count)]
    chosen.shuffle(cases)
    for number, case in enumerate(cases):
        # Tags in another order than arrivals: who runs, and who is preempted, then differs between the schedulers.
        agent = chosen.randrange(6)
        priority, xargs = to_fields(Hints(1000 + agent, f"agent-{agent}", number))
        case.body.update(priority=priority, vllm_xargs=xargs)
    return cases


def _case(chosen: random.Random, kind: str, number: int) -> Case:
    def ids(least: int, most: int) -> list[int]:
        return [chosen.randint(FIRST_ID, LAST_ID) for _ in range(chosen.randint(least, most))]

    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": ids(20, 60),
        "temperature": 0,
        "max_tokens": chosen.randint(80, 160),
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logprobs": 2,
    }
    match kind:
        case "LoRA":
            body["model"] = ADAPTER
        case "another LoRA":
            body["model"] = ANOTHER
        case "chunked prefill" | "LoRA, chunked prefill":  # more than fits into one step
            body["model"] = MODEL if kind == "chunked prefill" else ADAPTER
            body |= {"prompt": ids(2 * BATCHED_TOKENS, 4 * BATCHED_TOKENS), "max_tokens": 80}
        case "shared beginnings":
            common = random.Random(number % 2)
            beginning = [common.randint(FIRST_ID, LAST_ID) for _ in range(192)]
            body |= {"prompt": beginning + ids(8, 40), "max_tokens": 60}
        case "n > 1":
            # vLLM has no n > 1 without sampling. From one candidate it is greedy all the same.
            body |= {"n": 3, "temperature": 1.0, "top_k": 1, "max_tokens": 60}
        case "n > 1, sampled":
            body |= {"n": 3, "temperature": 0.7, "seed": chosen.randrange(2**31), "max_tokens": 60}
        case "structured output":
            body |= {"ignore_eos": False, "max_tokens": 200}
            match number % 3:
                case 0:
                    schema = {"name": "call", "schema": SCHEMA, "strict": True}
                    body["response_format"] = {"type": "json_schema", "json_schema": schema}
                case 1:
                    body["structured_outputs"] = {"regex": REGEX}
                case _:
                    body["structured_outputs"] = {"choice": CHOICES}
        case "penalties":  # which rest on what was put out before a preemption
            body |= {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.1}
        case "few tokens allowed":  # so that text repeats, and drafts made of what came before are taken
            body |= {"allowed_token_ids": chosen.sample(range(FIRST_ID, LAST_ID), 2), "max_tokens": 120}
        case "plain" | "streaming" | "clients that leave":
            pass
        case _:
            raise ValueError(f"no such kind: {kind}")
    leave_after = chosen.randint(2, 40) if kind == "clients that leave" else 0
    return Case(kind, body, kind in ("streaming", "clients that leave"), leave_after)


def altered(cases: Sequence[Case]) -> list[Case]:
    """The same requests, but for the first token of each prompt."""
    return [
        case._replace(body=case.body | {"prompt": [case.body["prompt"][0] % LAST_ID + 1, *case.body["prompt"][1:]]})
        for case in cases
    ]


# The answers


class Token(NamedTuple):
    id: int
    logprob: float
    gap: float  # to the best other one, in log probability


class Answer(NamedTuple):
    """choices: the tokens of each. cached_tokens: of the prompt, found in the prefix cache."""

    choices: list[list[Token]]
    cached_tokens: int = 0


class Engine:
    """An engine that serves, as its clients see it."""

    def __init__(self, socket: Path) -> None:
        connector = aiohttp.UnixConnector(str(socket), limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        self._session = aiohttp.ClientSession("http://engine", connector=connector, timeout=timeout)

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, case: Case) -> Answer:
        """Raises `CheckFailed` for any answer but 200."""
        if case.stream:
            return await self._stream(case)
        answer = await self._post(case.body)
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        details = answer["usage"].get("prompt_tokens_details") or {}
        return Answer([_tokens(choice) for choice in choices], int(details.get("cached_tokens") or 0))

    async def ask_all(self, cases: Sequence[Case]) -> list[Answer]:
        """At once, in the order of `cases`; but first one of those that share a beginning, for the others to find it."""
        first = next((number for number, case in enumerate(cases) if case.kind == "shared beginnings"), None)
        early = None if first is None else await self.ask(cases[first])
        rest = await asyncio.gather(*(self.ask(case) for number, case in enumerate(cases) if number != first))
        return rest if first is None or early is None else [*rest[:first], early, *rest[first:]]

    async def ask_in_turn(self, cases: Sequence[Case]) -> list[Answer]:
        return [await self.ask(case) for case in cases]

    async def tokens_per_s(self, bodies: Sequence[dict[str, Any]]) -> float:
        """Output tokens, all bodies at once."""
        start = time.perf_counter()
        answers = await asyncio.gather(*(self._post(body) for body in bodies))
        taken_s = time.perf_counter() - start
        return sum(int(answer["usage"]["completion_tokens"]) for answer in answers) / taken_s

    async def counters(self) -> dict[str, float]:
        """vLLM's counters, summed over their labels, without `vllm:` and `_total`."""
        async with self._session.get("/metrics") as response:
            text = await response.text()
        counted: dict[str, float] = {}
        for name, value in re.findall(r"^vllm:(\w+?)_total(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            counted[name] = counted.get(name, 0.0) + float(value)
        return counted

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        async with self._session.post("/v1/completions", json=body) as response:
            answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise CheckFailed(f"status {response.status}: {answer}")
        return answer

    async def _stream(self, case: Case) -> Answer:
        tokens: list[Token] = []
        chunks = 0
        async with self._session.post("/v1/completions", json=case.body | {"stream": True}) as response:
            if response.status != 200:
                raise CheckFailed(f"status {response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise CheckFailed(f"in a stream: {event['error']}")
                for choice in event["choices"]:
                    tokens += _tokens(choice)
                chunks += 1
                if chunks == case.leave_after:
                    break
        return Answer([tokens])


def _tokens(choice: dict[str, Any]) -> list[Token]:
    ids: list[int] = choice["token_ids"] or []
    if not ids:
        return []
    logprobs = choice["logprobs"]
    if len(logprobs["token_logprobs"]) != len(ids):
        raise CheckFailed(f"{len(ids)} tokens, and {len(logprobs['token_logprobs'])} log probabilities")
    tokens = []
    for number, logprob, best in zip(ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        others = [value for name, value in best.items() if name != f"token_id:{number}"]
        tokens.append(Token(number, logprob, abs(logprob - max(others)) if others else float("inf")))
    return tokens


# The comparison


@dataclass(slots=True)
class Tally:
    """Of one kind. `differing`: choices that part where it was no tie, or of which one is longer."""

    requests: int = 0
    choices: int = 0
    tokens: int = 0  # compared and found equal
    tokens_after_ties: int = 0  # not compared: after a tie the texts are different ones
    ties: int = 0
    differing: int = 0
    rounding: float = 0.0  # the largest difference of one token's log probability
    smallest_gap: float = float("inf")  # between the two best of any token

    def add(self, case: Case, one: Answer, other: Answer) -> None:
        self.requests += 1
        if len(one.choices) != len(other.choices):
            self.differing += 1
        for mine, yours in zip(one.choices, other.choices, strict=False):
            self.choices += 1
            self._add_choice(mine, yours, whole=not case.leave_after)

    def _add_choice(self, one: list[Token], other: list[Token], *, whole: bool) -> None:
        for position, (mine, yours) in enumerate(zip(one, other, strict=False)):
            if mine.id != yours.id:
                if max(mine.gap, yours.gap) <= TIE:
                    self.ties += 1
                    self.tokens_after_ties += len(one) - position
                else:
                    self.differing += 1
                return
            self.tokens += 1
            self.rounding = max(self.rounding, abs(mine.logprob - yours.logprob))
            self.smallest_gap = min(self.smallest_gap, mine.gap)
        # Who leaves may have seen more of one stream than of the other.
        if whole and len(one) != len(other):
            self.differing += 1

    def figures(self) -> dict[str, Any]:
        figures = asdict(self)
        figures["rounding"] = float(f"{self.rounding:.2g}")
        # Where one token alone was allowed there is no other.
        figures["smallest_gap"] = float(f"{self.smallest_gap:.2g}") if self.smallest_gap < NO_OTHER else None
        return figures


@dataclass(slots=True)
class Comparison:
    kinds: dict[str, Tally] = field(default_factory=dict)

    def add(self, cases: Sequence[Case], one: Sequence[Answer], other: Sequence[Answer]) -> None:
        for case, mine, yours in zip(cases, one, other, strict=True):
            self.kinds.setdefault(case.kind, Tally()).add(case, mine, yours)

    @property
    def choices(self) -> int:
        return sum(tally.choices for tally in self.kinds.values())

    @property
    def tokens(self) -> int:
        return sum(tally.tokens for tally in self.kinds.values())

    @property
    def ties(self) -> int:
        return sum(tally.ties for tally in self.kinds.values())

    @property
    def differing(self) -> int:
        return sum(tally.differing for tally in self.kinds.values())

    def figures(self) -> dict[str, Any]:
        kinds = {kind: tally.figures() for kind, tally in sorted(self.kinds.items())}
        return {"tokens": self.tokens, "ties": self.ties, "differing": self.differing, "kinds": kinds}


# The engines


@dataclass(frozen=True, slots=True)
class Setup:
    """Engines whose tokens are compared, and with which requests.

    quiet: kinds that are asked for one at a time, after the crowd. On a CPU vLLM 0.32 does not survive a request with a
    seed whose prompt is computed in parts.
    """

    name: str
    args: tuple[str, ...]
    kinds: tuple[str, ...]
    quiet: tuple[str, ...] = ()
    overlapped: bool = False  # a step is scheduled before the last one's tokens are back


EVERYDAY = (
    "plain",
    "chunked prefill",
    "shared beginnings",
    "n > 1",
    "structured output",
    "penalties",
    "streaming",
    "clients that leave",
)


# On a CPU vLLM 0.32 computes requests without an adapter with one, in steps that they share with requests that have one
# (its index -1 takes the last): two stock engines then differ as well.
ADAPTED = ("LoRA", "another LoRA", "LoRA, chunked prefill")


def setups(adapter: Path, another: Path) -> list[Setup]:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    lora: tuple[str, ...] = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", str(check_models.LORA_RANK))
    lora += ("--lora-modules", f"{ADAPTER}={adapter}", f"{ANOTHER}={another}")
    return [
        Setup("async scheduling", ("--async-scheduling",), EVERYDAY, overlapped=True),
        Setup("one step at a time", ("--no-async-scheduling",), EVERYDAY, quiet=("n > 1, sampled",)),
        Setup(
            "n-gram speculative decoding",
            ("--speculative-config", json.dumps(drafts)),
            ("plain", "chunked prefill", "few tokens allowed", "structured output", "streaming"),
        ),
        Setup("LoRA", lora, ADAPTED if on_cpu() else (*ADAPTED, "plain", "streaming")),
    ]


# vLLM's CPU platform turns async scheduling off. As a plugin of vLLM's this turns it on again, for the comparison only.
PLUGIN = """
import sys

from vllm.platforms.cpu import CpuPlatform


def register():
    told = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        told(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True
        sys.stderr.write("async scheduling is on, on a CPU\\n")

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
"""
PLUGIN_SAYS = "async scheduling is on, on a CPU"
PLUGIN_NAME = "justitia_async_on_cpu"


@contextlib.contextmanager
def async_on_cpu(directory: Path) -> Iterator[None]:
    """Engines that are started meanwhile overlap their steps on a CPU too."""
    metadata = directory / f"{PLUGIN_NAME}-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN_NAME}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PLUGIN_NAME} = {PLUGIN_NAME}:register\n")
    (directory / f"{PLUGIN_NAME}.py").write_text(PLUGIN)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(directory), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class Stage:
    """Where engines are started: directories, settings, and whom to tell."""

    def __init__(self, settings: CheckSettings, directory: Path, models: dict[str, Path], console: Console) -> None:
        self.settings = settings
        self.models = models
        self.console = console
        self._directory = directory
        self._started = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (STOCK, AGAIN, OURS) if self.settings.control else (STOCK, OURS)

    @contextlib.asynccontextmanager
    async def engines(
        self, what: str, model: Path, *args: str, overlapped: bool = False
    ) -> AsyncIterator[dict[str, Engine]]:
        """One of each name, serving; somebody listens to the link of ours. Raises `EngineFailed` and `CheckFailed`."""
        self.console.print(f"{what}: starting {len(self.names)} engines")
        async with contextlib.AsyncExitStack() as stack:
            processes: dict[str, EngineProcess] = {}
            if overlapped and on_cpu():
                stack.enter_context(async_on_cpu(self._directory / "plugin"))
            for name in self.names:
                process = EngineProcess(self._spec(name, model, args))
                stack.push_async_callback(process.stop, 5.0)
                processes[name] = process
                await process.start()
                if not on_cpu():
                    # vLLM measures how much of the GPU's memory is free, and takes others' starting for a mistake.
                    await process.wait_ready(1800)
            await asyncio.gather(*(process.wait_ready(600) for process in processes.values()))
            if overlapped and on_cpu():
                for process in processes.values():
                    if PLUGIN_SAYS not in process.spec.log.read_text(errors="replace"):
                        raise CheckFailed("vLLM did not take the plugin that turns async scheduling on")
            if on_cpu() and (pid := processes[OURS].pid) is not None:
                stack.enter_context(apart(pid))
            watch = await stack.enter_async_context(watching(processes[OURS].spec.link_address))
            yield {
                name: await stack.enter_async_context(Engine(process.spec.socket))
                for name, process in processes.items()
            }
            if watch.figures() is None:
                raise CheckFailed("nothing was heard on the link")

    def _spec(self, name: str, model: Path, args: tuple[str, ...]) -> EngineSpec:
        self._started += 1
        machine: tuple[str, ...] = ()
        if not on_cpu():
            machine = ("--gpu-memory-utilization", f"{0.9 / len(self.names):.3f}")
        return EngineSpec(
            model=str(model),
            runtime_dir=self._directory / f"e{self._started}",
            max_num_seqs=self.settings.max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            block_size=block_size(),
            scheduler="justitia" if name == OURS else "stock",
            extra_args=("--served-model-name", MODEL, "--seed", "0", *machine, *args),
        )


def block_size() -> int:
    return BLOCK_SIZE_CPU if on_cpu() else BLOCK_SIZE_GPU


async def compare(stage: Stage, setup: Setup) -> dict[str, Any]:
    """The record of one setup. Raises `EngineFailed` and `CheckFailed`."""
    settings = stage.settings
    ours, control, other_prompts = Comparison(), Comparison(), Comparison()
    moved_choices = 0
    cached = dict.fromkeys(stage.names, 0)
    args: tuple[str, ...] = ("--num-gpu-blocks-override", str(settings.kv_tokens // block_size()))
    args += ("--dtype", "float32")
    args += ("--max-num-batched-tokens", str(BATCHED_TOKENS), "--logprobs-mode", "processed_logprobs", *setup.args)
    async with stage.engines(setup.name, stage.models["lively"], *args, overlapped=setup.overlapped) as engines:
        before = {name: await engine.counters() for name, engine in engines.items()}
        for wave in range(settings.waves):
            cases = crowd(settings.seed + wave, setup.kinds, settings.crowd)
            quiet = crowd(settings.seed + wave, setup.quiet, settings.crowd)
            answers: dict[str, list[Answer]] = {}
            for name, engine in engines.items():
                answers[name] = [*await engine.ask_all(cases), *await engine.ask_in_turn(quiet)]
                cached[name] += sum(answer.cached_tokens for answer in answers[name])
            ours.add([*cases, *quiet], answers[STOCK], answers[OURS])
            if AGAIN in answers:
                control.add([*cases, *quiet], answers[STOCK], answers[AGAIN])
            if wave == 0:
                # Only the first token differs, so whatever differs in the answers came through the cache.
                chosen = [(case, answer) for case, answer in zip(cases, answers[STOCK], strict=False) if free(case)]
                again = await engines[STOCK].ask_all(altered([case for case, _ in chosen]))
                other_prompts.add([case for case, _ in chosen], [answer for _, answer in chosen], again)
                moved_choices = sum(moved(answer, other) for (_, answer), other in zip(chosen, again, strict=True))
        after = {name: await engine.counters() for name, engine in engines.items()}
    counted = {name: {key: after[name][key] - before[name].get(key, 0.0) for key in after[name]} for name in engines}
    figures = {
        "setup": setup.name,
        "args": list(args),
        "justitia": ours.figures(),
        "preemptions": {name: int(counted[name].get("num_preemptions", 0)) for name in engines},
        "cached_tokens": cached,
        "control_stock_again": control.figures() if settings.control else None,
        "control_other_prompts": {
            "choices": other_prompts.choices,
            "moved": moved_choices,
            "differing": other_prompts.differing + other_prompts.ties,
        },
    }
    if "--speculative-config" in args:
        for key in ("draft", "accepted"):
            name = f"spec_decode_num_{key}_tokens"
            figures[f"{key}_tokens"] = {engine: int(counted[engine].get(name, 0)) for engine in engines}
    figures["failures"] = equality_failures(figures)
    return figures


def free(case: Case) -> bool:
    """Whether the whole prompt is its own, and any token may follow."""
    return case.kind in ("plain", "chunked prefill", *ADAPTED)


def moved(one: Answer, other: Answer) -> bool:
    """Whether any token, or its log probability by more than rounding, is another one."""
    pairs = [
        (a, b)
        for mine, yours in zip(one.choices, other.choices, strict=True)
        for a, b in zip(mine, yours, strict=False)
    ]
    return any(a.id != b.id or abs(a.logprob - b.logprob) > TIE for a, b in pairs)


def equality_failures(figures: dict[str, Any]) -> list[str]:
    """What keeps a setup from having shown that the tokens are the same; empty when nothing does."""
    failures = []
    ours, other, again = figures["justitia"], figures["control_other_prompts"], figures["control_stock_again"]
    if ours["differing"]:
        failures.append(f"{ours['differing']} answers differ from the stock engine's")
    if again is not None and again["differing"]:
        failures.append(f"{again['differing']} answers of two stock engines differ: these cannot be compared")
    if not ours["tokens"]:
        failures.append("no token was compared")
    for kind, tally in ours["kinds"].items():
        if not tally["tokens"]:
            failures.append(f"no token was compared of {kind}")
        if tally["ties"] * 20 > tally["choices"] + 20:
            failures.append(
                f"{tally['ties']} ties among {tally['choices']} answers are too many to call them that: {kind}"
            )
    failures += [f"nothing was preempted on {name}" for name in (STOCK, OURS) if not figures["preemptions"][name]]
    if "shared beginnings" in ours["kinds"]:
        failures += [
            f"no token came from the prefix cache on {n}" for n in (STOCK, OURS) if not figures["cached_tokens"][n]
        ]
    if "accepted_tokens" in figures:
        failures += [f"no draft was accepted on {n}" for n in (STOCK, OURS) if not figures["accepted_tokens"][n]]
    if other["moved"] < 0.9 * other["choices"] or other["differing"] < 0.5 * other["choices"]:
        failures.append("answers hardly depend on what came first: equal ones would show nothing")
    return failures


# Throughput


async def throughput(stage: Stage) -> dict[str, Any]:
    """Output tokens a second of each engine, in alternating rounds. Raises `EngineFailed` and `CheckFailed`."""
    settings = stage.settings
    bodies = [case.body for case in _work(settings)]
    args: tuple[str, ...] = ("--no-enable-prefix-caching",)
    if settings.size != "tiny":
        args += ("--load-format", "dummy", "--dtype", "float32" if on_cpu() else "bfloat16")
    if on_cpu():
        # All fit: then every step is the same one on all engines, and a ratio shows what a step costs.
        tokens = settings.max_num_seqs * (settings.prompt_tokens + settings.output_tokens + BLOCK_SIZE_CPU)
        args += ("--num-gpu-blocks-override", str(tokens // BLOCK_SIZE_CPU + 1))
    rounds: list[dict[str, float]] = []
    async with stage.engines("throughput", stage.models[settings.size], *args) as engines:
        names = list(engines)
        for number in range(-settings.warm_up_rounds, settings.rounds):
            # Each engine comes first, second and last equally often.
            turn = number % len(names)
            rates = {name: await engines[name].tokens_per_s(bodies) for name in (*names[turn:], *names[:turn])}
            if number >= 0:
                rounds.append(rates)
        alike = await _same_tokens(settings, engines)
    ratios = {name: spread([each[name] / each[STOCK] for each in rounds]) for name in names if name != STOCK}
    return {
        "model": settings.size,
        "args": list(args),
        "tokens_per_s": {name: round(statistics.median(each[name] for each in rounds), 1) for name in names},
        "ratio": ratios[OURS],
        "control_ratio": ratios.get(AGAIN),
        "target": settings.target,
        "verdict": verdict(ratios[OURS], settings.target),
        "same_tokens": alike,
        "rounds": [{name: round(rate, 1) for name, rate in each.items()} for each in rounds],
    }


def _work(settings: CheckSettings) -> list[Case]:
    cases = crowd(settings.seed, ["plain"], settings.requests)
    chosen = random.Random(settings.seed)
    for case in cases:
        for name in ("logprobs", "return_token_ids", "return_tokens_as_token_ids"):
            del case.body[name]
        case.body["prompt"] = [chosen.randint(FIRST_ID, LAST_ID) for _ in range(settings.prompt_tokens)]
        case.body["max_tokens"] = settings.output_tokens
    return cases


async def _same_tokens(settings: CheckSettings, engines: dict[str, Engine]) -> dict[str, Any]:
    """How many answers of a crowd agree at this model's size and precision. Told, and not judged.

    In bfloat16 ties are frequent, so stock engines differ among themselves as well.
    """
    cases = crowd(settings.seed + 1, ["plain"], settings.crowd * 4)
    answers = {name: await engine.ask_all(cases) for name, engine in engines.items()}
    told: dict[str, Any] = {}
    for name in engines:
        if name == STOCK:
            continue
        equal = sum(
            [[token.id for token in choice] for choice in one.choices]
            == [[token.id for token in choice] for choice in other.choices]
            for one, other in zip(answers[STOCK], answers[name], strict=True)
        )
        told[name] = {"answers": len(cases), "equal": equal}
    return told


def spread(values: Sequence[float]) -> dict[str, float]:
    """sure_low to sure_high holds the median of all rounds there could be, with a probability of 95 % or more.

    Those are order statistics (the sign test's interval), for which the values need no distribution.
    """
    ordered = sorted(values)
    count = len(ordered)
    low, median, high = statistics.quantiles(ordered, n=4) if count > 1 else ordered * 3
    # The largest number of values that may be left out at each end; below six rounds none.
    out = 0
    while 2 * sum(math.comb(count, k) for k in range(out + 1)) / 2**count <= 0.05:
        out += 1
    out = max(out - 1, 0)
    figures = {"median": median, "sure_low": ordered[out], "sure_high": ordered[-1 - out]}
    figures |= {"quartile_low": low, "quartile_high": high, "min": ordered[0], "max": ordered[-1]}
    return {name: round(value, 4) for name, value in figures.items()}


def verdict(ratio: dict[str, float], target: float) -> str:
    """`met`, `missed`, or `undecided` where the rounds scatter too much to tell."""
    if ratio["sure_low"] >= 1 - target:
        return "met"
    return "missed" if ratio["sure_high"] < 1 - target else "undecided"


# The whole


async def check(settings: CheckSettings, console: Console, *, gpu: bool, rehearsal: bool) -> dict[str, Any]:
    """One run, as the record that is written. Raises `EngineFailed`, `CheckFailed`, `ServerFailed` and `LinkError`."""
    failures: list[str] = []
    tests = run_tests(console) if gpu else None
    if tests is not None and tests["exit_code"]:
        failures.append(f"the tests without an engine: {tests['summary']}")
    equality: list[dict[str, Any]] = []
    unexercised: dict[str, str] = {}
    speed: dict[str, Any] | None = None
    # Sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="justitia-check-", dir="/tmp") as temporary:
        directory = Path(temporary)
        stage = Stage(settings, directory, await make_models(directory), console)
        if settings.tokens:
            for setup in setups(stage.models["adapter"], stage.models["another adapter"]):
                try:
                    figures = await compare(stage, setup)
                except EngineFailed as error:
                    unexercised[setup.name] = error.reason
                    failures.append(f"{setup.name}: {error}")
                    continue
                equality.append(figures)
                failures += [f"{setup.name}: {failure}" for failure in figures["failures"]]
                console.print(equality_table(figures))
        if on_cpu():
            unexercised["async scheduling as shipped"] = "vLLM turns it off on a CPU; a plugin turned it on here"
            mixed = "vLLM's CPU build applies the adapter to both"
            unexercised["requests with and without an adapter in one step"] = mixed
            unexercised["CUDA graphs, bfloat16, attention on a GPU"] = "there is no GPU"
        if settings.speed:
            speed = await throughput(stage)
            console.print(speed_table(speed))
            if speed["verdict"] == "missed":
                failures.append(f"throughput is {speed['ratio']['median']:.3f} of the stock engine's")
    return {
        "benchmark": "gpu-check" if gpu else "engine-check",
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "passed": not failures,
        "failures": failures,
        "rehearsal": rehearsal,
        "settings": asdict(settings),
        "tests": tests,
        "equality": equality,
        "not_exercised": unexercised,
        "throughput": speed,
        "versions": environment.versions(),
        "machine": environment.machine(),
        "accelerators": accelerators(),
    }


async def make_models(directory: Path) -> dict[str, Path]:
    """By name: tiny, lively, adapter, another adapter, and those of `SIZES`. Raises `ServerFailed`."""
    tiny = directory / "tiny"
    # In a process of its own: this one is the client, and stays light without torch.
    command = [sys.executable, "-m", "engine.tiny_model", str(tiny)]
    await run_once("making the tiny model", command, log=directory / "model.log")
    return {
        "tiny": tiny,
        "lively": check_models.lively(directory / "lively", tiny),
        "adapter": check_models.lora(directory / "adapter", tiny),
        "another adapter": check_models.lora(directory / "another-adapter", tiny, seed=1),
        "7b": check_models.of_size(directory / "7b", tiny, check_models.SIZE_7B),
        "rehearsal": check_models.of_size(directory / "rehearsal", tiny, check_models.SIZE_REHEARSAL),
    }


def run_tests(console: Console) -> dict[str, Any]:
    """Those that need no engine, but vLLM's classes: the contracts with it first of all."""
    root = Path(__file__).resolve().parents[2]
    places = [place for place in ("tests/contracts", "tests/engine") if (root / place).is_dir()]
    if not places:
        return {"places": [], "exit_code": 1, "summary": "there are no tests here: run this in a checkout"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not engine", *places]
    console.print(" ".join(["pytest", *command[3:]]))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        console.print(done.stdout[-4000:] + done.stderr[-2000:], markup=False)
    return {"places": places, "exit_code": done.returncode, "summary": lines[-1].strip("= ") if lines else "no output"}


def accelerators() -> list[dict[str, str]]:
    """The NVIDIA GPUs and their driver, as `nvidia-smi` names them; none where it is not there."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    keys = ("name", "driver", "memory", "compute_capability")
    return [dict(zip(keys, map(str.strip, line.split(",")), strict=False)) for line in out.splitlines() if line.strip()]


def equality_table(figures: dict[str, Any]) -> Table:
    preempted = ", ".join(f"{name} {count}" for name, count in figures["preemptions"].items())
    drawn = Table(title=f"Tokens against a stock engine: {figures['setup']}", title_justify="left")
    drawn.caption = f"preemptions: {preempted}"
    for heading in ("kind", "answers", "equal tokens", "ties", "differing", "rounding", "smallest gap"):
        drawn.add_column(heading, justify="left" if heading == "kind" else "right")
    rows = {**figures["justitia"]["kinds"]}
    for kind, tally in rows.items():
        keys = ("choices", "tokens", "ties", "differing", "rounding", "smallest_gap")
        drawn.add_row(kind, *(str(tally[key]) for key in keys))
    again, other = figures["control_stock_again"], figures["control_other_prompts"]
    if again is not None:
        drawn.add_row("stock against stock", "", str(again["tokens"]), str(again["ties"]), str(again["differing"]))
    drawn.add_row("another first token", str(other["choices"]), "", "", str(other["differing"]))
    return drawn


def speed_table(figures: dict[str, Any]) -> Table:
    drawn = Table(title=f"Output tokens a second: {figures['verdict']}", title_justify="left")
    for heading in ("engine", "median", "against stock", "sure within", "quartiles"):
        drawn.add_column(heading, justify="left" if heading == "engine" else "right")
    for name, rate in figures["tokens_per_s"].items():
        ratio = {OURS: figures["ratio"], AGAIN: figures["control_ratio"]}.get(name)
        cells = ("", "", "")
        if ratio is not None:
            quartiles = f"{ratio['quartile_low']:.3f} to {ratio['quartile_high']:.3f}"
            cells = (f"{ratio['median']:.3f}", f"{ratio['sure_low']:.3f} to {ratio['sure_high']:.3f}", quartiles)
        drawn.add_row(name, f"{rate:,.0f}", *cells)
    return drawn


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = CheckSettings()
    parser = argparse.ArgumentParser(
        prog="python -m gateway.bench.engine_check",
        description="Tokens and throughput of the engine with our scheduler, against vLLM's own.",
    )
    parser.add_argument(
        "--out", type=Path, help="file that one JSON line is appended to; default: bench-results/engine-check.jsonl"
    )
    parser.add_argument("--gpu", action="store_true", help="on an NVIDIA GPU: tests, tokens, and throughput at 7B")
    parser.add_argument("--rehearse", action="store_true", help="with --gpu: all of it on the CPU, at a tiny size")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--waves", type=int, default=defaults.waves, help="crowds whose tokens are compared")
    parser.add_argument("--crowd", type=int, default=defaults.crowd, help="requests of each kind in a crowd")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="of throughput")
    parser.add_argument("--requests", type=int, help="of each engine in a round of throughput")
    parser.add_argument("--output-tokens", type=int, help="of each of those")
    parser.add_argument("--max-num-seqs", type=int, help="requests that an engine runs at once")
    parser.add_argument("--size", choices=SIZES, help="of the model whose throughput is measured")
    parser.add_argument("--no-control", dest="control", action="store_false", help="without a second stock engine")
    parser.add_argument("--no-tokens", dest="tokens", action="store_false", help="measure throughput only")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="compare tokens only")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> CheckSettings:
    """What was asked for; what was not, by what it runs on."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    chosen: dict[str, Any] = {}
    if options.gpu and not options.rehearse:
        chosen |= {"size": "7b", "max_num_seqs": 64, "requests": 256, "prompt_tokens": 128, "output_tokens": 128}
    elif options.gpu:
        chosen |= {"size": "rehearsal", "waves": 1, "rounds": 6, "requests": 64}
    known = CheckSettings.__dataclass_fields__
    asked = {key: value for key, value in given.items() if key in known and value != known[key].default}
    return CheckSettings(**chosen | asked)


def main() -> None:
    options = parse()
    console = Console()
    if options.rehearse and not options.gpu:
        sys.exit("--rehearse goes with --gpu")
    if options.gpu and not options.rehearse and (on_cpu() or not accelerators()):
        sys.exit(f"gpu-check: {NO_GPU}")
    name = "gpu-check" if options.gpu else "engine-check"
    out: Path = options.out or Path("bench-results") / f"{name}.jsonl"
    # What is measured are the defaults, and not what a user's own engine is told.
    for variable in [variable for variable in os.environ if variable.startswith("JUSTITIA_")]:
        del os.environ[variable]
    try:
        record = asyncio.run(check(settings_of(options), console, gpu=options.gpu, rehearsal=options.rehearse))
    except (EngineFailed, CheckFailed, ServerFailed, LinkError, aiohttp.ClientError, TimeoutError) as error:
        sys.exit(f"{name}: {error}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")
    for what, why in record["not_exercised"].items():
        console.print(f"not exercised: {what}: {why}", markup=False)
    for failure in record["failures"]:
        console.print(f"failed: {failure}", style="bold red", markup=False)
    console.print(f"{'passed' if record['passed'] else 'failed'}; one line appended to {out}")
    sys.exit(0 if record["passed"] else 1)


if __name__ == "__main__":
    main()
