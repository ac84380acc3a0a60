"""The orders in which agents can be served.

policy      the interface
justitia    selective pampering: by virtual finish time
fcfs        first come, first served, by task; `agent_fcfs` by agent
vtc         the virtual token counter, of agents
las         least attained service
sjf         shortest job first, by task
srjf        shortest remaining job first, by agent
"""

from __future__ import annotations

from gateway.flowcontrol.fairqueue.policies.agent_fcfs import AgentFcfs
from gateway.flowcontrol.fairqueue.policies.fcfs import Fcfs
from gateway.flowcontrol.fairqueue.policies.justitia import Justitia
from gateway.flowcontrol.fairqueue.policies.las import Las
from gateway.flowcontrol.fairqueue.policies.policy import Policy
from gateway.flowcontrol.fairqueue.policies.sjf import Sjf
from gateway.flowcontrol.fairqueue.policies.srjf import Srjf
from gateway.flowcontrol.fairqueue.policies.vtc import Vtc

__all__ = ["POLICIES", "Policy"]

POLICIES: dict[str, type[Policy]] = {
    "justitia": Justitia,
    "fcfs": Fcfs,
    "agent-fcfs": AgentFcfs,
    "vtc": Vtc,
    "las": Las,
    "sjf": Sjf,
    "srjf": Srjf,
}
