"""What the gateway itself costs: `python -m tests.benchmarks.speed`, which `make bench` runs.

An engine that answers at once (`engine`) and the clients (`client`) are one process on one core; the relay under test has the
other core, and one worker. Each workload (`workloads`, `waiting`, `memory`) asks the engine directly, through a bare relay
(`bare_relay`: what Python can reach) and through the gateway, in turns, so that whatever else the machine does falls on all of
them, and takes medians over its rounds. A ratio is always one of figures of the same minute.

The gateway is the one that users start: its fair queue is on, with the default policy, and each connection carries one agent
of a few tasks after the other. It has no link, as before a stock vLLM, and reads the engine's `/metrics`. `lines` judges what
was measured, `report` draws it, and writes what the documents say.
"""
