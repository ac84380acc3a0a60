"""The engine: vLLM on the gateway's own machine, with a scheduler that honours the gateway's order.

Modules with a star import vLLM; the gateway runs and is tested without them. `compat` imports it when it checks it.

hints       the contract: what a request carries from the gateway to the scheduler
link        the contract: what the scheduler reports to the gateway, and what the gateway changes
compat      what the scheduler and the lab rely on in vLLM, and whether the installed one has it
launcher    starts vLLM's server, keeps it running, stops it
cores       which processor cores its processes run on

scheduler/  runs in vLLM's own process
  scheduler*      the subclass of vLLM's scheduler
  order           the order of requests, waiting and running
  waiting_queue*  its waiting requests, in that order
  displacement    which running tasks make room for a more urgent one
  ledger          KV tokens that tasks really hold
  kept_blocks*    free blocks kept for agents that wait for their tools
  step_times      what prefill costs, in iterations
  reporting*      the scheduler's side of the link

lab/        engines for replays, demonstrations and tests
  virtual*        vLLM's scheduler on a virtual clock
  profile         how long an iteration of an engine takes
  forced_length*  answers of a given length
  tiny_model      a tiny model with random weights
  collector       Python's garbage collector, at rest while something is timed
"""
