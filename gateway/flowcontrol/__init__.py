"""Flow control: which task goes next, what it costs, which tenant is charged. One pure object for a task's life.

`FlowController` takes the facts of a request and leaves off at its settlement. Three drivers use the same object: the gateway
(futures, the real clock, the link, the journal), the replay (a virtual clock and engine), and the tests (tables and a fake
clock). So what is measured is what is served.

**The life of a task.**

    arrive ──▶ waiting ──release──▶ in flight ──settle──▶ settled: completed, or broken off
                  ▲                    │
                  └──── engine_lost ───┘

A task is arrived once and settled once, whatever happens between: it is completed, its client leaves, its agent is ended, it
has waited for too long, the engine refuses it or loses it, the gateway stops. The driver owns the task: it settles each task
that `arrive` has returned, and never awaits anything between the end of an answer and `settle`.

**Rules of this package.** No I/O, no clock, no asyncio, no logging, no metrics. A call takes `now` and returns `Effects`: tasks
to release, ranks that have changed, KV to keep, steps for the journal, agents that have ended. It calls nothing
outside but the predictor, which answers at once. The driver applies all effects before its next call; steps are written
before the end of an answer is sent. A call that is not allowed raises an error, and nothing has changed. What grows is
bounded for each tenant.

    controller    the verbs: arrive, release, settle, and what engines report
    effects       what goes in and what comes out
    lives         the life of an agent: arrived, busy, idle, ended, restored
    agents        the agents that have not ended, and the roots of sub-agents
    estimate      predicted cost at arrival
    settlement    the cost of a task, however it ended
    deadlines     how long tasks may wait
    following     carries what an engine reports into the queue
    engine_state  what is known of an engine: τ, M, what it holds and serves
    quotas        what tenants may have, and what they have used
    concurrency   the rule by which tenants share a bound
    tool_waits    for how long the KV of an agent that waits for its tool is worth keeping
    records       what is kept of agents, tasks and use
    fairqueue     the order: a pure package of its own, of the standard library alone
"""

from gateway.flowcontrol.agents import LiveAgent, agent_id_of
from gateway.flowcontrol.controller import FlowController, Options
from gateway.flowcontrol.effects import (
    ENGINE,
    Arriving,
    Charged,
    Effects,
    Ended,
    Ending,
    EngineId,
    Now,
    Rejected,
    Settlement,
)
from gateway.flowcontrol.quotas import Quotas
from gateway.flowcontrol.settlement import LiveTask

__all__ = [
    "ENGINE",
    "Arriving",
    "Charged",
    "Effects",
    "Ended",
    "Ending",
    "EngineId",
    "FlowController",
    "LiveAgent",
    "LiveTask",
    "Now",
    "Options",
    "Quotas",
    "Rejected",
    "Settlement",
    "agent_id_of",
]
