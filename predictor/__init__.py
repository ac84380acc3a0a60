"""The predictor: what an agent will cost, and how long a task will decode.

No I/O and no clock. `cost` is the formula, `types` the protocol that every predictor fulfils, `ladder` the one that needs no
training and learns from each agent that finishes.
"""
