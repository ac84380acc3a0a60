"""Replay: agents through the gateway's flow control, before vLLM's real scheduler on a virtual clock.

Deterministic, at any scale, without a GPU: `justitia replay TRACE --policy justitia,vtc,… --json OUT`.

    command      `justitia replay`: settings in, runs, and a table, JSON and pictures out
    traces       the built-in traces, made of `agent_types` and `texts`
    agent_types  the paper's nine types of agents
    texts        agents whose prompts are text, and the text decides what they cost
    predictors   what the replayed gateway believes of costs
    simulation   one run: flow control, driven by a virtual clock and engine
    record       what is noted of a run while it lasts
    bound        how late an agent may be, by what the run has shown of its engine
    results      what a run found, as JSON
    evaluation   `justitia predictor evaluate`
    plot         pictures; `figures` has their colours, and means and percentiles
    environment  versions and machine, for the JSON of every measurement
"""
