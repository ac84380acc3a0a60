"""Does the engine keep the gateway's order? A log of the link is searched for inversions.

An inversion: a task of a later tag runs while one of an earlier tag, which would fit, waits for more than two iterations one
after the other. What fits follows from how vLLM admits:

* In the order of the queue, until one does not fit: it holds up all behind it. So the memory for a task is that which is left
  by all that may be ahead of it; a task is admitted if all of its tokens have room, and if fewer tasks run than may.
* Who runs is not put out for who comes later. So a running task takes a waiting one's room only if it *passed* it: it was
  admitted while the other waited, or was left when the other was preempted. What those hold that passed a task
  would be free for it, and the slots too.
* Nobody is admitted in a step that preempts, nor when prompts took all of the step's tokens. So free memory that nobody takes is
  held against the engine only in quiet iterations: nobody is preempted or admitted, and no prompt is left in pieces.

In doubt for the engine: a change of tags that the engine may have heard of or not leaves a task with both tags, until two
iterations after a report has said that it was heard. What the prefix cache might save is not reckoned with. Iterations that the log
lacks are not quiet. Tasks are taken for such that can be admitted at any time: one that waits for a grammar or for
remote KV is passed over by right.

    python -m gateway.bench.inversions LOG
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

from engine.link import GatewayLink, Hello, LinkError, Report

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
    """judged: iterations of which a report told who waited; some waited and some ran. unjudged: not who, or of unknown tasks."""

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

    def tokens(self, iteration: int) -> int:
        """To be admitted with, at most, if it waits since some iteration after that in which it was last seen to run."""
        unseen = iteration - self.seen_at if self.seen_at is not None else 0
        return self.prompt + self.output + unseen


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
        self._begin_life()

    def _begin_life(self) -> None:
        self._tasks: dict[int, _Task] = {}
        self._open: list[_Open] = []
        self._before: _State | None = None
        self._passed: dict[int, set[int]] = {}  # by task that waits, those that passed it and run
        self._streaks: dict[int, _Streak] = {}

    def hear(self, record: Record) -> None:
        if isinstance(record, Hello):
            if self._hello is None or record.engine_id != self._hello.engine_id:
                self._end_streaks(())
                first = self._hello is None
                self._hello = record
                if not first:
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
        waiting = {}
        for number in report.waiting_tasks:
            task = tasks[number]
            assert task is not None
            task.known = True
            if number not in held:
                waiting[number] = task.tokens(report.iteration)
        if self._before is not None:
            # It waits since it was first seen to wait: from then on it puts out nothing.
            for number in waiting.keys() & self._before.waiting.keys():
                waiting[number] = min(waiting[number], self._before.waiting[number])
        for number, holding in held.items():
            task = tasks[number]
            assert task is not None
            task.known, task.output, task.seen_at = True, holding.output_tokens, report.iteration
            in_pieces |= holding.kv_tokens < task.prompt
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
        quiet = (
            since == 1
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
            if streak is None or (since > 1 and before.report.preempted != now.report.preempted):
                # Over missing iterations it may have run and been preempted.
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
        self._link = link
        self._sink = sink
        self._came = asyncio.Event()

    @property
    def hello(self) -> Hello | None:
        return next((one for one in reversed(self.records) if isinstance(one, Hello)), None)

    @property
    def last(self) -> Report | None:
        return next((one for one in reversed(self.records) if isinstance(one, Report)), None)

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

    async def listen(self) -> None:
        """Until it is cancelled. Raises `LinkError`."""
        async for message in self._link.messages():
            if isinstance(message, Hello | Report):
                self._keep(message)
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
    with contextlib.ExitStack() as stack:
        stack.callback(link.close)
        recorder = Recorder(link, stack.enter_context(log.open("wb")) if log is not None else None)
        listening = asyncio.create_task(recorder.listen())
        try:
            yield recorder
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening


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
    parser = argparse.ArgumentParser(prog="python -m gateway.bench.inversions", description=__doc__.partition("\n")[0])
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
