"""Learning while serving: a trainer beside the gateway, and the model that serves.

`training` says when a new model is due and has it made by `justitia predictor train`, in a process of its own (`command`);
that one promotes it if it is better. `serving` loads what the registry says is current, whoever said so. `export` writes what
was learned from as an agent trace.
"""
