"""The worked examples of the documents are computed by the code that they explain."""

from __future__ import annotations

import re

import pytest

from gateway.flowcontrol.fairqueue import POLICIES, AgentId, FairQueue, Iterations, KvTokenIterations, Task, TaskId
from gateway.flowcontrol.quotas import TokenBucket
from predictor.cost import task_cost
from predictor.ladder import Ladder
from predictor.types import AgentProgress, FinishedAgent, FinishedTask
from tests.docs.test_documents import ROOT


def table(page: str, header: str) -> list[list[str]]:
    """The cells of the table whose first row begins so."""
    text = (ROOT / "docs" / page).read_text()
    rows = re.search(rf"^\| {re.escape(header)}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert rows is not None, header
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def number(cell: str) -> float:
    found = re.match(r"[−-]?[\d,]+", cell)
    assert found is not None, cell
    return float(found[0].replace(",", "").replace("−", "-"))


def test_the_glossary_computes_costs_as_the_code_does() -> None:
    for _, prompt, decode, _, cost in table("explanation/glossary.md", "| *p* | *d*"):
        first, second, total = map(number, re.findall(r"[\d,]+", cost))
        assert total == first + second == task_cost(number(prompt), number(decode))


def test_the_tags_of_two_agents() -> None:
    queue = FairQueue(POLICIES["justitia"]())
    queue.set_capacity(Iterations(0), 100)
    arrivals = {0: ("a", 2000, 3000), 10: ("b", 500, 500), 15: ("a", 1000, 3000)}
    for row in table("explanation/bound.md", "iteration | what happens"):
        at = int(row[0])
        queue.set_capacity(Iterations(at), 100)
        if at in arrivals:
            agent, cost, total = arrivals[at]
            task = Task(TaskId(at), AgentId(agent), KvTokenIterations(cost), memory_tokens=10)
            queue.enqueue(Iterations(at), task, KvTokenIterations(total))
        assert queue.virtual_time() == number(row[2])
        for agent, cells in (("a", row[3:6]), ("b", row[6:9])):
            if cells[0]:
                known = queue.agents[AgentId(agent)]
                tags = known.start_tag, queue.backlog_tag(known.id), known.finish_tag
                assert list(tags) == [number(cell) for cell in cells]


def test_what_the_ladder_predicts_of_a_new_class() -> None:
    ladder = Ladder()
    for other in range(100):
        growth = (2, 3, 4.5)[other % 3]
        ladder.learn(finished("other", "blue", 10_000, 10_000 * (growth - 1)))
    ended = 0
    for row in table("explanation/prediction.md", "agents of `report` that have ended"):
        while ended < int(row[0]):
            ladder.learn(finished("report", "red", 10_000, 110_000))
            ended += 1
        predicted = ladder.predict_agent(AgentProgress("report", "red", tasks_arrived=1, cost_arrived=10_000))
        assert predicted.cost == pytest.approx(number(row[1]), rel=0.01)


def finished(agent_class: str, tenant: str, *costs: float) -> FinishedAgent:
    return FinishedAgent(agent_class, tenant, [FinishedTask(4000, 1000, 0, 100, held=cost) for cost in costs])


def test_how_an_overdrawn_bucket_opens() -> None:
    bucket, spent = TokenBucket(100_000, 0), False
    for at, _, level, answer in table("how-to/keys.md", "time"):
        minutes, seconds = map(int, at.split(":")[1:])
        now_ns = (60 * minutes + seconds) * 10**9
        if number(level) < 0 and not spent:
            for _ in range(5):
                bucket.spend(now_ns, 40_000)
            spent = True
        opens_in_s = bucket.opens_in_s(now_ns)
        retry_after = re.search(r"`Retry-After: (\d+)`", answer)
        assert opens_in_s == (int(retry_after[1]) if retry_after else 0)
