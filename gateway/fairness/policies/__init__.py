"""The orders in which agents can be served: one small interface, `Policy`, and a file for each order."""

from __future__ import annotations

from gateway.fairness.policies.agent_fcfs import AgentFcfs
from gateway.fairness.policies.fcfs import Fcfs
from gateway.fairness.policies.justitia import Justitia
from gateway.fairness.policies.las import Las
from gateway.fairness.policies.policy import Policy
from gateway.fairness.policies.sjf import Sjf
from gateway.fairness.policies.srjf import Srjf
from gateway.fairness.policies.vtc import Vtc

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
