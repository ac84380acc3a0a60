"""The engine: vLLM, co-located, with a scheduler that honours the gateway's order.

Two files are the contract and import no vLLM, so that the gateway runs and is tested without it: `hints` (what a
request carries to the scheduler) and `link` (what the scheduler tells the gateway). Only `scheduler`, `waiting_queue`
and `forced_length` import vLLM; they run inside the engine's own processes.
"""
