"""What a step of our scheduler costs, beside vLLM's own: `python -m tests.benchmarks.step_cost`.

The real classes in one process, a step of each in turn: `schedule` and `update_from_output`, with a model that is not there.
256 requests run, one token a step, and 2,000 wait; ours has its link on, and a process that listens. Stock is
`AsyncScheduler` with `--scheduling-policy priority`; a second stock one shows how far two of the same are apart. Two
situations:

decoding: nothing else happens. Nearly all steps of an engine are of this kind.
told: and the gateway changes 1,000 tags a second.

Ends in one JSON line. The ratios are of medians; times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import zmq
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from engine.hints import Hints, to_fields
from engine.lab.collector import collector_at_rest
from engine.lab.virtual import scheduler_of
from engine.link import PROTOCOL, Change, Greeting, encode, inbox
from engine.scheduler.scheduler import JustitiaScheduler

RUNNING, WAITING = 256, 2000
BLOCK_SIZE = 16
# Output that no request comes to the end of.
ENDLESS = 30_000
TAGS_A_SECOND = 1000


class Stage:
    """A scheduler with requests in it. `step` returns the seconds that one step took."""

    def __init__(self, scheduler_class: type[AsyncScheduler], blocks: int, justitia: dict[str, Any]) -> None:
        self._scheduler = scheduler_of(
            scheduler_class,
            blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=RUNNING,
            max_num_batched_tokens=2048,
            max_model_len=32768,
            enable_prefix_caching=True,
            scheduling_policy="priority",
            additional_config={"justitia": justitia},
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        for task in range(RUNNING + WAITING):
            self._add(task)

    def step(self) -> float:
        scheduler = self._scheduler
        started = time.perf_counter()
        output = scheduler.schedule()
        scheduled = time.perf_counter()
        names = list(output.num_scheduled_tokens)
        answers = ModelRunnerOutput(
            names,
            {name: i for i, name in enumerate(names)},
            sampled_token_ids=[[] if scheduler.requests[name].is_prefill_chunk else [7] for name in names],
        )
        returned = time.perf_counter()
        scheduler.update_from_output(output, answers)
        return scheduled - started + time.perf_counter() - returned

    def close(self) -> None:
        self._scheduler.shutdown()

    def _add(self, task: int) -> None:
        agent = task * 7919 % 500
        priority, xargs = to_fields(Hints(agent if task >= RUNNING else -1, f"agent-{agent}", task))
        self._scheduler.add_request(
            Request(
                request_id=str(task),
                prompt_token_ids=[task] * (8 + task % BLOCK_SIZE),
                sampling_params=SamplingParams(max_tokens=ENDLESS, ignore_eos=True, extra_args=xargs),
                pooling_params=None,
                arrival_time=float(task),
                priority=priority,
                block_hasher=self._hasher,
            )
        )


def measure(blocks: int, steps: int, *, told: bool = False) -> dict[str, float]:
    """Median microseconds of a step, and ratios to stock."""
    with tempfile.TemporaryDirectory(prefix="justitia-") as directory:
        address = f"ipc://{Path(directory) / 'link.sock'}"
        with _gateway(address, told):
            stages = {
                "stock": Stage(AsyncScheduler, blocks, {}),
                "stock_again": Stage(AsyncScheduler, blocks, {}),
                "justitia": Stage(JustitiaScheduler, blocks, {"link": address}),
            }
            times: dict[str, list[float]] = {name: [] for name in stages}
            with collector_at_rest():
                for i in range(steps):
                    for name, stage in stages.items():
                        took = stage.step()
                        if i >= steps // 10:  # the first admit everybody
                            times[name].append(took)
            for stage in stages.values():
                stage.close()
    medians = {name: statistics.median(each) for name, each in times.items()}
    means = {name: statistics.fmean(each) for name, each in times.items()}
    return {
        **{f"{name}_us": round(median * 1e6, 1) for name, median in medians.items()},
        "stock_again_ratio": round(medians["stock_again"] / medians["stock"], 4),
        "ratio": round(medians["justitia"] / medians["stock"], 4),
        "ratio_of_means": round(means["justitia"] / means["stock"], 4),
    }


@contextmanager
def _gateway(address: str, tells: bool) -> Iterator[None]:
    """A process that reads all reports, and perhaps changes tags."""
    spawn = multiprocessing.get_context("spawn")
    done = spawn.Event()
    process = spawn.Process(target=_listen, args=(address, tells, done), daemon=True)
    process.start()
    try:
        yield
    finally:
        done.set()
        process.join()


def _listen(address: str, tells: bool, done: Event) -> None:
    context = zmq.Context()
    reports, changes = context.socket(zmq.SUB), context.socket(zmq.PUSH)
    reports.setsockopt(zmq.SUBSCRIBE, b"")
    reports.connect(address)
    changes.setsockopt(zmq.LINGER, 0)
    changes.connect(inbox(address))
    number, greeted, next_s = 0, False, 0.0
    while not done.is_set():
        if reports.poll(1):
            reports.recv()
            if not greeted:
                changes.send(encode(Greeting(PROTOCOL, "gateway", 1)))
                greeted = True
        if greeted and tells and time.monotonic() >= next_s:
            number += 1
            tags = {RUNNING + number * 31 % WAITING: 1000 + number * 17 % 500}
            changes.send(encode(Change(gateway="gateway", number=number, tags=tags)))
            next_s = time.monotonic() + 1 / TAGS_A_SECOND
    context.destroy()


SITUATIONS: dict[str, Callable[[int], dict[str, float]]] = {
    "decoding": lambda steps: measure(RUNNING * (steps // BLOCK_SIZE + 4), steps),
    "told": lambda steps: measure(RUNNING * (steps // BLOCK_SIZE + 4), steps, told=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of each scheduler, in each situation")
    parser.add_argument("--only", choices=SITUATIONS, action="append", help="one situation (default: all)")
    options = parser.parse_args()
    found = {name: SITUATIONS[name](options.steps) for name in options.only or SITUATIONS}
    print(json.dumps({"benchmark": "step_cost", "running": RUNNING, "waiting": WAITING, **found}))


if __name__ == "__main__":
    main()
