"""The fair queue: which task goes next, and when.

**Model.** The engine's KV cache holds M tokens. A task with a prompt of p tokens that decodes d tokens occupies
p + 1, p + 2, … p + d of them, one engine iteration each, and so costs

    c = p·d + d(d+1)/2                                                              [KV token·iterations]

An *agent* is the tasks of one run of one program. Time is τ, the engine iterations done so far: the cost of a task
divided by M is the number of iterations for which it would fill the whole cache.

**Reference.** An ideal processor (GPS: generalized processor sharing) shares the cache among the agents that are
backlogged *in the reference*, in proportion to their weights w. Its virtual time V is the work that it has done so far
for each unit of weight:

    dV/dτ = M / Σ w                                                                 [token·iterations per unit of weight]

An agent is backlogged there while V has not reached its *backlog tag* B, the virtual time at which all of its work that
has arrived will have been served. A task that arrives with predicted cost ĉ moves B by ĉ/w (from V, if the agent was
idle there); the true cost c, once known, moves B by (c − ĉ)/w. When the real queue and the real engine are both empty,
a busy period has ended, and V moves to the largest B.

**Order.** The agent's total cost Ĉ is predicted at its first task, which arrives at virtual time S. Under fair sharing the
agent would finish at the *finish tag*

    F = max(S + Ĉ/w, B)

and agents are served one after another in the order of F, each with all the memory that it can use: no agent finishes
much later than under fair sharing, and most finish much earlier (selective pampering). Ĉ and S move on three occasions
only, and F with them. While the agent is *forming* (none of its tasks released yet) Ĉ is renewed with each arrival,
since a fan-out reaches a server as single requests. When the work that has arrived outgrows Ĉ, Ĉ is predicted anew.
And S moves with V while the agent has nothing to do, neither here nor in the reference: an agent that waits for its
tool is neither aged nor charged. The engine receives the new tag, and orders the agent's tasks in flight by it.

**Tenants** share first, and agents within their tenant: the same reference, nested. A tenant's agents are its packets. The
tenant goes first for which the reference would first have done the work of its next agent. With one tenant this level
vanishes.

**Policies.** A policy decides which task goes next, and nothing else: the reference does not depend on it. So the policy can
be changed while tasks wait and run. No task is lost, and `justitia` finds the tags as if it had been there all along.

**Bound.** With exact costs an agent finishes at most L + (R + D)/M iterations after the reference: L is the longest time that
a task is at the engine, R the most work left of the tasks in flight, D the work by which the engine falls behind M while
tasks wait. If the engine holds M tokens, that is two longest decodes. Wrong costs add, for each agent, the work in flight
beyond its prediction. `docs/explanation/bound.md` derives the bound; the tests hold the queue to it.

**Release.** Tasks are released to the engine in order, while the engine's own queue is shallow and the peak memory of the
tasks in flight stays within β·M. The peak is predicted, and corrected by the engine's reports. So order is decided
late, and here.

**Rules of this package.** The standard library only: no I/O, no clock, no asyncio, no logging, no metrics. Every method
that changes something takes `now` (τ) and, once the call is known to be allowed, brings the reference up to it; only
`revise` and `unreserve` need no time. Methods return what is to be done and call nothing outside the package. A call
that is not allowed raises `QueueError`, and nothing has changed, the clock included. A decision costs O(log N) in the
number of agents.

**Files.**

    fair_queue    the verbs
    types         units, tasks, agents
    reference     the ideal processor; `nested` is two levels of it
    ranking       the order of service; `order` is a heap
    policies      a file for each order
    forecast      the memory of what is in flight, and its peak
    reservations  memory kept for agents that wait for their tools

Sources: Justitia, arXiv 2510.17015; Parekh and Gallager 1993 (GPS); Bennett and Zhang 1996.
"""

from gateway.flowcontrol.fairqueue.fair_queue import FairQueue
from gateway.flowcontrol.fairqueue.policies import POLICIES, Policy
from gateway.flowcontrol.fairqueue.types import (
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
