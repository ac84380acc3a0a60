"""The predictor: what an agent will cost, and how long a task will decode.

While serving: `types` is the protocol, `cost` the formula, `wording` and `features` what is known of a task as one row of
numbers, `ladder` the predictor that needs no training, `model` one that has been trained, asked by way of `trees`, and
`learned` both together. Beside it: `dataset`, `train` and `evaluate` make models and judge them, `registry` keeps their
versions; `mlp` is the paper's predictor, to measure by. `files` replaces a file at once. There is no clock, and no I/O but for
files.
"""
