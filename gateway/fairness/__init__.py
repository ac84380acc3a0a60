"""The fair queue: who goes next, and when.

**Model.** The engine's KV cache holds M tokens. A task with a prompt of p tokens that decodes d tokens occupies
p + 1, p + 2, … p + d of them, one engine iteration each, and so costs

    c = p·d + d(d+1)/2                                                              [KV token·iterations]

An *agent* is the tasks of one run of one program. Time is τ, the engine iterations done so far: the cost of a task
divided by M is the number of iterations that the whole cache would be busy with it.

**Reference.** An ideal processor (GPS: generalized processor sharing) shares the cache among the agents that are
backlogged *in the reference*, in proportion to their weights w. Its virtual time V is what it has given to each unit of
weight so far:

    dV/dτ = M / Σ w                                                                 [token·iterations per unit of weight]

An agent is backlogged there while V has not reached its *backlog tag* B, the virtual time at which all of its work that
has arrived will have been served. A task that arrives with predicted cost ĉ moves B by ĉ/w (from V, if the agent was
idle there); the true cost c, once known, moves it by (c − ĉ)/w. When the real queue and the real engine are both empty a
busy period has ended, and V moves to the largest B.

**Order.** The agent's total cost Ĉ is predicted at its first task, which arrives at virtual time S. It would finish under fair
sharing at the *finish tag*

    F = max(S + Ĉ/w, B)

and agents are served one after another in the order of F, each with all the memory it can use: nobody finishes much
later than under fair sharing, and most finish much earlier (selective pampering). Ĉ and S move on three occasions
only, and F with them. While the agent is *forming* (none of its tasks released yet) Ĉ is renewed with each arrival,
since a fan-out reaches a server as single requests. When the work that has arrived outgrows Ĉ, Ĉ is predicted anew.
And S moves with V while the agent has nothing to do, neither here nor in the reference: who waits for a tool is
neither aged nor charged. The engine is told: what it has already is ordered by the new tag from then on.

**Tenants** share first, and agents within their tenant: the same reference, nested. A tenant's agents are its packets. It
goes first if it would first have been given the work of its next agent. With one tenant this level vanishes.

**Policies.** The reference goes its way whatever the policy: that decides who goes next, and nothing else. So it can be changed
while tasks wait and run. Nothing is lost by it, and `justitia` finds the tags as if it had never been away.

**Bound.** With exact costs an agent finishes at most L + (R + D)/M iterations after the reference: L is the longest that a task
is at the engine, R the most work left of what is in flight, D what the engine falls behind M while tasks wait. With an
engine that holds M, that is two longest decodes. Wrong costs add what was in flight of each agent beyond prediction.
`docs/explanation/bound.md` derives it; the tests hold the queue to it.

**Release.** Tasks are released to the engine in order, while the most memory that those in flight will come to hold, as
predicted and then corrected by what the engine says, stays within β·M, and the engine's own queue is shallow; so order
is decided late, and here.

**Rules of this package.** The standard library only: no I/O, no clock, no asyncio, no logging, no metrics. Every method
that changes something takes `now` (τ) and, once the call is known to be allowed, brings the reference up to it; only
`revise` and `unreserve` need no time. Methods return what is to be done and call nothing outside the package. A call
that is not allowed raises `QueueError`, and nothing has changed, the clock included. A decision costs O(log N) in the
number of agents.

Sources: Justitia, arXiv 2510.17015; Parekh and Gallager 1993 (GPS); Bennett and Zhang 1996.
"""

from gateway.fairness.fair_queue import FairQueue
from gateway.fairness.policies import POLICIES, Policy
from gateway.fairness.types import (
    Agent,
    AgentId,
    Iterations,
    KvTokenIterations,
    QueueError,
    Release,
    ReleaseLimits,
    Spent,
    Standing,
    Task,
    TaskId,
    TenantId,
    VirtualTime,
)

__all__ = [
    "POLICIES",
    "Agent",
    "AgentId",
    "FairQueue",
    "Iterations",
    "KvTokenIterations",
    "Policy",
    "QueueError",
    "Release",
    "ReleaseLimits",
    "Spent",
    "Standing",
    "Task",
    "TaskId",
    "TenantId",
    "VirtualTime",
]
