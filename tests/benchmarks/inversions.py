"""Does the engine keep the gateway's order? A log of the link is searched for inversions.

An inversion: a task of a later tag runs while one of an earlier tag, which would fit, waits for more than two iterations one
after the other. What fits follows from how vLLM admits:

* In the order of the queue, until one does not fit: it holds up all behind it. So the memory for a task is that which is left
  by all that may be ahead of it; a task is admitted if all of its tokens have room, and if fewer tasks run than may.
* Who runs is not put out for who comes later. So a running task takes a waiting one's room only if it *passed* it: it was
  admitted while the other waited, or was left when the other was preempted. What those hold that passed a task
  would be free for it, and the slots too.
* Nobody is admitted in a step that preempts, nor when prompts took all of the step's tokens. So free memory that nobody
  takes is held against the engine only in quiet iterations: nobody is preempted or admitted, no prompt is left in pieces.

In doubt for the engine: a change of tags that the engine may have heard of or not leaves a task with both tags, until two
iterations after a report has said that it was heard. What the prefix cache might save is not reckoned with. Iterations
that the log lacks are quiet only if the same tasks run before and after. Not known here: that a task waits for a grammar
or for remote KV, and is passed over by right.

    python -m tests.benchmarks.inversions LOG
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import zmq
import zmq.asyncio

from engine.link import GatewayLink, Hello, LinkError, Message, Report, parse

# An inversion lasts longer than this, and a change that was heard holds from so much later, in iterations.
PATIENCE = 2


class Released(msgspec.Struct, frozen=True, tag="released"):
    """A task goes to the engine. tokens: of its prompt."""

    task: int
    agent: str
    tag: int
    tokens: int


class Changed(msgspec.Struct, frozen=True, tag="changed"):
    """New tags by task, told on the link. number: the last by which the gateway counted it."""

    gateway: str
    number: int
    tags: dict[int, int]


Record = Hello | Report | Released | Changed


class Inversion(NamedTuple):
    """`waited` should have run rather than `ran`, from one iteration to another. Both are the gateway's numbers of tasks."""

    waited: int
    ran: int
    first: int
    last: int


@dataclass(slots=True)
class Judgement:
    """judged: iterations in which some waited and some ran. unjudged: reports that do not say who, or name unknown tasks."""

    inversions: list[Inversion] = field(default_factory=list)
    reports: int = 0
    judged: int = 0
    unjudged: int = 0
    missing: int = 0  # iterations of which there is no report
    preempted: int = 0


Place = tuple[int, str, int]  # tag, agent, task: as `engine.hints.Hints` are ordered


@dataclass(slots=True)
class _Task:
    agent: str
    number: int
    prompt: int
    tags: list[
        int
    ]  # those that it may have: the first for certain was told, of the others it is open whether they were heard
    output: int = 0
    seen_at: int | None = None  # the iteration in which it last ran; None while it has not
    known: bool = False  # some report has named it

    @property
    def earliest(self) -> Place:
        return min(self.tags), self.agent, self.number

    @property
    def latest(self) -> Place:
        return max(self.tags), self.agent, self.number


class _Open(NamedTuple):
    """A change of which it is open whether it holds. holds_at: two iterations after it was heard, once it was."""

    gateway: str
    number: int
    tags: dict[int, int]
    holds_at: int | None


@dataclass(slots=True)
class _State:
    """After a report."""

    report: Report
    running: dict[int, int]  # KV tokens by task
    waiting: dict[int, int]  # by task, tokens to be admitted with, at most
    in_pieces: bool  # a prompt is being computed


@dataclass(slots=True)
class _Streak:
    first: int
    ran: int
    last: int
    iterations: int


def judge(records: Iterable[Record]) -> Judgement:
    """A log is in the order in which a gateway sent and heard. Raises `ValueError` if a report comes before any hello."""
    judge = _Judge()
    for record in records:
        judge.hear(record)
    return judge.result()


def find(records: Iterable[Record]) -> list[Inversion]:
    return judge(records).inversions


class _Judge:
    def __init__(self) -> None:
        self._found = Judgement()
        self._hello: Hello | None = None
        self._tasks: dict[int, _Task] = {}
        self._begin_life()

    def _begin_life(self) -> None:
        """Another engine has none of the tasks. Those that are sent to it may have been released before it said hello."""
        for task in self._tasks.values():
            task.tags, task.output, task.seen_at, task.known = task.tags[-1:], 0, None, False
        self._open: list[_Open] = []
        self._before: _State | None = None
        self._passed: dict[int, set[int]] = {}  # by task that waits, those that passed it and run
        self._streaks: dict[int, _Streak] = {}

    def hear(self, record: Record) -> None:
        if isinstance(record, Hello):
            if self._hello is None or record.engine_id != self._hello.engine_id:
                self._end_streaks(())
                self._hello = record
                self._begin_life()
        elif isinstance(record, Released):
            # What is sent again to a new engine is released again.
            self._tasks[record.task] = _Task(record.agent, record.task, record.tokens, [record.tag])
        elif isinstance(record, Changed):
            self._change(record)
        elif self._hello is None:
            raise ValueError("the log has a report before any hello")
        elif record.engine_id == self._hello.engine_id:
            self._report(record, self._hello)

    def result(self) -> Judgement:
        self._end_streaks(())
        return self._found

    def _change(self, change: Changed) -> None:
        tags = {}
        for number, tag in change.tags.items():
            task = self._tasks.get(number)
            if task is None:
                continue
            task.tags.append(tag)
            if task.known:  # else the engine may not have had it yet, and it stays open for good which tag it has
                tags[number] = tag
        self._open.append(_Open(change.gateway, change.number, tags, None))

    def _settle(self, report: Report) -> None:
        """Tags that hold from now on."""
        still_open = []
        for one in self._open:
            if one.holds_at is None and report.heard.get(one.gateway, 0) >= one.number:
                one = one._replace(holds_at=report.iteration + PATIENCE)
            if one.holds_at is None or report.iteration < one.holds_at:
                still_open.append(one)
                continue
            for number, tag in one.tags.items():
                tags = self._tasks[number].tags
                if tag in tags:
                    del tags[: tags.index(tag)]
        self._open = still_open

    def _report(self, report: Report, hello: Hello) -> None:
        self._settle(report)
        self._found.reports += 1
        before = self._before
        if before is not None:
            self._found.missing += max(0, report.iteration - before.report.iteration - 1)
            self._found.preempted += report.preempted - before.report.preempted
        state = self._before = self._read(report)
        if state is None or before is None:
            self._end_streaks(())
            self._passed.clear()
            return
        if state.waiting and state.running:
            self._found.judged += report.iteration - before.report.iteration
        self._note_passing(before, state)
        self._judge_waiting(before, state, hello)

    def _read(self, report: Report) -> _State | None:
        """None if it is not known who they are."""
        held = report.held
        tasks = {number: self._tasks.get(number) for number in (*held, *report.waiting_tasks)}
        if (report.waiting and not report.waiting_tasks) or None in tasks.values():
            self._found.unjudged += 1
            return None
        in_pieces = len(held) < report.running  # of those that are not the gateway's it is not known
        before, missed = self._before, 0
        if before is not None and before.report.preempted != report.preempted:
            missed = report.iteration - before.report.iteration - 1  # in which one that waits may have run
        waiting = {}
        for number in report.waiting_tasks:
            task = tasks[number]
            assert task is not None
            task.known = True
            if number in held:
                continue  # one of its sequences runs
            if before is not None and number in before.waiting:
                waiting[number] = before.waiting[number] + missed
            else:
                unseen = missed if task.seen_at is None else report.iteration - task.seen_at
                waiting[number] = task.prompt + task.output + unseen
        for number, holding in held.items():
            task = tasks[number]
            assert task is not None
            task.known, task.output, task.seen_at = True, holding.output_tokens, report.iteration
            in_pieces |= holding.kv_tokens < task.prompt + holding.output_tokens - 1
        return _State(report, {number: holding.kv_tokens for number, holding in held.items()}, waiting, in_pieces)

    def _note_passing(self, before: _State, now: _State) -> None:
        """Who waits now, and was here before, was passed by the later ones that came to run meanwhile; and, if it was preempted
        meanwhile, by all later ones that run."""
        passed: dict[int, set[int]] = {}
        came = now.running.keys() - before.running.keys()
        for waits in now.waiting:
            if waits in before.running:
                those: Iterable[int] = now.running
            elif waits in before.waiting:
                those = came | (self._passed.get(waits, set()) & now.running.keys())
            else:
                continue
            if later := {other for other in those if self._is_later(other, waits)}:
                passed[waits] = later
        self._passed = passed

    def _is_later(self, other: int, than: int) -> bool:
        """For certain."""
        return min(self._tasks[other].tags) > max(self._tasks[than].tags)

    def _judge_waiting(self, before: _State, now: _State, hello: Hello) -> None:
        size = hello.block_size
        iteration, since = now.report.iteration, now.report.iteration - before.report.iteration
        # Where the same tasks run, those that decode take ever more: what fits at the end fitted all the while.
        quiet = (
            (since == 1 or now.running.keys() == before.running.keys())
            and before.report.preempted == now.report.preempted
            and not (now.running.keys() - before.running.keys())
            and not (before.in_pieces or now.in_pieces)
        )
        needs = {number: math.ceil(tokens / size) for number, tokens in now.waiting.items()}
        # All that may be ahead of a task come first.
        in_order = sorted((self._tasks[number].earliest, needs[number]) for number in now.waiting)
        places = [place for place, _ in in_order]
        blocks_upto = list(accumulate(blocks for _, blocks in in_order))
        # Who runs takes blocks before who waits.
        free = min(
            state.report.free_blocks - sum(not tokens % size for tokens in state.running.values())
            for state in (before, now)
        )
        latest = max(now.running, key=lambda number: min(self._tasks[number].tags), default=None)
        went_on = set()
        for number in now.waiting.keys() & before.waiting.keys() | self._passed.keys():
            ahead = bisect_right(places, self._tasks[number].latest)
            blocks, slots = blocks_upto[ahead - 1], ahead
            passers = self._passed.get(number, set())
            theirs = sum(math.ceil(now.running[other] / size) for other in passers)
            ran = None
            if (
                passers
                and blocks <= now.report.free_blocks + theirs
                and now.report.running - len(passers) + slots <= hello.max_num_seqs
            ):
                ran = max(passers)
            elif (
                quiet
                and latest is not None
                and self._is_later(latest, number)
                and blocks <= free
                and now.report.running + slots <= hello.max_num_seqs
            ):
                ran = latest
            if ran is None:
                continue
            went_on.add(number)
            streak = self._streaks.get(number)
            # In missing iterations it may have run and been preempted.
            if streak is None or (since > 1 and before.report.preempted != now.report.preempted):
                self._end_streaks(self._streaks.keys() - {number})
                self._streaks[number] = _Streak(iteration, ran, iteration, min(since, 1))
            else:
                streak.last, streak.iterations = iteration, streak.iterations + since
        self._end_streaks(went_on)

    def _end_streaks(self, but_for: Iterable[int]) -> None:
        for number in self._streaks.keys() - set(but_for):
            streak = self._streaks.pop(number)
            if streak.iterations > PATIENCE:
                self._found.inversions.append(Inversion(number, streak.ran, streak.first, streak.last))


# Logs


_DECODER = msgspec.json.Decoder(Record)


class Recorder:
    """Keeps what it is told, and what the gateway tells over the link. sink: where each record goes as a line, at once."""

    def __init__(self, link: GatewayLink, sink: IO[bytes] | None = None) -> None:
        self.records: list[Record] = []
        self.changes = 0  # entries of tags
        self.hello: Hello | None = None  # the newest, and the newest report
        self.last: Report | None = None
        self._link = link
        self._sink = sink
        self._came = asyncio.Event()

    @property
    def name(self) -> str:
        """By which the engine knows this end of the link."""
        return self._link.name

    @property
    def heard(self) -> bool:
        """Whether the engine has heard of every change."""
        return not self._link._unheard

    def released(self, task: int, agent: str, tag: int, tokens: int) -> None:
        """To be called before the task is sent."""
        self._keep(Released(task, agent, tag, tokens))

    def change(self, tags: Mapping[int, int] | None = None, keep: Mapping[str, int] | None = None) -> None:
        """As `GatewayLink.change`."""
        self._link.change(tags, keep)
        if tags:
            self.changes += len(tags)
            self._keep(Changed(self._link.name, self._link._number, dict(tags)))

    def hear(self, message: Message) -> None:
        if isinstance(message, Hello):
            self.hello = message
            self._keep(message)
        elif isinstance(message, Report):
            self.last = message
            self._keep(message)
        self._came.set()

    def acknowledged(self) -> None:
        """The engine may have heard of more changes."""
        self._came.set()

    async def came(self) -> None:
        """Until the next message."""
        self._came.clear()
        await self._came.wait()

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        if self._sink is not None:
            self._sink.write(msgspec.json.encode(record) + b"\n")


@contextlib.asynccontextmanager
async def recording(address: str, log: Path | None = None) -> AsyncIterator[Recorder]:
    """A recorder on an engine's link while the body runs. Raises `LinkError` for an engine of another protocol."""
    link = GatewayLink(address)
    reports: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
    with contextlib.ExitStack() as stack:
        stack.callback(link.close)
        stack.enter_context(reports)
        for name, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 0), (zmq.SUBSCRIBE, b"")):
            reports.setsockopt(name, value)
        reports.connect(address)
        recorder = Recorder(link, stack.enter_context(log.open("wb")) if log is not None else None)

        async def follow() -> None:
            async for _ in link.messages():
                recorder.acknowledged()

        async def listen() -> None:
            # A gateway passes over reports that it comes too late for. Here each one counts.
            while True:
                recorder.hear(parse(await reports.recv()))

        tasks = [asyncio.create_task(watch()) for watch in (follow, listen)]
        try:
            yield recorder
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task


def write(log: Path, records: Iterable[Record]) -> None:
    log.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))


def read(log: Path) -> Iterator[Record]:
    """Raises `OSError`, and `msgspec.DecodeError` for what is no record."""
    with log.open("rb") as lines:
        for line in lines:
            record: Record = _DECODER.decode(line)
            yield record


def main(argv: list[str] | None = None) -> int:
    """0 if there are none, 1 if there are, 2 if the log cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.inversions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("log", type=Path, help="records of the link, as JSON Lines")
    arguments = parser.parse_args(argv)
    try:
        found = judge(read(arguments.log))
    except (OSError, ValueError, LinkError) as error:
        print(f"{arguments.log}: {error}", file=sys.stderr)
        return 2
    for one in found.inversions:
        print(f"task {one.waited} waited while task {one.ran} ran, iterations {one.first} to {one.last}")
    print(
        f"{len(found.inversions)} inversions in {found.judged} iterations with tasks that wait; {found.preempted} preemptions; "
        f"of {found.reports} reports {found.unjudged} do not say who waits, and {found.missing} iterations were not reported"
    )
    return 1 if found.inversions else 0


if __name__ == "__main__":
    sys.exit(main())
