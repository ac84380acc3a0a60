"""The orders in which agents can be served: one small interface, `Policy`, and a file for each order."""

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
