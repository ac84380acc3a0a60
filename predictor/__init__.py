"""The predictor: what an agent will cost, and how long a task will decode. No clock, and no I/O but for files.

types     what a predictor is asked, what it answers, and what it learns from
cost      the formula of a task's cost
wording   what the instructions of a prompt say
features  what is known of a task when it arrives, as one row of numbers
ladder    predicts by averages, and needs no training
learned   the predictor that serves: the ladder, and a trained model above it
model     a trained model, asked by way of `trees`
dataset   finished agents as a training set, for `train`
evaluate  judges a predictor, by the measures of `accuracy`
mlp       the paper's predictor, to measure by
registry  keeps the versions of models
shares    a memory of bounded size that tenants share
files     replaces a file at once
"""
