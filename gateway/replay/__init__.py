"""Replay: agents through the very fair queue that serves, before vLLM's real scheduler on a virtual clock.

Deterministic, at any scale, without a GPU: `justitia replay TRACE --policy justitia,vtc,… --json OUT`.
"""
