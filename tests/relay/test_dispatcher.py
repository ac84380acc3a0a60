"""The dispatcher: what it adds to flow control is futures, timers, and calls of the link. Policy is tested without it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry

from engine.link import PROTOCOL, Hello, Report
from engine.link import Ended as EngineEnded
from gateway.flowcontrol import Arriving, Ended, Ending, FlowController, Options, Quotas
from gateway.flowcontrol.fairqueue import POLICIES, FairQueue, TaskId
from gateway.protocol.errors import AgentCancelled, GatewayError, NoEngine, Outcome, ShuttingDown, WaitedTooLong
from gateway.protocol.usage import Usage
from gateway.relay.dispatcher import Dispatcher, Turn, now
from gateway.state import Journal
from gateway.state.memory import MemoryStore
from gateway.telemetry.metrics import Metrics
from tests.flowcontrol.scene import CONTENT, COST, Scripted

COMPLETED = Ending(Outcome.COMPLETED, Usage(10, 4, 0))
GONE = Ending(Outcome.CANCELLED)
FOREVER_S = 600.0


class Noted:
    """The outcomes of agents, and the calls of the link."""

    def __init__(self) -> None:
        self.agents: list[Ended] = []
        self.tags: list[dict[int, int]] = []
        self.keep: list[dict[str, int]] = []

    def ended(self, ended: Ended) -> None:
        self.agents.append(ended)

    def change(self, tags: Mapping[int, int] | None = None, keep: Mapping[str, int] | None = None) -> None:
        if tags is not None:
            self.tags.append(dict(tags))
        if keep is not None:
            self.keep.append(dict(keep))


class Driven(Dispatcher):
    """A dispatcher before an engine that is up, and runs so many tasks at once."""

    def __init__(self, slots: int = 2, max_queue_s: float = FOREVER_S) -> None:
        self.scripted, self.noted = Scripted(), Noted()
        self.registry = CollectorRegistry()
        self.memory = MemoryStore()
        self.kept = Journal(self.memory)
        flow = FlowController(
            FairQueue(POLICIES["justitia"]()), Quotas(100, 10**6), self.scripted, Options(max_queue_s=max_queue_s)
        )
        super().__init__(flow, self.kept, Metrics(self.registry), self.noted)
        self._numbers = itertools.count(1)
        flow.engine.declared_max_num_seqs = slots
        self.is_up()

    def is_up(self) -> None:
        self.flow.engine_checked(now(), True)
        self.pump()

    def connects(self) -> None:
        """The engine's link, over which it takes changes."""
        self.apply(self.flow.engine_reports(now(), Hello(PROTOCOL, "e", "v", 100, 10, 8, 4096, prefix_caching=True)))
        self.apply(
            self.flow.engine_reports(now(), Report(engine_id="e", iteration=0, free_blocks=100, running=0, waiting=0))
        )
        self.link = self.noted.change

    def counts(self, costs: dict[int, float]) -> None:
        self.apply(self.flow.engine_reports(now(), EngineEnded("e", costs)))

    def task(self, agent: str = "a", *, total: float = 0.0, final: bool = False) -> Turn:
        self.scripted.total = total
        task_id = TaskId(next(self._numbers))
        return self.submit(Arriving(task_id, "t", agent, "header", CONTENT, agent_class="kind", final=final))

    def loads(self) -> tuple[int, int]:
        load = self.flow.quotas.load
        assert (load.waiting, load.in_flight) == (self.flow.queue.waiting, self.flow.queue.in_flight)
        return load.waiting, load.in_flight


async def turns_of_the_loop() -> None:
    """Until all that is due at once has been done."""
    for _ in range(5):
        await asyncio.sleep(0)


# Waiting for a turn


async def test_turns_are_granted_as_others_end_and_nothing_goes_to_an_engine_that_is_not_there() -> None:
    to = Driven(slots=1)
    first, second = to.task(), to.task("b")
    assert (await first.wait()).task.id == 1
    waiting = asyncio.create_task(second.wait())
    await turns_of_the_loop()
    to.flow.engine.suspect = True
    assert first.settle(COMPLETED) is not None
    await turns_of_the_loop()
    assert not waiting.done() and to.loads() == (1, 0)
    to.is_up()
    assert (await waiting).task.id == 2
    settlement = second.settle(GONE)
    assert settlement is not None and settlement.cost == 0
    assert second.settle(GONE) is None, "settled already"
    assert to.loads() == (0, 0)


async def test_a_turn_that_is_refused_is_none() -> None:
    to = Driven()
    to.flow.engine_checked(now(), False)
    with pytest.raises(NoEngine):
        to.task()
    await to.drained()
    assert to.loads() == (0, 0)


async def test_once_for_all_that_end_together_the_next_ones_are_released() -> None:
    to = Driven(slots=2)
    turns = [to.task() for _ in range(6)]
    for turn in turns[:2]:
        turn.settle(GONE)
    assert to.loads() == (4, 0), "not before the loop's next turn"
    await turns_of_the_loop()
    assert to.loads() == (2, 2)
    for turn in turns[2:]:
        turn.settle(GONE)


async def test_an_owner_that_leaves_while_it_waits_is_forgotten() -> None:
    to = Driven(slots=1)
    first, second = to.task(), to.task("b")
    owner = asyncio.create_task(second.wait())
    await turns_of_the_loop()
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    second.settle(GONE)
    first.settle(GONE)
    await turns_of_the_loop()
    assert to.loads() == (0, 0)


async def test_a_task_waits_for_so_long_and_the_timer_ends_it() -> None:
    to = Driven(slots=1, max_queue_s=0.05)
    first, second = to.task(), to.task("b")
    await first.wait()
    with pytest.raises(WaitedTooLong):
        await second.wait()
    second.settle(Ending(Outcome.EXPIRED))
    with first.at_engine():
        await turns_of_the_loop()
    assert first.lost(reached=True, retry=True), "it has time left"
    with pytest.raises(WaitedTooLong):
        await first.wait()
    first.settle(Ending(Outcome.EXPIRED))
    assert to.loads() == (0, 0)


async def test_a_shorter_wait_is_ended_before_a_longer_one_that_came_first() -> None:
    to = Driven(slots=1)
    in_flight, long = to.task(), to.task()
    to.change(Options(max_queue_s=0.05))
    short = to.task("b")
    waiting = asyncio.create_task(long.wait())
    with pytest.raises(WaitedTooLong):
        await short.wait()
    assert not waiting.done()
    for turn in (in_flight, short):
        turn.settle(GONE)
    await waiting
    long.settle(GONE)
    assert to.flow.next_expiry_s is None


# At the engine


async def test_a_task_that_the_engine_lost_waits_again_and_the_engine_is_in_doubt() -> None:
    to = Driven()
    turn = to.task()
    await turn.wait()
    assert turn.lost(reached=True, retry=True) and to.engine_in_doubt.is_set()
    waiting = asyncio.create_task(turn.wait())
    await turns_of_the_loop()
    assert not waiting.done() and to.loads() == (1, 0)
    to.is_up()
    assert (await waiting).task.id == 1
    assert not turn.lost(reached=True, retry=True), "once"
    turn.settle(GONE)
    assert not turn.lost(reached=True, retry=True) and to.loads() == (0, 0)


async def test_an_agents_tasks_can_be_ended_waiting_and_in_flight() -> None:
    to = Driven(slots=1)
    in_flight, waiting, other = to.task(), to.task(), to.task("b")
    await in_flight.wait()
    seen: list[str] = []

    async def serve() -> None:
        try:
            with in_flight.at_engine():
                await asyncio.Event().wait()
        except AgentCancelled as error:
            seen.append(error.message)
            in_flight.settle(GONE)

    async def wait() -> None:
        try:
            await waiting.wait()
        except AgentCancelled as error:
            seen.append(error.message)
            waiting.settle(GONE)

    owners = [asyncio.create_task(serve()), asyncio.create_task(wait())]
    await turns_of_the_loop()
    (agent,) = [agent for agent in to.flow.agents if agent.id == "t/a"]
    ends = to.end_agent(agent, AgentCancelled("over"))
    assert ends == to.end_agent(agent, AgentCancelled("again")), "once"
    assert [end.done() for end in ends] == [False, False]
    await asyncio.gather(*owners, *ends)
    assert seen == ["over", "over"]
    assert {owner.cancelling() for owner in owners} == {0}
    assert (await other.wait()).task.agent_id == "t/b"
    assert [ended.record.id for ended in to.noted.agents] == ["t/a"]
    other.settle(GONE)


async def test_all_that_deal_with_the_engine_for_a_task_are_broken_off() -> None:
    to = Driven()
    turn = to.task()
    await turn.wait()

    async def deal() -> None:
        with turn.at_engine():
            await asyncio.Event().wait()

    owners = [asyncio.create_task(deal()) for _ in range(2)]
    await turns_of_the_loop()
    over = turn.abort(AgentCancelled("over"))
    errors = await asyncio.gather(*owners, return_exceptions=True)
    assert [type(error) for error in errors] == [AgentCancelled] * 2
    turn.settle(GONE)
    await over


async def test_a_turn_that_was_ended_between_its_release_and_the_engine_does_not_get_there() -> None:
    to = Driven()
    turn = to.task()
    turn.abort(AgentCancelled("over"))
    with pytest.raises(AgentCancelled):
        await turn.wait()
    with pytest.raises(AgentCancelled), turn.at_engine():
        pytest.fail("it got there")
    turn.settle(GONE)


async def test_a_turn_that_was_ended_is_not_served_when_the_engine_loses_it() -> None:
    to = Driven()
    turn = to.task()
    await turn.wait()
    turn.abort(AgentCancelled("over"))
    assert not turn.lost(reached=True, retry=True)
    with pytest.raises(AgentCancelled):
        await turn.wait()
    turn.settle(GONE)
    assert to.loads() == (0, 0)


async def test_a_client_that_leaves_as_its_agent_is_ended_has_left() -> None:
    to = Driven()
    turn = to.task()
    await turn.wait()

    async def serve() -> None:
        with turn.at_engine():
            await asyncio.Event().wait()

    owner = asyncio.create_task(serve())
    await turns_of_the_loop()
    owner.cancel()
    turn.abort(AgentCancelled("over"))
    with pytest.raises(asyncio.CancelledError):
        await owner
    turn.settle(GONE)


async def test_a_client_that_leaves_is_not_taken_for_an_agent_that_is_ended() -> None:
    to = Driven()
    turn = to.task()
    await turn.wait()

    async def serve() -> None:
        with turn.at_engine():
            await asyncio.Event().wait()

    owner = asyncio.create_task(serve())
    await turns_of_the_loop()
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    over = turn.abort(AgentCancelled("over"))
    assert not over.done()
    turn.settle(GONE)
    await over


# The end of the gateway


async def test_a_drain_lasts_until_nothing_waits_and_nothing_is_in_flight() -> None:
    to = Driven(slots=1)
    first, second = to.task(), to.task("b")
    to.begin_drain(10)
    with pytest.raises(ShuttingDown):
        to.task()
    drained = asyncio.create_task(to.drained())
    first.settle(COMPLETED)
    assert (await second.wait()).task.id == 2
    await turns_of_the_loop()
    assert not drained.done()
    second.settle(GONE)
    await drained


async def test_the_end_of_a_drain_hands_back_what_waits_and_breaks_off_what_is_in_flight() -> None:
    to = Driven(slots=1)

    async def serve(turn: Turn) -> str:
        where = "waiting"
        try:
            await turn.wait()
            where = "in flight"
            with turn.at_engine():
                await asyncio.Event().wait()
        except ShuttingDown:
            assert where == "waiting" or not turn.lost(reached=True, retry=True)
            return where
        finally:
            turn.settle(Ending(Outcome.REJECTED))
        return ""

    serving = [asyncio.create_task(serve(to.task())), asyncio.create_task(serve(to.task("b")))]
    await turns_of_the_loop()
    to.begin_drain(0)
    to.end_drain()
    with pytest.raises(GatewayError):
        to.task()
    assert await asyncio.gather(*serving) == ["in flight", "waiting"]
    await to.drained()
    assert to.loads() == (0, 0)


# Effects


async def test_new_ranks_and_what_to_keep_go_over_the_link() -> None:
    to = Driven(slots=2)
    to.connects()
    first, second = to.task(total=30_100), to.task(total=30_100)
    assert to.noted.tags == [], "a release carries its rank"
    to.counts({1: 100_000.0})
    to.scripted.grown = 1e30
    first.settle(COMPLETED)
    assert to.noted.tags == []
    await turns_of_the_loop()
    assert to.noted.tags == [{2: 2**63 - 1}], "beyond what the engine can take, the nearest"
    to.counts({2: 5.0})
    second.settle(COMPLETED)
    assert to.noted.keep == [{"t/a": 2000}]
    await turns_of_the_loop()
    assert len(to.noted.tags) == 1


async def test_without_a_link_nothing_is_sent() -> None:
    to = Driven(slots=2)
    to.connects()
    to.link = None
    first, second = to.task(total=30_100), to.task(total=30_100)
    to.scripted.grown = 123_456.0
    to.counts({1: 100_000.0})
    first.settle(COMPLETED)
    second.settle(COMPLETED)
    await turns_of_the_loop()
    assert to.noted.tags == [] and to.noted.keep == []


async def test_what_is_settled_is_in_the_journal_in_the_metrics_and_among_the_outcomes_at_once() -> None:
    to = Driven()
    to.connects()
    first, second = to.task(), to.task(final=True)
    first.settle(COMPLETED)
    second.settle(COMPLETED)
    assert to.noted.agents == []
    to.counts({1: 70.0, 2: 30.0})
    assert [ended.finished is not None and ended.finished.cost for ended in to.noted.agents] == [100]
    value = to.registry.get_sample_value
    assert value("justitia_observed_cost_token_iterations_total", {"agent_class": "kind"}) == 100
    assert value("justitia_tenant_kv_token_iterations_total", {"tenant": "t"}) == 2 * COST + 20, "a counter only grows"
    await to.kept.flush()
    (usage,) = await to.memory.usage(0, 2**60)
    assert (usage.requests, usage.completion_tokens, usage.kv_cost) == (2, 8, 100)
    assert [agent.cost for agent in await to.memory.newest(9)] == [100] and await to.memory.agents() == []


async def test_a_sweep_ends_idle_agents() -> None:
    to = Driven()
    turn = to.task()
    turn.settle(COMPLETED)
    to.sweep()
    assert to.noted.agents == []
    to.change(Options(agent_idle_s=0.0))
    to.sweep()
    assert [ended.finished is not None and ended.finished.cost for ended in to.noted.agents] == [COST]
