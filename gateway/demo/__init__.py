"""Benchmarks and the demo: what the gateway promises, measured by anyone on the real thing.

`trace` is the agent trace that every tool here reads, `workload` makes one, `client` replays it against a live gateway,
`report` turns results into JSON, a table and a picture, and `demo` runs all of it with a tiny model on the spot.
`speed` measures what the gateway itself costs. `stand_in` is an engine that answers at once, for what needs no real one.
"""
