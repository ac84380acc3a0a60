"""Steps as `feedback` writes them, made without a gateway: agents that have tasks, are corrected, and end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.flowcontrol.fairqueue import KvTokenIterations, Standing, VirtualTime
from gateway.flowcontrol.records import AgentRecord, Step, UsageRow
from predictor.features import SCHEMA
from predictor.types import AgentPrediction, FinishedAgent, FinishedTask

HOUR = 1_000_000_800


def standing(served: float = 0.0) -> Standing:
    return Standing(
        1.0, KvTokenIterations(served + 500), KvTokenIterations(served), VirtualTime(-served), 10, 5, 0, False
    )


def task(number: int, **fields: Any) -> FinishedTask:
    return FinishedTask(40, 10, 2, 1 + number, arrived_s=float(number), ended_s=number + 0.5, row=bytes(20), **fields)


def row(tenant: str = "red", hour: int = HOUR, **used: Any) -> UsageRow:
    return UsageRow(tenant, hour, **({"requests": 1, "prompt_tokens": 10, "kv_cost": 2.5} | used))


@dataclass
class Life:
    """One agent. Each method gives the step that it comes to."""

    run: str
    tenant: str = "red"
    journal: str = "gateway"
    settled: int = 0
    whole: bool = True
    tasks: list[FinishedTask] = field(default_factory=list)

    @property
    def state(self) -> AgentRecord:
        return AgentRecord(
            run=self.run,
            journal=self.journal,
            id=f"{self.tenant}/{self.run}",
            name=self.run,
            tenant=self.tenant,
            source="x-agent-id",
            standing=standing(100.0 * self.settled),
            arrived_at=1e9,
            last_end_at=1e9 + self.settled,
            settled=self.settled,
            answered=len(self.tasks),
            agent_class="kind",
            whole=self.whole,
            prediction=AgentPrediction(500.0, 900.0, "ladder"),
            schema=SCHEMA,
            aliases=("other",),
        )

    @property
    def sample(self) -> FinishedAgent:
        return FinishedAgent("kind", self.tenant, list(self.tasks), SCHEMA, 1e9, 1.0, None)

    def answer(self, *, over: bool = False, **fields: Any) -> Step:
        self.settled += 1
        self.tasks.append(task(len(self.tasks), **fields))
        usage = row(self.tenant)
        return Step(self.state, self.settled == 1, self.tasks[-1], len(self.tasks) - 1, over, usage)

    def fail(self, *, over: bool = False) -> Step:
        self.settled, self.whole = self.settled + 1, False
        return Step(self.state, self.settled == 1, over=over, usage=row(self.tenant, prompt_tokens=0))

    def correct(self, place: int, held: float) -> Step:
        self.tasks[place] = msgspec.structs.replace(self.tasks[place], held=held)
        return Step(self.state, task=self.tasks[place], place=place, usage=row(self.tenant, requests=0, kv_cost=1.0))

    def end(self) -> Step:
        return Step(self.state, over=True)

    @property
    def living(self) -> AgentRecord:
        """As a store gives it back."""
        return msgspec.structs.replace(self.state, tasks=tuple(self.tasks))
