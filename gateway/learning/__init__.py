"""Learning while serving: models are trained beside the gateway, and the best one serves.

guarded   the predictor as flow control asks it: timed, and never in the way when it fails
outcomes  what is learned from an agent that has ended
accuracy  how good predictions were, of the agents that ended last
serving   loads the model that the registry names
training  decides when a new model is due, and starts the trainer
trainer   trains one model, in a process of its own, and promotes it if it is better
export    writes what was served as an agent trace
store     opens the state's store for commands
"""
