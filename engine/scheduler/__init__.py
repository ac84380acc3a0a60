"""vLLM's scheduler, with the gateway's order: what `--scheduler-cls engine.scheduler.JustitiaScheduler` names.

scheduler       the subclass of vLLM's scheduler
waiting_queue   its waiting requests, in the gateway's order
ledger          KV tokens that tasks really hold
kept_blocks     free blocks kept for agents that wait for their tools
step_times      what prefill costs, in iterations
"""

from engine.scheduler.scheduler import JustitiaScheduler

__all__ = ["JustitiaScheduler"]
