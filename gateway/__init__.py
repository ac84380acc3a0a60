"""The gateway: an OpenAI-compatible server that groups requests into agents and releases their tasks in a fair order.

**A request's way**, by packages. Each may import only those below it in the next list; `pyproject.toml` has the rules.

    http         its bytes arrive, within limits; its disconnect cancels its task
    tenancy      its API key names its tenant
    protocol     its body is read: the endpoint, the agent that it names, its texts
    api          its endpoint makes a task of it
    flowcontrol  its cost is predicted; it is let in or refused, enqueued, and released in its turn
    relay        it waits for its turn, goes to the engine, and its answer is relayed as it comes
    protocol     the usage in its answer is read
    flowcontrol  it is settled: charged, its agent goes on, is idle, or has ended
    state        the settlement is written to the journal, and from there to the store
    telemetry    it is counted, logged and traced
    learning     the predictor learns from its agent, once that has ended

**What lies where.** From the top; the file to open for a question stands in brackets.

    cli          the command `justitia` and its sub-commands
    server       the process: listens, stops in order
    app          the composition root: makes all parts, and gives each what it needs
    reload       other settings while the gateway serves
    restart      what a start finds in the store
    supervise    the loops that run beside the requests
    check        settings and keys, checked together, before a start and a reload
    api          an endpoint each [a new endpoint of tasks is a row of `protocol/endpoints`; one of the gateway's own is
                 a file in `api`, and a line of `_add_routes` in `app`]
    relay        tasks between clients and the engine; drives flow control [what feeds journal, link and metrics:
                 `relay/dispatcher`]
    demo         `justitia demo`
    learning     trains models beside the gateway, and judges predictions
    http         client connections [a limit on what a client may send: `http/client_connection`, and of bodies `http/reading`]
    replay       `justitia replay`: flow control on a virtual clock
    telemetry    metrics, request log, traces, logs [a metric: `telemetry/metrics`, by subject]
    tenancy      API keys and tenants
    state        journal and store
    flowcontrol  the pure core [why a task is not released: `release` in `flowcontrol/controller`, then `_fits` in
                 `flowcontrol/fairqueue/fair_queue`; what a broken-off task costs: `flowcontrol/settlement`; a quota:
                 `flowcontrol/quotas`]
    protocol     what clients and engines send [a header that names an agent: `protocol/identify`; an error: `protocol/errors`]
    config       settings [a setting: `config/settings`; one that can be reloaded also `reload`]
    agent_trace  the file format of recorded agents, for replay and export
    extras       which optional libraries are missing, and how to get them

Each package's own docstring names its files.
"""
