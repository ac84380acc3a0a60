"""The crowds of requests that every engine is sent, and the kinds of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from engine.hints import Hints, to_fields

MODEL, ADAPTER, ANOTHER = "tiny", "adapter", "another-adapter"
# That an engine computes in one step.
BATCHED_TOKENS = 256
# Ids of the tiny tokenizer: the first ends a text.
FIRST_ID, LAST_ID = 1, 511

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
# One body with prompts that fill `CROWDED_BLOCKS` blocks, and whose answers need more.
CROWDED, CROWDED_PROMPTS, CROWDED_BLOCKS = "crowded", 12, 72
ADAPTED = ("LoRA", "another LoRA", "LoRA, chunked prefill")

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
        case "crowded":  # six blocks of 32 tokens each, and seven or eight with the answer
            body |= {"prompt": [ids(170, 190) for _ in range(CROWDED_PROMPTS)], "max_tokens": 40}
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


def free(case: Case) -> bool:
    """Whether the whole prompt is its own, and any token may follow."""
    return case.kind in ("plain", "chunked prefill", *ADAPTED)
