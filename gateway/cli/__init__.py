"""The command `justitia`: `main` has the sub-commands, `keys` and `predictor` those with commands of their own."""
